"""The layer on NumPy arrays: the readable reference, and inference anywhere.

>>> import numpy as np
>>> layer = BatchNormalization(renorm=True, virtual_batch_size=4)
>>> x = np.random.default_rng(0).normal(3.0, 2.0, (32, 5))
>>> layer(x, training=True).shape
(32, 5)
>>> y = layer(x[:3])  # inference: any batch size
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .core import algebra, geometry, kernels, state
from .core.algebra import Correction, Moments
from .core.geometry import Geometry
from .core.options import Clipping, Options, flag, received

__all__ = ["BatchNormalization", "Gradients"]

Array = npt.NDArray[Any]
Initializer = Callable[[tuple[int, ...], Any], npt.ArrayLike] | npt.ArrayLike | str
Wide = np.float64
"""All arithmetic is in float64, whatever is stored: this layer is what the others are measured against."""


class Gradients(NamedTuple):
    """Gradients of one call for what went in; None where the layer has no such input."""

    inputs: Array
    gamma: Array | None
    beta: Array | None
    adjustment: tuple[Array, Array] | None


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
        fused: Accepted for likeness; there is one kernel here, the reference.
        trainable: Whether training updates the moving statistics.
        virtual_batch_size: Samples in each virtual batch; sample i is in virtual batch i mod (N / size).
        adjustment: Function of the input's shape to a pair (scale, bias), applied in training.
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
    ) -> None:
        self.options = Options(
            axis=axis,
            decay=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            renorm=renorm,
            renorm_clipping=Clipping.of(renorm_clipping),
            renorm_decay=renorm_momentum,
            fused=fused,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
        )
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
        self.dtype = None if dtype is None else _floating("dtype", np.dtype(dtype))
        self.variables: dict[str, Array] = {}
        self._geometry: Geometry | None = None

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
    def kernel(self) -> str:
        """The kernel that serves: here always the reference, ``"composed"``."""
        return kernels.COMPOSED

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
                self.variables[name] = np.asarray(project(self.variables[name]), self.variables[name].dtype)

    def build(self, shape: tuple[int | None, ...], dtype: npt.DTypeLike = np.float32) -> None:
        """Make the variables for inputs of a shape (None: any size) and type.

        Raises:
            ValueError: If the options do not fit the shape.
        """
        plan = geometry.plan(tuple(shape), self._axis, self.options.virtual_batch_size)
        kept = np.promote_types(self.dtype or _floating("dtype", np.dtype(dtype)), np.float32)
        for name, value in self.variables.items():  # loaded before anything was known about the inputs
            _check_shape(name, value, plan)
        loaded = self.variables
        self.variables = {
            name: loaded[name].astype(kept) if name in loaded else self._initial(name, plan.parameter_shape, kept)
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
        arrays = state.modernize(np, arrays, self.options.epsilon)
        expected = state.names(self.options)
        missing = [name for name in expected if name not in arrays]
        if missing:
            raise KeyError(f"variables must hold {list(expected)}; missing {missing}, received {list(arrays)}.")
        if self._geometry is not None:
            for name in expected:
                _check_shape(name, arrays[name], self._geometry)
        present = self.variables
        self.variables = {
            name: np.array(arrays[name], present[name].dtype if self._geometry is not None else None)
            for name in expected
        }

    def __call__(self, inputs: npt.ArrayLike, training: bool = False) -> Array:
        """Normalize a batch; in training also move the statistics.

        Args:
            inputs: Array of floating-point numbers.
            training: True to normalize by the batch, False by the moving statistics.

        Returns:
            Array of the shape and type of `inputs`.

        Raises:
            TypeError: If the inputs are not floating-point numbers.
            ValueError: If they do not fit the layer, or do not divide into virtual batches in training.
        """
        return self.vjp(inputs, training)[0]

    def vjp(self, inputs: npt.ArrayLike, training: bool = False) -> tuple[Array, Callable[[npt.ArrayLike], Gradients]]:
        """Do what calling the layer does, and also return the function from Σ-gradients of y to `Gradients`.

        >>> layer = BatchNormalization()
        >>> y, gradient = layer.vjp(np.array([[1.0], [2.0], [6.0]]), training=True)
        >>> gradient([[0.0], [0.0], [1.0]]).beta
        array([1.])
        """
        x = np.asarray(inputs)
        _floating("inputs", x.dtype)
        # Whatever can be wrong is found before a variable is made.
        plan = self._geometry or geometry.plan(x.shape, self._axis, self.options.virtual_batch_size)
        plan.check_input(x.shape)
        if not training:
            self._ensure_built(x)
            return self._infer(x)
        view = x.reshape(plan.split(x.shape)).astype(Wide)
        adjustment = self._adjust(x.shape)
        self._ensure_built(x)
        return self._train(x, view, adjustment)

    def _ensure_built(self, x: Array) -> None:
        if self._geometry is None:
            self.build(x.shape, x.dtype)

    def _train(
        self, x: Array, view: Array, adjustment: tuple[Array, Array] | None
    ) -> tuple[Array, Callable[[npt.ArrayLike], Gradients]]:
        options, plan = self.options, self._plan
        axes = plan.reduced_axes
        moments = kernels.moments(np, view, axes, plan.count(view.shape), kernels.origin(np, view, axes))
        averaged = algebra.average_groups(np, moments, plan.group_axis, view.shape[1] if plan.group_axis else 1)
        renorm = self._correction(averaged) if options.renorm else None
        gamma, beta = self._parameter("gamma", plan.view_shape), self._parameter("beta", plan.view_shape)
        affine = algebra.affine(
            np, moments, options.epsilon, correction=renorm, adjustment=adjustment, gamma=gamma, beta=beta
        )
        y = kernels.scale_shift(view, affine).reshape(x.shape).astype(x.dtype)
        if self.trainable and x.size:
            self._update(averaged)
        gradient = functools.partial(self._train_gradient, x.shape, x.dtype, view, moments, renorm, adjustment, gamma)
        return y, gradient

    def _train_gradient(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        view: Array,
        moments: Moments,
        renorm: Correction | None,
        adjustment: tuple[Array, Array] | None,
        gamma: Array | None,
        dy: npt.ArrayLike,
    ) -> Gradients:
        plan, epsilon = self._plan, self.options.epsilon
        upstream = np.asarray(dy, Wide).reshape(view.shape)
        r, d = (1.0, 0.0) if renorm is None else renorm
        a, b = (1.0, 0.0) if adjustment is None else adjustment
        g = 1.0 if gamma is None else gamma
        # An adjustment may vary within a feature, so it goes into dy before the sums; r and γ are left for after.
        inner = upstream * a
        dy_sum, dy_centered_sum = kernels.gradient_sums(np, inner, view, moments.mean, plan.reduced_axes)
        count = max(plan.count(view.shape), 1)
        combination = algebra.combination(np, moments, epsilon, count, g * r, dy_sum, dy_centered_sum)
        dx = kernels.gradient_combine(inner, view, combination)
        corrected = (view - moments.mean) / algebra.stddev(np, moments.variance, epsilon) * r + d
        return Gradients(
            dx.reshape(shape).astype(dtype),
            self._sum_to_parameter("gamma", upstream * (corrected * a + b)),
            self._sum_to_parameter("beta", upstream),
            None
            if adjustment is None
            else (_sum_to(upstream * g * corrected, adjustment[0].shape), _sum_to(upstream * g, adjustment[1].shape)),
        )

    def _infer(self, x: Array) -> tuple[Array, Callable[[npt.ArrayLike], Gradients]]:
        plan, epsilon = self._plan, self.options.epsilon
        shape = plan.input_shape
        mean, variance = (
            self.variables[name].astype(Wide).reshape(shape) for name in ("moving_mean", "moving_variance")
        )
        moments = Moments(mean, variance)
        gamma, beta = self._parameter("gamma", shape), self._parameter("beta", shape)
        affine = algebra.affine(np, moments, epsilon, gamma=gamma, beta=beta)
        wide = x.astype(Wide)
        y = kernels.scale_shift(wide, affine).astype(x.dtype)

        def gradient(dy: npt.ArrayLike) -> Gradients:
            upstream = np.asarray(dy, Wide).reshape(x.shape)
            normalized = (wide - mean) / algebra.stddev(np, moments.variance, epsilon)
            return Gradients(
                (upstream * affine.scale).astype(x.dtype),
                self._sum_to_parameter("gamma", upstream * normalized),
                self._sum_to_parameter("beta", upstream),
                None,
            )

        return y, gradient

    def _correction(self, averaged: Moments) -> Correction:
        shape = self._plan.view_shape
        mean, stddev = (self.variables[name].astype(Wide).reshape(shape) for name in ("renorm_mean", "renorm_stddev"))
        return algebra.correction(np, averaged, mean, stddev, self.options.epsilon, self.options.renorm_clipping)

    def _adjust(self, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
        if self.options.adjustment is None:
            return None
        pair = self.options.adjustment(shape)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"adjustment must return a pair (scale, bias); {received(pair)}.")
        scale, bias = (np.asarray(value, Wide) for value in pair)
        for value in (scale, bias):
            lead = len(shape) - value.ndim
            if lead < 0 or any(size not in (1, shape[lead + axis]) for axis, size in enumerate(value.shape)):
                raise ValueError(
                    f"adjustment must return arrays that broadcast to the inputs' shape {shape}; "
                    f"received shape {value.shape}."
                )
        return scale, bias

    def _update(self, averaged: Moments) -> None:
        options = self.options
        moved = algebra.targets(
            np, averaged, averaged.variance, options.epsilon, options.decay, options.renorm, options.renorm_decay
        )
        for name, target in moved.items():
            old = self.variables[name]
            value = target.value.reshape(old.shape)
            self.variables[name] = (old - algebra.decrement(old, value, target.decay)).astype(old.dtype)
        if options.renorm:
            variance = algebra.inference_variance(np, self.variables["moving_stddev"], options.epsilon)
            self.variables["moving_variance"] = variance.astype(variance.dtype)

    def _initial(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if name in ("moving_stddev", "renorm_stddev"):
            return np.sqrt(self._initial("moving_variance", shape, dtype))
        initial = self._initializers["moving_mean" if name == "renorm_mean" else name]
        return np.array(np.broadcast_to(np.asarray(initial(shape, dtype), dtype), shape))

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Array | None:
        return self.variables[name].astype(Wide).reshape(shape) if name in self.variables else None

    def _sum_to_parameter(self, name: str, value: Array) -> Array | None:
        if name not in self.variables:
            return None
        parameter = self.variables[name]
        reduced = tuple(axis for axis in range(value.ndim) if axis not in self._feature_axes(value.ndim))
        summed: Array = value.sum(axis=reduced).reshape(parameter.shape).astype(parameter.dtype)
        return summed

    def _feature_axes(self, rank: int) -> tuple[int, ...]:
        shift = rank - self._plan.rank  # a view with virtual batches has one axis more
        return tuple(axis + shift for axis in self._plan.axes)

    @property
    def _axis(self) -> int | tuple[int, ...]:
        axis = self.options.axis
        return axis if isinstance(axis, int) else tuple(axis)

    @property
    def _plan(self) -> Geometry:
        assert self._geometry is not None
        return self._geometry


def _check_shape(name: str, value: Array, plan: Geometry) -> None:
    if value.shape != plan.parameter_shape:
        raise ValueError(f"{name} must have shape {plan.parameter_shape}; received shape {value.shape}.")


def _floating(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    # NumPy does not count bfloat16, which other packages bring, among its own floating types.
    if not (np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"):
        raise TypeError(f"{name} must be of a floating-point type; received {dtype.name}.")
    return dtype


def _initializer(name: str, initializer: Initializer) -> Callable[[tuple[int, ...], Any], npt.ArrayLike]:
    if callable(initializer):
        return initializer
    if isinstance(initializer, str):
        known: dict[str, Callable[[tuple[int, ...], Any], Array]] = {"zeros": np.zeros, "ones": np.ones}
        if initializer not in known:
            raise ValueError(f"{name} must be a function, an array, 'zeros' or 'ones'; {received(initializer)}.")
        return known[initializer]
    value = np.asarray(initializer)
    if value.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a function, an array, 'zeros' or 'ones'; {received(initializer)}.")
    return lambda shape, dtype: value


def _function(name: str, function: Any) -> Any:
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be None or a function of an array; {received(function)}.")
    return function


def _sum_to(value: Array, shape: tuple[int, ...]) -> Array:
    """Sum what broadcasting has repeated, so that a gradient has the shape of what it belongs to."""
    lead = value.ndim - len(shape)
    repeated = tuple(lead + axis for axis, size in enumerate(shape) if size == 1)
    summed: Array = value.sum(axis=(*range(lead), *repeated)).reshape(shape)
    return summed
