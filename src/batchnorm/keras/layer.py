"""The layer of Keras 3 with every option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from batchnorm.core import algebra, state
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import REFUSED_WEIGHTS, Geometry
from batchnorm.core.normalize import Pair
from batchnorm.core.options import Clipping, Options, flag, pair

from . import backends, configuration, serialization
from .backends import xp

__all__ = ["BatchNormalization"]

Tensor = Any
Schedule = Callable[[Any], Mapping[str, Any]]
INITIAL = {"moving_stddev": "moving_variance", "renorm_mean": "moving_mean", "renorm_stddev": "moving_variance"}
"""Where renorm's averages begin: at the moving ones, standard deviations at the root of the variance."""
KINDS = {"initializer": initializers, "regularizer": regularizers, "constraint": constraints}
FUNCTIONS = (
    *("beta_initializer", "gamma_initializer", "moving_mean_initializer", "moving_variance_initializer"),
    *("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint"),
)
"""The arguments that Keras knows by name, configuration and object."""


def _option(name: str) -> Any:
    """An option that may be set; what is set is checked, and holds from the next call or compilation on."""

    def read(layer: BatchNormalization) -> Any:
        return getattr(layer.options, name)

    def write(layer: BatchNormalization, value: Any) -> None:
        layer.options = dataclasses.replace(layer.options, **{name: value})

    return property(read, write)


def _fixed(name: str) -> Any:
    """An option on which the variables of a layer depend."""
    return property(lambda layer: getattr(layer.options, name))


