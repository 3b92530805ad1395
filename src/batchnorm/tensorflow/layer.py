"""``tf.compat.v1.layers.BatchNormalization`` and ``batch_normalization``, complete, on today's TensorFlow."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.util import keras_deps  # nothing public tells what a model is called with

from batchnorm.core import algebra, geometry, normalize, state
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.options import Clipping, Options, pair, received

from . import compute
from . import namespace as xp
from .base import InputSpec, Layer
from .serialization import get, serialize
from .synchronized import check, has_replicas, merge

__all__ = ["BatchNorm", "BatchNormalization", "batch_norm", "batch_normalization"]

v1 = tf.compat.v1

_NEVER_CALLED = (
    "_assign_new_value",
    "_fused_batch_norm",
    "_fused_can_be_used",
    "_no_sync_calculate_mean_and_var",
    "_renorm_correction_and_moments",
    "_support_zero_size_input",
)
"""What the original called and this layer has not."""


def _option(field: str, doc: str, shapes: bool = False) -> Any:
    """A property that is an option; `shapes` tells whether variables depend on it."""
    return property(
        lambda layer: getattr(layer._options, field),
        lambda layer, value: layer._set_option(field, value, shapes),
        doc=doc,
    )


class BatchNormalization(Layer):
    r"""Batch normalization with every option of ``tf.compat.v1.layers.BatchNormalization``.

    In training (``training=True``) each feature is normalized by the mean m and the biased variance v of its values
    in the batch, or in each virtual batch,

    .. math:: y = \left(\left(\frac{x - m}{\sqrt{v + ε}} r + d\right) a + b\right) γ + β,

    with r = 1, d = 0 unless `renorm`, and a = 1, b = 0 unless `adjustment`. In inference m and v are the moving
    averages, and r, d, a and b are left out. 16-bit inputs are computed in float32.

    In a v1 graph the moving averages are updated by the operations in `updates`, which are also in the collection
    UPDATE_OPS: run them with the train op. Eagerly and in ``tf.function`` the call itself updates them.

    Args:
        axis: The feature axis, or a list of them: 1 after a convolution with ``data_format="channels_first"``.
            Several axes are normalized together; the variables then have the rank of the input, with size 1 on the
            other axes.
        momentum: Weight of the old value in the moving averages, in [0, 1]; a number or a scalar tensor.
        epsilon: Added to the variance.
        center: Whether there is an offset `beta`.
        scale: Whether there is a scale `gamma`.
        beta_initializer: A function of shape and dtype, its name or its configuration. So are `gamma_initializer`,
            `moving_mean_initializer` and `moving_variance_initializer`.
        moving_mean_initializer: Also initializes renorm's mean.
        moving_variance_initializer: Its square root also initializes renorm's standard deviation.
        beta_regularizer: Function of beta to a penalty, its name or its configuration. So is `gamma_regularizer`.
        beta_constraint: Projection of beta, for the optimizer. So is `gamma_constraint`.
        renorm: Whether to use batch renormalization, which normalizes in training almost as in inference, so that
            small or uneven batches do little harm.
        renorm_clipping: Dictionary with any of 'rmin', 'rmax' and 'dmax', numbers or scalar tensors or variables,
            that limit r to [rmin, rmax] and d to [-dmax, dmax].
        renorm_momentum: Weight of the old value in the averages that r and d are computed from.
        fused: None or True for the fastest implementation that can serve, False for the composed one. In a graph whose
            `training` is a tensor our kernels serve with True only, so that it loads without this package.
        trainable: Whether gamma and beta are trained and the moving averages updated. It does not switch to
            inference; `training` does.
        virtual_batch_size: Samples in each virtual batch ("ghost batch normalization"); sample i of N is in virtual
            batch i mod (N / virtual_batch_size). It must divide the batch in training. Variables then have one axis
            more, of size 1, at index 1.
        adjustment: Function of the (dynamic) shape of the input to a pair (scale, bias), called in training only; a
            and b above. Both must broadcast to the input. Cannot be used with `virtual_batch_size`.
        name: Name of the layer.
        synchronized: Whether m and v are those of the values of all replicas of ``tf.distribute`` together, by one
            collective forward and one backward; the averages move to them on each. Replicas may have different numbers
            of samples, and none. All must call the layer, equally often. Outside of ``strategy.run`` it means nothing;
            within, it needs eager execution or ``tf.function``. Cannot be used with `virtual_batch_size`.
        **kwargs: As for `Layer`: ``dtype``, ``_scope``, ``_reuse`` and others.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or for options that exclude each other.

    References:
        Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift", 2015. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
        Models", 2017. Hoffer et al., "Train longer, generalize better", 2017 (virtual batches).

    >>> layer = BatchNormalization(momentum=0.5)
    >>> layer(tf.constant([[1.0, 10.0], [3.0, 30.0]]), training=True).numpy().round(2)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.moving_mean.numpy()
    array([ 1., 10.], dtype=float32)
    >>> layer.kernel
    'cpu'
    """

    _default_fused: bool | None = None
    """What `fused` is where it is None; `install` sets it."""

    def __init__(
        self,
        axis: int | list[int] | tuple[int, ...] = -1,
        momentum: Any = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = v1.zeros_initializer(),  # noqa: B008 - the original's signature; stateless
        gamma_initializer: Any = v1.ones_initializer(),  # noqa: B008
        moving_mean_initializer: Any = v1.zeros_initializer(),  # noqa: B008
        moving_variance_initializer: Any = v1.ones_initializer(),  # noqa: B008
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: Any = 0.99,
        fused: bool | None = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[Any], tuple[Any, Any]] | None = None,
        name: str | None = None,
        *,
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        self._options = Options(
            axis=axis,
            decay=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            renorm=renorm,
            renorm_clipping=Clipping.of(renorm_clipping),
            renorm_decay=renorm_momentum,
            fused=self._default_fused if fused is None else fused,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            synchronized=synchronized,
        )
        functions = {
            "beta_initializer": beta_initializer,
            "gamma_initializer": gamma_initializer,
            "moving_mean_initializer": moving_mean_initializer,
            "moving_variance_initializer": moving_variance_initializer,
            "beta_regularizer": beta_regularizer,
            "gamma_regularizer": gamma_regularizer,
            "beta_constraint": beta_constraint,
            "gamma_constraint": gamma_constraint,
        }
        for argument, value in functions.items():
            setattr(self, argument, get(argument, value))
        super().__init__(trainable=trainable, name=name, **kwargs)
        self._geometry: Geometry | None = None
        self.kernel: str | None = None
        """Name of what served the last call: ``"cpu"``, TensorFlow's ``"FusedBatchNormV3"``, or ``"composed"``."""
        self.gamma: Any = None
        self.beta: Any = None
        self.supports_masking = False

    # The options, under the names that the original gave them. What is set counts from the next call on.

    momentum = _option("decay", "Weight of the old value in the moving averages.")
    epsilon = _option("epsilon", "Added to the variance.")
    center = _option("center", "Whether there is an offset.", shapes=True)
    scale = _option("scale", "Whether there is a scale.", shapes=True)
    renorm = _option("renorm", "Whether batch renormalization is used.", shapes=True)
    renorm_momentum = _option("renorm_decay", "Weight of the old value in the averages of renorm.")
    fused = _option("fused", "Whether a fused implementation was asked for.")
    virtual_batch_size = _option("virtual_batch_size", "Samples in each virtual batch.", shapes=True)
    adjustment = _option("adjustment", "The function that gives scale and bias in training.")
    synchronized = _option("synchronized", "Whether the statistics are those of all replicas.")

    @property
    def axis(self) -> int | list[int]:
        """The feature axis or axes, as given."""
        axis = self._options.axis
        return axis if isinstance(axis, int) else list(axis)

    @axis.setter
    def axis(self, value: Any) -> None:
        self._set_option("axis", value, shapes=True)

    @property
    def renorm_clipping(self) -> Mapping[str, Any]:
        """Limits of the correction, those that were given. To change them, set all of them anew."""
        clipping = self._options.renorm_clipping
        limits = {"rmin": clipping.rmin, "rmax": clipping.rmax, "dmax": clipping.dmax}
        return types.MappingProxyType({key: value for key, value in limits.items() if value is not None})

    @renorm_clipping.setter
    def renorm_clipping(self, value: Any) -> None:
        self._set_option("renorm_clipping", Clipping.of(value))

    def _set_option(self, field: str, value: Any, shapes: bool = False) -> None:
        if shapes and self.built:
            raise ValueError(f"{field} cannot change once the variables of {self.name} are made; {received(value)}.")
        self._options = dataclasses.replace(self._options, **{field: value})

    def _set_dtype(self, dtype: Any) -> None:
        super()._set_dtype(dtype)
        if self.compute_dtype is not None and not tf.as_dtype(self.compute_dtype).is_floating:
            raise TypeError(f"dtype must be of a floating-point type; received {self.compute_dtype}.")

    @property
    def _plan(self) -> Geometry:
        if self._geometry is None:
            raise ValueError(f"layer {self.name} has not been built.")
        return self._geometry

    @property
    def _fusible(self) -> bool:
        """Where the original took its fused path: plain batches of rank 4 or 5 with features on axis 1 or last.

        The path shows: the moving variance is then the unbiased one. So the rule must stand, whatever kernel serves.
        """
        options, plan = self._options, self._plan
        return (
            options.fused is not False
            and plan.rank in (4, 5)
            and plan.axes in ((1,), (plan.rank - 1,))
            and not options.renorm
            and options.virtual_batch_size is None
            and options.adjustment is None
            and self.compute_dtype in ("float16", "bfloat16", "float32")
        )

    # Building.

    def build(self, input_shape: Any) -> None:
        """Make the variables for inputs of a shape.

        Raises:
            ValueError: If the options do not fit the shape.
        """
        options = self._options
        plan = self._plan_for(tf.TensorShape(input_shape))
        if self._dtype is None:
            self._set_dtype(tf.float32)
        makers = {
            "gamma": self.gamma_initializer,
            "beta": self.beta_initializer,
            "moving_mean": self.moving_mean_initializer,
            "moving_variance": self.moving_variance_initializer,
            "moving_stddev": self._initial_stddev,
            "renorm_mean": self.moving_mean_initializer,
            "renorm_stddev": self._initial_stddev,
        }
        dtype = xp.accumulation_dtype(tf.as_dtype(self._dtype))
        for name in state.names(options):
            keywords: dict[str, Any] = {}
            if name in state.PARAMETERS:
                keywords = {
                    "regularizer": getattr(self, f"{name}_regularizer"),
                    "constraint": getattr(self, f"{name}_constraint"),
                }
            else:
                keywords = {
                    "trainable": False,
                    "synchronization": tf.VariableSynchronization.ON_READ,
                    "aggregation": tf.VariableAggregation.MEAN,
                }
            with _unpartitioned(self._scope if name not in state.PARAMETERS else None):
                variable = self.add_weight(name, plan.parameter_shape, dtype, makers[name], **keywords)
            setattr(self, name, variable)
        self._geometry = plan
        self._warn_of_overriding()
        self.input_spec = InputSpec(plan.rank, dict(plan.features))
        self.built = True

    def _plan_for(self, shape: Any) -> Geometry:
        if shape.rank is None:
            raise ValueError("inputs must have a known rank; received a tensor of unknown rank.")
        return geometry.plan(tuple(shape.as_list()), self._options.feature_axis, self._options.virtual_batch_size)

    def _initial_stddev(self, shape: Any, dtype: Any = tf.float32, **kwargs: Any) -> Any:
        return algebra.stddev(xp, self.moving_variance_initializer(shape, dtype=dtype, **kwargs), 0)

    # Calling.

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Normalize a batch.

        Args:
            inputs: Tensor of floating-point numbers.
            *args: `training`: Python bool or int, or a scalar boolean tensor such as a placeholder: whether to
                normalize by the batch (and update the moving averages) or by the moving averages. By default what a
                model of `tf_keras` around this call was called with, else the default of `call`, which is False.
            **kwargs: The same by name; ``mask``, as for `call`; ``scope``, a variable scope to build in.

        Returns:
            Tensor of the shape of `inputs`, of the layer's type.

        Raises:
            TypeError: If the inputs are not floating-point numbers, or `training` is not as above.
            ValueError: If the inputs do not fit the options, or the shape that the layer was built for.
        """
        # Whatever can be wrong is found before a variable is made.
        if type(inputs).__name__ == "KerasTensor":  # of which TensorFlow would make a model without our variables
            raise TypeError(
                "inputs must be a tensor; received a symbolic input of Keras, whose functional models take Keras' own "
                f"layers only. A subclass of tf.keras.Model, or tf.keras.Sequential, may hold layer {self.name}."
            )
        inputs = tf.convert_to_tensor(inputs)
        if not inputs.dtype.is_floating:
            raise TypeError(f"inputs must be floating-point numbers; received dtype {inputs.dtype.name}.")
        if self.synchronized:
            check()
        plan = self._geometry or self._plan_for(inputs.shape)
        if inputs.shape.rank is None:
            raise ValueError(f"inputs must have rank {plan.rank}, as built for; received an unknown rank.")
        plan.check_input(inputs.shape.as_list())
        if not args and "training" not in kwargs:
            around = _training_around()
            if around is not None and _accepts(self.call, inputs, training=around):
                kwargs["training"] = around
        if not self._overrides("call", "_get_training_value"):  # a subclass may take other things for training
            if kwargs.get("mask") is not None:
                compute.weights(kwargs["mask"], inputs, plan)
            if _condition(args[0] if args else kwargs.get("training")) is True:
                plan.check_divides(inputs.shape[0])
        return super().__call__(inputs, *args, **kwargs)

    @tf.autograph.experimental.do_not_convert
    def call(self, inputs: Any, training: Any = False, mask: Any = None) -> Any:
        """Normalize a batch; `__call__` is what users call, and `call` what a subclass overrides.

        Args:
            inputs: Tensor of the shape that the layer was built for.
            training: As for `__call__`.
            mask: What counts into the statistics of training, one value for each position: booleans, or weights that
                are not negative; of the inputs' shape without the feature axes, or with size 1 on them. The output is
                normalized everywhere.

        Returns:
            Tensor of the shape of `inputs`, of the layer's type.
        """
        x = tf.cast(inputs, self.compute_dtype)
        training = _condition(self._get_training_value(training))
        if training is False:
            return self._infer(x)
        if training is True:
            self._plan.check_divides(x.shape[0])
        # Outside of any conditional: what the adjustment makes can be used by others, as in the original, and replicas
        # wait for each other whichever branch they take.
        adjustment, by_feature = self._adjust(x)
        measured = self._measured(x, mask)
        weights = None if mask is None or measured is not None else compute.weights(mask, x, self._plan)
        merged = self.synchronized and has_replicas()
        if merged:
            if measured is None:
                measured = normalize.measure(xp, compute.view(x, self._plan), self._plan.reduced_axes, weights)
            measured = merge(measured)
        if training is True:
            y, moments, self.kernel = self._train(x, adjustment, by_feature, measured, weights)
        else:
            served = []

            def train() -> Any:
                y, moments, kernel = self._train(x, adjustment, by_feature, measured, weights, either=True)
                served.append(kernel)
                return y, moments.mean, moments.variance, moments.count * tf.ones_like(moments.mean)

            def infer() -> Any:
                mean = self._read("moving_mean")
                return self._infer(x), mean, self._read("moving_variance"), tf.ones_like(mean)

            y, mean, variance, count = tf.cond(training, train, infer)
            self.kernel = served[-1]
            known = weights is None and not merged
            moments = Moments(mean, variance, self._plan.whole.count(xp.shape(x)) if known else count)
        y.set_shape(inputs.shape)
        self._update(moments, None if training is True else training)
        return y

    def _train(
        self, x: Any, adjustment: Any, by_feature: bool, measured: Moments | None, weights: Any, either: bool = False
    ) -> tuple[Any, Moments, str]:
        return compute.train(
            x,
            self._plan,
            self._options,
            self._read,
            adjustment,
            by_feature,
            self._fusible,
            either=either,
            moments=measured,
            weights=weights,
        )

    def _infer(self, x: Any) -> Any:
        y, self.kernel = compute.infer(x, self._plan, self._options, self._read, self._fusible)
        return y

    def _update(self, moments: Moments, active: Any) -> None:
        """Move the averages; in a graph, record the operations that do."""
        if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
            return  # replicas update; outside of them there is no batch of one's own
        names = [name for name in state.names(self._options) if name not in state.PARAMETERS]
        if v1.executing_eagerly_outside_functions() and not self.trainable:
            # Nothing for inference moves. As in the original, renorm's own averages do, for they serve training.
            names = [name for name in names if name.startswith("renorm")]
        variables = {name: getattr(self, name) for name in names}
        if self._overrides("_assign_moving_average") and not self._averages_are_fused:
            moved = compute.move_by(self._assign, variables, moments, self._options, active, outside=self._fusible)
        else:
            moved = compute.move(variables, moments, self._options, active)
        if not tf.executing_eagerly():
            means = [moved.pop(name) for name in ("moving_mean", "renorm_mean") if name in moved]
            if means:
                # Programs filter by the names that these have in the original.
                last = "AssignNewValue" if self._options.renorm else "AssignMovingAvg"
                self.add_update([_grouped("AssignMovingAvg", means), _grouped(last, list(moved.values()))])

    def _adjust(self, x: Any) -> tuple[tuple[Any, Any] | None, bool]:
        """Ask for the adjustment of a batch, and tell whether it has one value for each feature."""
        adjustment = self._options.adjustment
        if adjustment is None:
            return None, True
        scale, bias = (xp.astensor(value, xp.accumulation_dtype(x.dtype)) for value in pair(adjustment(tf.shape(x))))
        shapes = [None if value.shape.rank is None else value.shape.as_list() for value in (scale, bias)]
        return (scale, bias), self._plan.check_adjustment(shapes, x.shape.as_list())

    def _read(self, name: str) -> Any:
        """Read a variable in the type of all arithmetic; None where there is none."""
        variable = getattr(self, name)
        if variable is None:
            return None
        return tf.cast(tf.convert_to_tensor(variable), xp.accumulation_dtype(tf.as_dtype(self.compute_dtype)))

    # What a subclass may override, under the names of the original, and called where it called them.

    def _get_training_value(self, training: Any = None) -> Any:
        """Decide on `training`."""
        return training

    def _moments(self, inputs: Any, reduction_axes: Any, keep_dims: bool, mask: Any = None) -> tuple[Any, Any]:
        """Measure mean and variance of a batch, in float32 or float64, by virtual batches."""
        hook = self._calculate_mean_and_var
        masked = {"mask": mask} if _accepts(hook, inputs, reduction_axes, keep_dims, mask=mask) else {}
        return hook(inputs, reduction_axes, keep_dims, **masked)

    def _calculate_mean_and_var(
        self, inputs: Any, reduction_axes: Any, keep_dims: bool, mask: Any = None
    ) -> tuple[Any, Any]:
        """What `_moments` calls."""
        if mask is not None:
            raise ValueError(f"mask must be None where moments are measured by hand; {received(mask)}.")
        mean, variance, *_ = normalize.measure(xp, inputs, reduction_axes)
        if keep_dims:
            return mean, variance
        return tf.squeeze(mean, reduction_axes), tf.squeeze(variance, reduction_axes)

    def _assign_moving_average(self, variable: Any, value: Any, momentum: Any, inputs_size: Any = None) -> Any:
        """Move one average to a value."""
        return compute.assign_moving_average(variable, value, momentum)

    def _overrides(self, *names: str) -> bool:
        return any(getattr(type(self), name) is not getattr(BatchNormalization, name) for name in names)

    def _measured(self, x: Any, mask: Any) -> Moments | None:
        """The moments of a batch where a subclass measures them, as its view has them."""
        if self._fusible or not self._overrides("_moments", "_calculate_mean_and_var"):
            return None
        plan = self._plan
        keep_dims = plan.group_axis is not None or len(plan.axes) > 1
        arguments = compute.view(x, plan), list(plan.reduced_axes)
        if mask is not None:
            raise ValueError("mask must be None where a subclass measures the moments; received one.")
        masked = {"mask": None} if _accepts(self._moments, *arguments, keep_dims=keep_dims, mask=None) else {}
        moments = self._moments(*arguments, keep_dims=keep_dims, **masked)
        mean, variance = (value if keep_dims else tf.reshape(value, plan.view_shape) for value in moments)
        return Moments(mean, variance, xp.astype(plan.count(xp.shape(arguments[0])), mean.dtype))

    def _assign(self, variable: Any, value: Any, momentum: Any) -> Any:
        hook = self._assign_moving_average
        size = (None,) if _accepts(hook, variable, value, momentum, None) else ()
        return hook(variable, value, momentum, *size)

    @property
    def _averages_are_fused(self) -> bool:
        """Whether the original moved the averages within its fused operation: eagerly and in ``tf.function``."""
        return (
            self._fusible and v1.executing_eagerly_outside_functions() and isinstance(self._options.decay, numbers.Real)
        )

    def _warn_of_overriding(self) -> None:
        ignored = [name for name in _NEVER_CALLED if hasattr(type(self), name)]
        if self._fusible:
            ignored += [name for name in ("_moments", "_calculate_mean_and_var") if self._overrides(name)]
        if self._averages_are_fused and self._overrides("_assign_moving_average"):
            ignored.append("_assign_moving_average")
        if ignored:
            warnings.warn(
                f"{type(self).__name__} overrides {', '.join(ignored)}, which this layer does not call; "
                "fused=False calls _moments, _calculate_mean_and_var and _assign_moving_average.",
                stacklevel=2,
            )

    # Configuration.

    def get_config(self) -> dict[str, Any]:
        """The arguments of this layer, without its variables; an adjustment cannot be part of it.

        >>> layer = BatchNormalization(axis=[1, 2], renorm=True, renorm_clipping={"rmax": 3.0})
        >>> BatchNormalization.from_config(layer.get_config()).axis
        [1, 2]
        """
        config = {
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
        }
        for parameter in ("beta", "gamma", "moving_mean", "moving_variance"):
            config[f"{parameter}_initializer"] = serialize(getattr(self, f"{parameter}_initializer"))
        for kind in ("regularizer", "constraint"):
            for parameter in ("beta", "gamma"):
                config[f"{parameter}_{kind}"] = serialize(getattr(self, f"{parameter}_{kind}"))
        if self.renorm:
            config |= {
                "renorm": True,
                "renorm_clipping": dict(self.renorm_clipping),
                "renorm_momentum": self.renorm_momentum,
            }
        if self.fused is not None:
            config["fused"] = self.fused
        if self.virtual_batch_size is not None:
            config["virtual_batch_size"] = self.virtual_batch_size
        if self.synchronized:
            config["synchronized"] = True
        if self.adjustment is not None:
            warnings.warn(
                f"the adjustment of layer {self.name} is a function, and is left out of its configuration.",
                stacklevel=2,
            )
        return super().get_config() | config


def batch_normalization(  # noqa: D417 - the other arguments are those of the class
    inputs: Any,
    axis: int | list[int] | tuple[int, ...] = -1,
    momentum: Any = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Any = v1.zeros_initializer(),  # noqa: B008 - the original's signature; stateless
    gamma_initializer: Any = v1.ones_initializer(),  # noqa: B008
    moving_mean_initializer: Any = v1.zeros_initializer(),  # noqa: B008
    moving_variance_initializer: Any = v1.ones_initializer(),  # noqa: B008
    beta_regularizer: Any = None,
    gamma_regularizer: Any = None,
    beta_constraint: Any = None,
    gamma_constraint: Any = None,
    training: Any = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
    renorm: bool = False,
    renorm_clipping: dict[str, Any] | None = None,
    renorm_momentum: Any = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Callable[[Any], tuple[Any, Any]] | None = None,
    *,
    synchronized: bool = False,
) -> Any:
    """Make a `BatchNormalization` layer and apply it, for v1 graphs.

    Each call makes variables of its own, unless `reuse` and `name` (or an enclosing variable scope) say which to use
    again; that needs a graph, so eagerly use the class.

    Args:
        inputs: Tensor of floating-point numbers.
        axis: This and all others are as for `BatchNormalization`, but for these:
        training: Whether to normalize by the batch; Python bool, or a scalar boolean tensor.
        reuse: Whether to use the variables of an earlier layer of the same name; or ``tf.compat.v1.AUTO_REUSE``.

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or for options that exclude each other.

    >>> with tf.Graph().as_default(), v1.Session() as session:
    ...     x = v1.placeholder(tf.float32, [None, 3])
    ...     y = batch_normalization(x, training=True, name="first")
    ...     updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
    ...     [variable.name for variable in v1.trainable_variables()]
    ['first/gamma:0', 'first/beta:0']
    """
    layer = BatchNormalization(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        center=center,
        scale=scale,
        beta_initializer=beta_initializer,
        gamma_initializer=gamma_initializer,
        moving_mean_initializer=moving_mean_initializer,
        moving_variance_initializer=moving_variance_initializer,
        beta_regularizer=beta_regularizer,
        gamma_regularizer=gamma_regularizer,
        beta_constraint=beta_constraint,
        gamma_constraint=gamma_constraint,
        renorm=renorm,
        renorm_clipping=renorm_clipping,
        renorm_momentum=renorm_momentum,
        fused=fused,
        trainable=trainable,
        virtual_batch_size=virtual_batch_size,
        adjustment=adjustment,
        synchronized=synchronized,
        name=name,
        _reuse=reuse,
        _scope=name,
    )
    return layer.apply(inputs, training=training)


class _unpartitioned:  # noqa: N801 - a context manager
    """Statistics are never split, whatever partitioner the variable scope has."""

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        if self._scope is not None:
            self._partitioner = self._scope.partitioner
            self._scope.set_partitioner(None)

    def __exit__(self, *error: Any) -> None:
        if self._scope is not None:
            self._scope.set_partitioner(self._partitioner)


def _training_around() -> Any:
    """What a model of `tf_keras` that this call is within was called with, or None."""
    context = keras_deps.get_call_context_function()
    return None if context is None else context().training


def _accepts(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Tell whether a function can be called so; those of older programs lack the last argument."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _condition(training: Any) -> Any:
    """True, False, or a boolean scalar tensor that is one of them later."""
    if training is None:
        return False
    if tf.is_tensor(training):
        tensor = tf.convert_to_tensor(training)
        if tensor.shape.rank not in (0, None) or not (tensor.dtype.is_bool or tensor.dtype.is_integer):
            raise ValueError(f"training must be a bool or a scalar boolean tensor; {received(training)}.")
        value = tf.get_static_value(tensor)
        return tf.cast(tensor, tf.bool) if value is None else bool(value)
    if isinstance(training, (bool, numbers.Integral, np.bool_)):
        return bool(training)
    raise TypeError(f"training must be a bool or a scalar boolean tensor; {received(training)}.")


def _grouped(name: str, updates: list[Any]) -> Any:
    return tf.group(*(update.op if tf.is_tensor(update) else update for update in updates), name=name)


batch_norm = batch_normalization
BatchNorm = BatchNormalization
