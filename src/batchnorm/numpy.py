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

from . import native
from .core import algebra, geometry, kernels, state
from .core.algebra import Correction, Moments
from .core.geometry import Canonical, Geometry
from .core.options import Clipping, Options, flag, received

__all__ = ["BatchNormalization", "Gradients"]

Array = npt.NDArray[Any]
Initializer = Callable[[tuple[int, ...], Any], npt.ArrayLike] | npt.ArrayLike | str
Pair = tuple[Array, Array]
Wide = np.float64
"""The arithmetic of the composed path, whatever is stored: it is what everything else is measured against."""


class Gradients(NamedTuple):
    """Gradients of one call for what went in; None where the layer has no such input."""

    inputs: Array
    gamma: Array | None
    beta: Array | None
    adjustment: Pair | None


class _View(NamedTuple):
    """How inputs of a shape and type are taken, in training or in inference; worked out once."""

    split: tuple[int, ...]
    canonical: Canonical | None
    kernel: str


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
        fused: None or True for the native kernels where they can serve, False for the composed path, which computes
            in float64 whatever the type, and is what everything else is tested against.
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
        limits = self.options.renorm_clipping
        self._limits = (
            -np.inf if limits.rmin is None else limits.rmin,
            np.inf if limits.rmax is None else limits.rmax,
            np.inf if limits.dmax is None else limits.dmax,
        )
        self._views: dict[tuple[tuple[int, ...], np.dtype[Any], bool], _View] = {}
        self.kernel: str | None = None
        """Name of what served the last call: ``"native"`` or ``"composed"``."""

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
        key = x.shape, x.dtype, bool(training)
        view, plan = self._views.get(key), self._geometry
        first = view is None
        if view is None or plan is None:
            # Whatever can be wrong is found before a variable is made.
            _floating("inputs", x.dtype)
            plan = plan or geometry.plan(x.shape, self._axis, self.options.virtual_batch_size)
            plan.check_input(x.shape)
            split = plan.split(x.shape) if training else x.shape
            canonical = plan.canonical(x.shape) if x.size and _native_type(x.dtype) else None
            if canonical is not None and not training and not canonical.own:  # inference knows no virtual batches
                canonical = canonical._replace(groups=1, span=1)
            serves = native.library is not None and canonical is not None
            view = _View(split, canonical, kernels.select(self.options.fused, {native.KERNEL: serves}))
        adjustment = by_feature = None
        self.kernel = view.kernel
        if training and self.options.adjustment is not None:
            adjustment = self._adjust(x.shape)
            by_feature = _by_feature(adjustment, plan)
            if by_feature is None:
                self.kernel = kernels.COMPOSED
        if self._geometry is None:
            self.build(x.shape, x.dtype)
        if first:
            self._views[key] = view
        if not training:
            return self._infer(x, view.canonical if self.kernel == native.KERNEL else None)
        if self.kernel == native.KERNEL and view.canonical is not None:
            return self._train_native(x, view.canonical, adjustment, by_feature)
        return self._train(x, x.reshape(view.split).astype(Wide), adjustment)

    def _train(
        self, x: Array, view: Array, adjustment: Pair | None
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
            self._update(Moments(*(moment.reshape(plan.parameter_shape) for moment in averaged)))
        gradient = functools.partial(self._train_gradient, x.shape, x.dtype, view, moments, renorm, adjustment, gamma)
        return y, gradient

    def _train_gradient(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        view: Array,
        moments: Moments,
        renorm: Correction | None,
        adjustment: Pair | None,
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

    def _train_native(
        self, x: Array, view: Canonical, adjustment: Pair | None, by_feature: Pair | None
    ) -> tuple[Array, Callable[[npt.ArrayLike], Gradients]]:
        assert native.library is not None
        options, variables = self.options, self.variables
        raw = _raw(x)
        kept = Wide if x.dtype == Wide else np.float32
        y = np.empty_like(raw)
        one = self._plan.parameter_shape
        shape = one if view.groups == 1 or view.own else (view.groups, view.features)
        mean, variance = np.empty(shape, kept), np.empty(shape, kept)
        a, b = by_feature or (None, None)
        r, d = (np.empty(view.parameters, kept) for _ in range(2)) if options.renorm else (None, None)
        native.library.forward(
            *view, raw, y, options.epsilon, variables.get("gamma"), variables.get("beta"), a, b,
            variables.get("renorm_mean"), variables.get("renorm_stddev"),
            *self._limits,
            mean, variance, r, d,
        )  # fmt: skip
        gamma = variables.get("gamma")
        if self.trainable:
            if view.groups == 1 or view.own:
                self._update(Moments(mean, variance))
            else:
                self._update(Moments(mean.mean(axis=0).reshape(one), variance.mean(axis=0).reshape(one)))

        def gradient(dy: npt.ArrayLike) -> Gradients:
            assert native.library is not None
            upstream = _raw(np.asarray(dy, x.dtype).reshape(x.shape))
            dx = np.empty_like(raw)
            dgamma, dbeta = (
                np.empty_like(variables[name]) if name in variables else None for name in ("gamma", "beta")
            )
            da, db = (None, None) if by_feature is None else (np.empty(view.parameters, kept) for _ in range(2))
            native.library.backward(
                *view, raw, upstream, dx, options.epsilon, mean, variance, gamma, r, d, a, b, dgamma, dbeta, da, db
            )
            dadjustment = None
            if adjustment is not None and da is not None and db is not None:
                shape = self._plan.input_shape
                dadjustment = (
                    _sum_to(da.reshape(shape), adjustment[0].shape),
                    _sum_to(db.reshape(shape), adjustment[1].shape),
                )
            return Gradients(dx.view(x.dtype), dgamma, dbeta, dadjustment)

        return y.view(x.dtype), gradient

    def _infer(self, x: Array, view: Canonical | None) -> tuple[Array, Callable[[npt.ArrayLike], Gradients]]:
        epsilon, variables = self.options.epsilon, self.variables
        gamma, beta = variables.get("gamma"), variables.get("beta")
        if view is not None:
            assert native.library is not None
            moments = Moments(variables["moving_mean"], variables["moving_variance"])
            affine = algebra.affine(np, moments, epsilon, gamma=gamma, beta=beta)
            raw = _raw(x)
            y = np.empty_like(raw)
            native.library.scale_shift(*view, raw, y, *affine)
            return y.view(x.dtype), functools.partial(self._infer_gradient, x, dict(variables))
        mean, variance, gamma, beta = (
            self._parameter(name, self._plan.input_shape)
            for name in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        affine = algebra.affine(np, Moments(mean, variance), epsilon, gamma=gamma, beta=beta)
        y = kernels.scale_shift(x.astype(Wide), affine).astype(x.dtype)
        return y, functools.partial(self._infer_gradient, x, dict(variables))

    def _infer_gradient(self, x: Array, variables: dict[str, Array], dy: npt.ArrayLike) -> Gradients:
        shape = self._plan.input_shape
        mean, variance, gamma = (
            variables[name].astype(Wide).reshape(shape) if name in variables else Wide(1)
            for name in ("moving_mean", "moving_variance", "gamma")
        )
        inverse = 1 / algebra.stddev(np, variance, self.options.epsilon)
        upstream = np.asarray(dy, Wide).reshape(x.shape)
        return Gradients(
            (upstream * inverse * gamma).astype(x.dtype),
            self._sum_to_parameter("gamma", upstream * (x.astype(Wide) - mean) * inverse),
            self._sum_to_parameter("beta", upstream),
            None,
        )

    def _correction(self, averaged: Moments) -> Correction:
        shape = self._plan.view_shape
        mean, stddev = (self.variables[name].astype(Wide).reshape(shape) for name in ("renorm_mean", "renorm_stddev"))
        return algebra.correction(np, averaged, mean, stddev, self.options.epsilon, self.options.renorm_clipping)

    def _adjust(self, shape: tuple[int, ...]) -> Pair:
        assert self.options.adjustment is not None
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
        targets = algebra.targets(
            np, averaged, averaged.variance, options.epsilon, options.decay, options.renorm, options.renorm_decay
        )
        for name, target in targets.items():
            old = self.variables[name]
            moved = old - algebra.decrement(old, target.value, target.decay)
            self.variables[name] = moved if moved.dtype == old.dtype else moved.astype(old.dtype)
        if options.renorm:
            variance = algebra.inference_variance(np, self.variables["moving_stddev"], options.epsilon)
            self.variables["moving_variance"] = variance

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


@functools.cache
def _native_type(dtype: np.dtype[Any]) -> bool:
    return dtype.isnative and dtype.name in ("float16", "bfloat16", "float32", "float64")


def _raw(x: Array) -> Array:
    """Lay an array out for the native kernels, which know bfloat16 as unsigned integers."""
    flags = x.flags
    if not (flags.c_contiguous and flags.aligned):
        x = np.require(x, requirements=["C", "A"])
    return x if x.dtype.kind == "f" else x.view(np.uint16)


def _by_feature(adjustment: Pair, plan: Geometry) -> Pair | None:
    """An adjustment with one value for each feature, or None where it varies within a feature."""
    if not all(plan.is_by_feature(value.shape) for value in adjustment):
        return None
    scale, bias = (np.ascontiguousarray(np.broadcast_to(value, plan.input_shape)) for value in adjustment)
    return scale, bias


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