@keras.saving.register_keras_serializable("batchnorm", "BatchNormalization")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    r"""`keras.layers.BatchNormalization` with every option of TensorFlow 1's layer, on every backend of Keras 3.

    In training each feature is normalized by the mean m and the biased variance v of its values in the batch, or in
    each virtual batch:

    .. math:: y = \left(\left(\frac{x - m}{\sqrt{v + ε}} r + d\right) a + b\right) γ + β

    with r = 1, d = 0 unless `renorm`, and a = 1, b = 0 unless `adjustment`. In inference, and with
    ``trainable=False``, m and v are the moving averages, and r, d, a and b are left out.

    Without an option it gives what Keras' layer gives, but for rounding. It is a subclass of that, so what looks for
    such layers finds it.

    Args:
        axis: The feature axis, or a list of them.
        momentum: Weight of the old value in the moving averages.
        epsilon: Added to the variance.
        center: Whether there is an offset β.
        scale: Whether there is a scale γ.
        beta_initializer: Initializer of β, a name or an object; so are `gamma_initializer`, `moving_mean_initializer`
            and `moving_variance_initializer`. Renorm's averages begin at the moving ones.
        beta_regularizer: Regularizer of β, or None; so is `gamma_regularizer`.
        beta_constraint: Constraint of β, or None; so is `gamma_constraint`.
        synchronized: Whether moments are those of all replicas together: on TensorFlow those of a strategy, on PyTorch
            those of the process group. On JAX they are in any case. Not with `virtual_batch_size`.
        renorm: Whether to correct by batch renormalization (Ioffe, 2017).
        renorm_clipping: Limits of the correction, a dictionary with any of the keys rmin, rmax and dmax, to numbers or
            scalar tensors; or a function of the number of steps to one, such as `ClippingSchedule`. The number is kept
            in the weight ``steps``.
        renorm_momentum: Weight of the old value in renorm's averages.
        virtual_batch_size: Samples in each virtual batch at most, or None for the whole batch. Sample i of N is in
            virtual batch i mod ⌈N / virtual_batch_size⌉.
        adjustment: Function of the input's shape to a pair (a, b) that broadcasts to the input, applied in training.
        fused: None or True for the kernels of this package where they can serve, False for the backend's operations.
        skip_nonfinite: Whether features with moments that are not finite keep their averages in that step.
        **kwargs: ``name``, ``dtype``, ``trainable``, … of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of any rank with the feature axes.
        training: Whether to normalize by the batch.
        mask: What counts in the moments, booleans or weights that are not negative: of the inputs' shape without the
            last axis, as for Keras' layer, or else without the feature axes, or with size 1 on them. What does not
            count is normalized like the rest.
        update: Whether the averages move in training.

    Attributes:
        kernel: Who served the last step of training: ``"cpu"`` (kernels of this package), or ``"composed"``.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or options that exclude each other.

    References:
        Ioffe & Szegedy, 2015. Ioffe, Batch Renormalization, 2017. Hoffer et al., 2017 (virtual batches).

    >>> layer = BatchNormalization(momentum=0.5, axis=[1, -1], renorm=True, renorm_clipping={"rmax": 3.0})
    >>> y = layer(ops.ones((8, 2, 5, 3)), training=True)
    >>> [(weight.name, tuple(weight.shape)) for weight in layer.weights][:2]
    [('gamma', (1, 2, 1, 3)), ('beta', (1, 2, 1, 3))]
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | Schedule | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[Any], Pair] | None = None,
        fused: bool | None = None,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        super(keras.layers.BatchNormalization, self).__init__(**kwargs)  # past Keras' own, which has fewer options
        schedule = renorm_clipping if callable(renorm_clipping) else None
        self.options = Options(
            axis=axis,
            decay=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            renorm=renorm,
            renorm_clipping=serialization.clipping(None if callable(renorm_clipping) else renorm_clipping),
            renorm_decay=renorm_momentum,
            fused=fused,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            skip_nonfinite=skip_nonfinite,
            synchronized=synchronized,
        )
        self._schedule = schedule
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.supports_masking = True
        self.kernel: str | None = None
        self._generators = serialization.generators(adjustment)
        for name in (*state.VARIABLES, "steps"):
            setattr(self, name, None)

    axis, center, scale, renorm = (_fixed(name) for name in ("axis", "center", "scale", "renorm"))
    momentum, epsilon, renorm_momentum = (_option(name) for name in ("decay", "epsilon", "renorm_decay"))
    virtual_batch_size, adjustment = _option("virtual_batch_size"), _option("adjustment")
    fused, skip_nonfinite = _option("fused"), _option("skip_nonfinite")
    synchronized = _option("synchronized")

    @property
    def renorm_clipping(self) -> dict[str, Any] | Schedule | None:
        """Limits of renorm's correction; what is set holds from the next call or compilation on."""
        return self._schedule or serialization.limits(self.options.renorm_clipping)

    @renorm_clipping.setter
    def renorm_clipping(self, value: Mapping[str, Any] | Schedule | None) -> None:
        if callable(value) and self.built and self.steps is None:
            raise ValueError(
                "renorm_clipping must be a function from the beginning, for its steps are counted in a weight; "
                f"received {value!r} for a layer that is built."
            )
        limits = Clipping() if callable(value) else serialization.clipping(value)
        self.options = dataclasses.replace(self.options, renorm_clipping=limits)
        self._schedule = value if callable(value) else None

    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs of a shape.

        Raises:
            ValueError: If the options do not fit the shape.
        """
        self.compute_output_shape(input_shape)  # which checks the axes, in Keras' words
        plan = self._plan(input_shape)
        for name in state.names(self.options):
            weight = self.add_weight(
                shape=plan.whole.parameter_shape,
                name=name,
                initializer=self._initializer(name),
                regularizer=getattr(self, f"{name}_regularizer", None),
                constraint=getattr(self, f"{name}_constraint", None),
                trainable=name in state.PARAMETERS,
                autocast=False,
            )
            setattr(self, name, weight)
        if self.renorm and self._schedule is not None:
            self.steps = self.add_weight(
                shape=(), dtype="int32", name="steps", initializer="zeros", trainable=False, autocast=False
            )
        self.input_spec = keras.layers.InputSpec(ndim=plan.rank, axes=dict(plan.features))

    def _plan(self, shape: Any) -> Geometry:
        return backends.plan(shape, self.options.feature_axis, self.options.virtual_batch_size)

    def _initializer(self, name: str) -> Any:
        found = getattr(self, f"{INITIAL.get(name, name)}_initializer")
        if name not in INITIAL:
            return found
        if isinstance(found, initializers.Initializer):  # a new one of the same values
            found = found.clone()
        return found if name == "renorm_mean" else _root(found)

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None, update: bool = True
    ) -> Tensor:
        """Normalize a batch, and in training move the averages.

        Args:
            inputs: The batch.
            training: Whether to normalize by the batch.
            mask: What counts.
            update: Whether the averages move in training.

        Returns:
            A tensor of the shape of the inputs, in the layer's type.

        Raises:
            TypeError: For an argument of the wrong type.
            ValueError: If inputs or mask do not fit.
        """
        update = flag("update", update)
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(inputs.dtype)):
            inputs = ops.cast(inputs, self.compute_dtype)
        plan = self._plan(inputs.shape)
        weights = None if mask is None else _weights(mask, inputs, plan)
        values = {name: getattr(self, name).value for name in state.names(self.options)}
        if not (training and self.trainable):
            return ops.cast(backends.infer(inputs, plan, self.options, values), self.compute_dtype)
        adjustment, by_feature = self._adjusted(inputs, plan)
        merge = backends.merge(inputs) if self.synchronized else None
        y, moments, self.kernel = backends.train(
            inputs, plan, self.options, self._limits(), values, adjustment, by_feature, weights, merge
        )
        if update:
            self._move(values, moments)
        return ops.cast(y, self.compute_dtype)

    def _limits(self) -> Clipping:
        """The limits of this step."""
        if self._schedule is None or not self.renorm:
            return serialization.tensors(self.options.renorm_clipping)
        return serialization.clipping(self._schedule(self.steps.value))

    def _adjusted(self, inputs: Tensor, plan: Geometry) -> tuple[Pair | None, bool]:
        """Ask for the adjustment of a batch, and tell whether it has one value for each feature."""
        if self.adjustment is None:
            return None, True
        scale, bias = (ops.convert_to_tensor(value) for value in pair(self.adjustment(ops.shape(inputs))))
        by_feature = plan.check_adjustment((tuple(scale.shape), tuple(bias.shape)), tuple(inputs.shape))
        return (backends.upcast(scale, inputs), backends.upcast(bias, inputs)), by_feature

    def _move(self, values: Mapping[str, Tensor], moments: Moments) -> None:
        """Move the averages, and count the step if one has moved."""
        options = self.options
        moved, moves = algebra.track(
            xp,
            state.averages(values),
            moments,
            options.epsilon,
            rate=options.rate,
            renorm_rate=options.renorm_rate,
            skip_nonfinite=options.skip_nonfinite,
        )
        for name, value in moved.items():
            getattr(self, name).assign(value)
        if self.steps is not None:
            counted = 1 if moves is None else 0 if moves is False else ops.cast(ops.any(moves), "int32")
            self.steps.assign(self.steps.value + counted)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, as Keras saves them; those that Keras' layer may not know only if they matter.

        An adjustment that is not registered with Keras is kept for copies of the layer, and raises ValueError when
        the configuration is saved.
        """
        config: dict[str, Any] = keras.layers.Layer.get_config(self)
        axis = self.options.axis
        config["axis"] = axis if isinstance(axis, int) else list(axis)
        for name in ("momentum", "epsilon", "center", "scale", "synchronized"):
            config[name] = getattr(self, name)
        for name in FUNCTIONS:
            config[name] = KINDS[name.rpartition("_")[2]].serialize(getattr(self, name))
        defaults = {"renorm": False, "renorm_momentum": 0.99, "virtual_batch_size": None, "fused": None}
        for name, default in (defaults | {"skip_nonfinite": False}).items():
            if getattr(self, name) != default:
                config[name] = getattr(self, name)
        if (clipping := self.renorm_clipping) is not None:
            config["renorm_clipping"] = serialization.clipping_config(clipping)
        if self.adjustment is not None:
            config["adjustment"] = serialization.function_config("adjustment", self.adjustment)
        return config

    def load_own_variables(self, store: Any) -> None:
        """Load the weights, also those of a layer with virtual batches that had an axis for them."""
        if len(store.keys()) == len(self.weights):
            shapes = {str(at): weight.shape for at, weight in enumerate(self.weights)}
            store = {name: configuration.shaped(store[name], shape) for name, shape in shapes.items()}
        super().load_own_variables(store)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BatchNormalization:
        """Make a layer of a configuration, of any generation of Keras."""
        config = configuration.read(config)
        if config.get("renorm_clipping") is not None:
            config["renorm_clipping"] = serialization.clipping_of(config["renorm_clipping"])
        if config.get("adjustment") is not None:
            config["adjustment"] = serialization.function_of(config["adjustment"])
        layer: BatchNormalization = super().from_config(config)
        return layer


