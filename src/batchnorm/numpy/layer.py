"""The layer on NumPy arrays, with every option of ``tf.compat.v1.layers.BatchNormalization``."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.core import algebra, geometry, passes, state
from batchnorm.core.geometry import REFUSED_WEIGHTS, Geometry
from batchnorm.core.normalize import Masked, Pair
from batchnorm.core.options import Clipping, Options, flag, pair, received, small_number

from . import compute
from . import namespace as xp
from .compute import Array, Gradient

__all__ = ["BatchNormalization"]

Initializer = Callable[[tuple[int, ...], Any], npt.ArrayLike] | npt.ArrayLike | str
REMEMBERED = 64
"""Shapes and types of which a layer remembers who serves them."""


class BatchNormalization:
    r"""Batch normalization of NumPy arrays, with every option of ``tf.compat.v1.layers.BatchNormalization``.

    In training each feature is normalized by the mean m and the biased variance v of its values in the batch, or in
    each virtual batch:

    .. math:: y = \left(\left(\frac{x - m}{\sqrt{v + ε}} r + d\right) a + b\right) γ + β

    with r = 1, d = 0 unless `renorm`, and a = 1, b = 0 unless `adjustment`. In inference m and v are the moving
    averages, and r, d, a and b are left out.

    Args:
        axis: The feature axis, or a list of them.
        momentum: Weight of the old value in the moving averages.
        epsilon: Added to the variance.
        center: Whether to have an offset `beta`.
        scale: Whether to have a scale `gamma`.
        beta_initializer: A function of shape and dtype, an array, a number, ``"zeros"`` or ``"ones"``. So are
            `gamma_initializer`, `moving_mean_initializer` and `moving_variance_initializer`.
        beta_regularizer: Function of beta to a penalty, listed in `losses`. So is `gamma_regularizer`.
        beta_constraint: Projection of beta, applied by `constrain`. So is `gamma_constraint`.
        renorm: Whether to use batch renormalization.
        renorm_clipping: Dictionary with any of 'rmin', 'rmax' and 'dmax'.
        renorm_momentum: Weight of the old value in the averages of renorm.
        fused: None or True for the CPU kernels where they can serve, False for the composed path, which computes
            in float64 whatever the type, and is what everything else is tested against.
        trainable: Whether training updates the moving statistics.
        virtual_batch_size: Samples in each virtual batch, at most; of N samples, sample i is in virtual batch
            i mod ⌈N / size⌉, so that their sizes differ by one at most.
        adjustment: Function of the input's shape to a pair (scale, bias), applied in training.
        skip_nonfinite: Whether a feature whose m or v is not finite, in any virtual batch, keeps its averages.
        masked: What stands where a mask lets nothing count: ``"zero"``, or ``"normalized"`` like the rest.
        name: Name of the layer.
        dtype: Type of the variables. By default that of the first input, float32 for 16-bit inputs.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or for options that exclude each other.

    References:
        Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift", 2015. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
        Models", 2017. Hoffer et al., "Train longer, generalize better", 2017 (virtual batches).

    >>> layer = BatchNormalization(momentum=0.5)
    >>> layer(np.array([[1.0, 10.0], [3.0, 30.0]]), training=True).round(2)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> layer.moving_mean
    array([ 1., 10.])
    """

    def __init__(
        self,
        axis: int | list[int] | tuple[int, ...] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        moving_mean_initializer: Initializer = "zeros",
        moving_variance_initializer: Initializer = "ones",
        beta_regularizer: Callable[[Array], Any] | None = None,
        gamma_regularizer: Callable[[Array], Any] | None = None,
        beta_constraint: Callable[[Array], Array] | None = None,
        gamma_constraint: Callable[[Array], Array] | None = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | None] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
        name: str = "batch_normalization",
        dtype: npt.DTypeLike | None = None,
        *,
        skip_nonfinite: bool = False,
        masked: Masked = "zero",
    ) -> None:
        self.options = Options(
            axis=axis,
            decay=momentum,
            epsilon=float(small_number("epsilon", epsilon)),
            center=center,
            scale=scale,
            renorm=renorm,
            renorm_clipping=Clipping.of(renorm_clipping),
            renorm_decay=renorm_momentum,
            fused=fused,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            skip_nonfinite=skip_nonfinite,
        )
        if masked not in typing.get_args(Masked):
            raise ValueError(f"masked must be one of {list(typing.get_args(Masked))}; {received(masked)}.")
        self.masked = masked
        self._initializers = {
            "gamma": _initializer("gamma_initializer", gamma_initializer),
            "beta": _initializer("beta_initializer", beta_initializer),
            "moving_mean": _initializer("moving_mean_initializer", moving_mean_initializer),
            "moving_variance": _initializer("moving_variance_initializer", moving_variance_initializer),
        }
        self._regularizers = {
            "gamma": _function("gamma_regularizer", gamma_regularizer),
            "beta": _function("beta_regularizer", beta_regularizer),
        }
        self._constraints = {
            "gamma": _function("gamma_constraint", gamma_constraint),
            "beta": _function("beta_constraint", beta_constraint),
        }
        self.trainable = flag("trainable", trainable)
        self.name = name
        self.dtype = None if dtype is None else _floating("dtype", dtype)
        self.variables: dict[str, Array] = {}
        self._geometry: Geometry | None = None
        self._calls: dict[tuple[tuple[int, ...], np.dtype[Any], bool], compute.Call] = {}
        self.kernel: str | None = None
        """Name of what served the last call: ``"cpu"`` or ``"composed"``."""

    @property
    def gamma(self) -> Array | None:
        """Scale γ, or None."""
        return self.variables.get("gamma")

    @property
    def beta(self) -> Array | None:
        """Offset β, or None."""
        return self.variables.get("beta")

    @property
    def moving_mean(self) -> Array:
        """Mean for inference."""
        return self.variables["moving_mean"]

    @property
    def moving_variance(self) -> Array:
        """Variance for inference."""
        return self.variables["moving_variance"]

    @property
    def losses(self) -> list[Any]:
        """Penalties of the regularizers on the present parameters."""
        return [
            penalty(self.variables[name])
            for name, penalty in self._regularizers.items()
            if penalty is not None and name in self.variables
        ]

    def constrain(self) -> None:
        """Project γ and β by their constraints; call it after each step of an optimizer."""
        for name, project in self._constraints.items():
            if project is not None and name in self.variables:
                projected = np.array(project(self.variables[name]), self.variables[name].dtype, order="C")
                if self._geometry is not None:
                    _check_shape(name, projected, self._geometry)
                self.variables[name] = projected

    def build(self, shape: tuple[int | None, ...], dtype: npt.DTypeLike = np.float32) -> None:
        """Make the variables for inputs of a shape (None: any size) and type.

        Raises:
            ValueError: If the options do not fit the shape.
        """
        plan = geometry.plan(tuple(shape), self.options.feature_axis, self.options.virtual_batch_size)
        variable_dtype = np.promote_types(self.dtype or _floating("dtype", dtype), np.float32)
        for name, value in self.variables.items():  # loaded before anything was known about the inputs
            _check_shape(name, value, plan)
        loaded = self.variables
        self.variables = {
            name: loaded[name].astype(variable_dtype)
            if name in loaded
            else self._initial(name, plan.parameter_shape, variable_dtype)
            for name in state.names(self.options)
        }
        self._geometry = plan

    def load(self, variables: Mapping[str, npt.ArrayLike]) -> None:
        """Take over saved variables, by name, such as the contents of an ``.npz`` file or of a checkpoint.

        Checkpoints of the older generation of renorm are converted. Shapes are checked against the layer if it is
        built, and else at the first call; so are types, to which values are converted.

        Raises:
            KeyError: If a variable of this layer is missing.
            ValueError: If a shape does not fit.

        >>> layer = BatchNormalization(center=False)
        >>> layer.load({"gamma": [2.0], "moving_mean": [1.0], "moving_variance": [4.0]})
        >>> layer(np.array([[5.0]])).round(2)
        array([[4.]])
        """
        arrays = {name: np.asarray(value) for name, value in variables.items()}
        arrays = state.modernize(xp, arrays, self.options.epsilon)
        expected = state.names(self.options)
        missing = [name for name in expected if name not in arrays]
        if missing:
            raise KeyError(f"variables must hold {list(expected)}; missing {missing}, received {list(arrays)}.")
        if self._geometry is not None:
            for name in expected:
                _check_shape(name, arrays[name], self._geometry)
        present = self.variables
        self.variables = {
            name: np.array(arrays[name], present[name].dtype if self._geometry is not None else None, order="C")
            for name in expected
        }

    def __call__(
        self, inputs: npt.ArrayLike, training: bool = False, mask: npt.ArrayLike | None = None, update: bool = True
    ) -> Array:
        """Normalize a batch; in training also move the statistics.

        Args:
            inputs: Array of floating-point numbers.
            training: True to normalize by the batch, False by the moving statistics.
            mask: What counts, one value for each position: booleans, or weights that are not negative; of the inputs'
                shape without the feature axes, or with size 1 on them. What weighs nothing is not looked at.
            update: Whether training moves the statistics.

        Returns:
            Array of the shape and type of `inputs`.

        Raises:
            TypeError: If the inputs are not floating-point numbers, or another argument is of the wrong type.
            ValueError: If they, or the mask, do not fit the layer.
        """
        return self._apply(np.asarray(inputs), training, mask, update)[0]

    def vjp(
        self, inputs: npt.ArrayLike, training: bool = False, mask: npt.ArrayLike | None = None, update: bool = True
    ) -> tuple[Array, Gradient]:
        """Do what calling the layer does, and also return the function from a gradient dy of y to `Gradients`.

        It is of what went in, whatever becomes of `inputs` and of the variables, which are copied. It raises ValueError
        for a dy that has not the shape of y.

        >>> layer = BatchNormalization()
        >>> y, gradient = layer.vjp(np.array([[1.0], [2.0], [6.0]]), training=True)
        >>> gradient([[0.0], [0.0], [1.0]]).beta
        array([1.])
        """
        return self._apply(np.array(inputs, order="C"), training, mask, update, copied=True)

    def _apply(
        self, x: Array, training: bool, mask: npt.ArrayLike | None, update: bool, copied: bool = False
    ) -> tuple[Array, Gradient]:
        training, update = flag("training", training), flag("update", update)
        key = x.shape, x.dtype, training
        of = self._calls.get(key)
        if of is None:
            of = self._call(*key)
        served, adjustment, weights = of, None, None
        if mask is not None:
            weights = _weights(np.asarray(mask), x.shape, of.plan)
        if training and self.options.adjustment is not None:
            adjustment, by_feature = self._adjust(x.shape, of.plan)
            if not by_feature:
                served = served._replace(kernel=passes.COMPOSED)
        # Whatever can be wrong has been found before a variable is made.
        if self._geometry is None:
            self.build(x.shape, x.dtype)
        self._calls[key] = of
        self.kernel = served.kernel
        variables = {name: value.copy() for name, value in self.variables.items()} if copied else self.variables
        if not training:
            return compute.infer(x, served, self.options.epsilon, variables, weights, self.masked)
        y, moved, gradient = compute.train(
            x, served, self.options, variables, adjustment, weights, self.masked, update and self.trainable
        )
        self.variables = self.variables | moved
        return y, gradient

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_calls": {}}  # kernels are made anew where they are needed

    def _call(self, shape: tuple[int, ...], dtype: np.dtype[Any], training: bool) -> compute.Call:
        _floating("inputs", dtype)
        plan = self._geometry or geometry.plan(shape, self.options.feature_axis, self.options.virtual_batch_size)
        plan.check_input(shape)
        if len(self._calls) >= REMEMBERED:
            self._calls.clear()
        return compute.call(plan, self.options, shape, dtype, training)

    def _adjust(self, shape: tuple[int, ...], plan: Geometry) -> tuple[Pair, bool]:
        """Ask for the adjustment of a batch, and tell whether it has one value for each feature."""
        assert self.options.adjustment is not None
        adjusted = pair(self.options.adjustment(shape))
        scale, bias = (np.array(value, compute.COMPOSED_DTYPE, order="C") for value in adjusted)
        return (scale, bias), plan.check_adjustment((scale.shape, bias.shape), shape)

    def _initial(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if name in ("moving_stddev", "renorm_stddev"):
            stddev: Array = algebra.stddev(xp, self._initial("moving_variance", shape, dtype), 0)
            return stddev
        name = "moving_mean" if name == "renorm_mean" else name
        initial = np.asarray(self._initializers[name](shape, dtype), dtype)
        try:
            return np.array(np.broadcast_to(initial, shape), order="C")
        except ValueError:
            raise ValueError(
                f"{name}_initializer must be or give what broadcasts to shape {shape}; received shape {initial.shape}."
            ) from None


def _check_shape(name: str, value: Array, plan: Geometry) -> None:
    if value.shape != plan.parameter_shape:
        raise ValueError(f"{name} must have shape {plan.parameter_shape}; received shape {value.shape}.")


def _weights(mask: Array, shape: tuple[int, ...], plan: Geometry) -> Array:
    """A mask as it broadcasts against inputs."""
    if mask.dtype.kind not in "biuf":
        raise TypeError(f"mask must hold booleans or real numbers; received {mask.dtype.name}.")
    weights = mask.reshape(plan.mask_shape(mask.shape, shape))
    if mask.dtype.kind != "b" and not ((mask >= 0) & np.isfinite(mask)).all():
        raise ValueError(REFUSED_WEIGHTS)
    return weights


def _floating(name: str, given: npt.DTypeLike) -> np.dtype[Any]:
    allowed = f"{name} must be of a floating-point type of up to 64 bits"
    try:
        dtype = np.dtype(given)
    except TypeError:
        raise TypeError(f"{allowed}; {received(given)}.") from None
    # NumPy does not count bfloat16, which other packages bring, among its own floating types. Nothing is computed in
    # more than 64 bits.
    if not ((np.issubdtype(dtype, np.floating) and dtype.itemsize <= 8) or dtype.name == "bfloat16"):
        raise TypeError(f"{allowed}; received {dtype.name}.")
    return dtype


def _initializer(name: str, initializer: Initializer) -> Callable[[tuple[int, ...], Any], npt.ArrayLike]:
    if callable(initializer):
        return initializer
    if isinstance(initializer, str):
        known: dict[str, Callable[[tuple[int, ...], Any], Array]] = {"zeros": np.zeros, "ones": np.ones}
        if initializer not in known:
            raise ValueError(f"{name} must be a function, an array, 'zeros' or 'ones'; {received(initializer)}.")
        return known[initializer]
    value = np.array(initializer)
    if value.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a function, an array, 'zeros' or 'ones'; {received(initializer)}.")
    return functools.partial(_constant, value)


def _constant(value: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return value


def _function(name: str, function: Any) -> Any:
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be None or a function of an array; {received(function)}.")
    return function