def _root(initializer: Any) -> Callable[..., Tensor]:
    """The root of what an initializer gives."""

    def initial(shape: Any, dtype: Any = None) -> Tensor:
        return algebra.stddev(xp, initializer(shape, dtype=dtype), 0)

    return initial


def _weights(mask: Tensor, inputs: Tensor, plan: Geometry) -> Tensor:
    """A mask as it broadcasts against a batch: of the inputs' rank, with size 1 on the feature axes if it may be."""
    mask = ops.convert_to_tensor(mask)
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if "complex" in dtype or dtype == "string":
        raise TypeError(f"mask must hold booleans or real numbers; received dtype {dtype}.")
    if dtype != "bool":
        mask = backends.upcast(mask, inputs)
        if backends.is_known(mask) and not bool(ops.all((mask >= 0) & xp.isfinite(mask))):
            raise ValueError(REFUSED_WEIGHTS)
    given, shape = tuple(mask.shape), tuple(inputs.shape)
    sizes = xp.shape(inputs)
    if len(given) == len(shape) - 1 and all(
        size in (1, None) or wanted in (size, None) for size, wanted in zip(given, shape, strict=False)
    ):  # Keras' rule, whatever the feature axes
        mask = ops.expand_dims(mask, -1)
        positions = [1 if axis in plan.axes and size == 1 else sizes[axis] for axis, size in enumerate((*given, 1))]
        mask = xp.broadcast_to(mask, positions)
    elif len(given) in (len(shape), len(shape) - len(plan.axes)):
        plan.mask_shape(given, shape)
        mask = xp.reshape(mask, [1 if axis in plan.axes else size for axis, size in enumerate(sizes)])
    else:
        raise ValueError(
            "The mask provided should be one dimension less than the inputs. Received: "
            f"mask.shape={given}, inputs.shape={shape}"
        )
    return xp.stop_gradient(mask)
