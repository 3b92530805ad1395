"""Who computes a training step on which backend of Keras: the one place that knows them apart.

Each backend has its kernels, as this package has them for that framework, and its array namespace. `serves` tells
whether the kernels can compute a step, `forward` has them do it, and gives what averages move to, by feature. `merge`
is what puts the moments of replicas together; `infers` and `inferred` are for an operation of the backend's own that is
quicker in inference than the composed map. Any other backend composes everything of `keras.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

from batchnorm.core import algebra, geometry, normalize, passes
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Pair, Renorm
from batchnorm.core.options import Clipping, Options
from batchnorm.cpu import KERNEL

__all__ = ["BACKEND", "infer", "is_known", "merge", "plan", "train", "upcast", "xp"]

BACKEND: str = keras.backend.backend()
Values = Mapping[str, Any]
Merge = Callable[[Moments], Moments]
xp: Any
"""The array namespace of the backend."""

if BACKEND == "tensorflow":
    import tensorflow as tf

    from batchnorm.tensorflow import namespace as xp
    from batchnorm.tensorflow import operations
    from batchnorm.tensorflow.synchronized import has_replicas
    from batchnorm.tensorflow.synchronized import merge as merge_replicas

    def serves(x: Any, plan: Geometry, epsilon: Any, weights: Any) -> bool:
        """Tell whether the kernels can, as operations of TensorFlow or called by XLA."""
        return _by_position(weights, plan) and operations.serves(x, plan, epsilon)

    def forward(
        x: Any, plan: Geometry, epsilon: float, factor: Any, offset: Any, renorm: Renorm | None, weights: Any
    ) -> tuple[Any, Moments]:
        """Normalize a batch by the kernels."""
        if renorm is not None:  # copies, for the kernel must see the averages of before the step even if it runs later
            renorm = renorm._replace(mean=tf.identity(renorm.mean), stddev=tf.identity(renorm.stddev))
        if weights is None and plan.padding(tuple(x.shape)):
            weights = _ones(x, plan)  # then the operation counts what is in each virtual batch
        given = {"factor": factor, "offset": offset, "renorm": renorm, "weights": weights}
        y, averaged = operations.forward(x, plan, epsilon, **given)
        y.set_shape(x.shape)
        if weights is None:
            averaged = averaged._replace(count=xp.astype(plan.whole.count(xp.shape(x)), averaged.mean.dtype))
        return y, averaged

    def infers(x: Any, plan: Geometry) -> bool:
        """Tell whether TensorFlow's fused operation is the quicker one."""
        return x.dtype == tf.float32 and plan.axes == (plan.rank - 1,) and operations.on_cpu()

    def inferred(x: Any, plan: Geometry, epsilon: float, mean: Any, variance: Any, gamma: Any, beta: Any) -> Any:
        """Normalize by given moments with that; it wants images, and all parameters."""
        image = x if plan.rank == 4 else tf.reshape(x, [-1, 1, 1, x.shape[-1]])
        gamma = tf.ones_like(mean) if gamma is None else gamma
        beta = tf.zeros_like(mean) if beta is None else beta
        given = {"x": image, "scale": gamma, "offset": beta, "mean": mean, "variance": variance}
        y = tf.raw_ops.FusedBatchNormV3(**given, epsilon=epsilon, is_training=False).y
        return tf.ensure_shape(y if plan.rank == 4 else tf.reshape(y, tf.shape(x)), x.shape)

    def is_known(x: Any) -> bool:
        """Tell whether values can be looked at."""
        return bool(tf.executing_eagerly())

    def merge(x: Any) -> Merge | None:
        """Those of `tf.distribute`."""
        return merge_replicas if has_replicas() else None

elif BACKEND == "torch":
    import torch

    from batchnorm.torch import autograd, cpu, layout, operators
    from batchnorm.torch import namespace as xp
    from batchnorm.torch.synchronized import replicas

    def serves(x: Any, plan: Geometry, epsilon: Any, weights: Any) -> bool:
        """Tell whether the kernels can; they know no transformations of `torch.func`."""
        known = x.numel() > 0 and not layout.is_transformed() and not layout.is_exported()
        return known and _by_position(weights, plan) and cpu.serves(x, plan, layout.is_traced())

    def forward(
        x: Any, plan: Geometry, epsilon: float, factor: Any, offset: Any, renorm: Renorm | None, weights: Any
    ) -> tuple[Any, Moments]:
        """Normalize a batch by the kernels: eagerly as functions, in a graph as operators."""
        static = cpu.Static(epsilon, plan.axes, plan.virtual_batch_size, zeroed=False)
        if layout.is_traced():
            y, moments, counts = operators.forward(x, factor, offset, renorm, weights, static)
        else:
            old, limits = (None, None) if renorm is None else (renorm[:2], cpu.limits(renorm.clipping))
            call = autograd.Call(static, plan, old, limits, weights, averages=None, replicas=None)
            y, moments, counts, _ = autograd.forward(x, factor, offset, None, call)
        count = plan.count(plan.split(x.shape)) if counts is None else counts[0].unsqueeze(1)
        return y, normalize.average(xp, Moments(moments[0], moments[1], count), 0)

    def infers(x: Any, plan: Geometry) -> bool:
        """Tell whether PyTorch's operator can."""
        return len(plan.axes) == 1 and plan.rank > 1 and plan.feature_sizes != (0,)

    def inferred(x: Any, plan: Geometry, epsilon: float, mean: Any, variance: Any, gamma: Any, beta: Any) -> Any:
        """Normalize by given moments with that, which wants features on the second axis."""
        (axis,) = plan.axes
        y = torch.nn.functional.batch_norm(x.movedim(axis, 1), mean, variance, gamma, beta, False, 0.0, epsilon)
        return y.movedim(1, axis)

    def is_known(x: Any) -> bool:
        """Tell whether values can be looked at, at no cost."""
        return bool(x.is_cpu and layout.is_eager())

    def merge(x: Any) -> Merge | None:
        """Those of the process group of `torch.distributed`."""
        found = replicas(x, synchronized=True, group=None)
        return None if found is None else found.merge

elif BACKEND == "jax":
    from batchnorm.jax import namespace as xp
    from batchnorm.jax import primitives

    def serves(x: Any, plan: Geometry, epsilon: Any, weights: Any) -> bool:
        """Tell whether the primitives can, which compose what is not for one CPU."""
        return primitives.serves(x, plan, weights)

    def forward(
        x: Any, plan: Geometry, epsilon: float, factor: Any, offset: Any, renorm: Renorm | None, weights: Any
    ) -> tuple[Any, Moments]:
        """Normalize a batch by the kernels, or what they stand for where the program is for several devices."""
        given = {"factor": factor, "offset": offset, "renorm": renorm, "weights": weights}
        return primitives.forward(x, plan, epsilon, **given)

    def infers(x: Any, plan: Geometry) -> bool:
        """There is nothing quicker than the composed map, which XLA fuses."""
        return False

    def is_known(x: Any) -> bool:
        """Tell whether values can be looked at: a program of JAX knows them only when it runs."""
        return False

    def merge(x: Any) -> Merge | None:
        """A batch is one array, whatever devices it is on, and so the moments are those of all of it."""
        return None

else:
    from . import namespace as xp

    def serves(x: Any, plan: Geometry, epsilon: Any, weights: Any) -> bool:
        """There are no kernels."""
        return False

    def forward(
        x: Any, plan: Geometry, epsilon: float, factor: Any, offset: Any, renorm: Renorm | None, weights: Any
    ) -> tuple[Any, Moments]:
        """There are no kernels."""
        raise NotImplementedError

    def infers(x: Any, plan: Geometry) -> bool:
        """There is no other operation."""
        return False

    def is_known(x: Any) -> bool:
        """Tell whether values can be looked at."""
        return False

    def merge(x: Any) -> Merge | None:
        """There are no replicas."""
        return None


def plan(shape: Any, axis: int | tuple[int, ...], virtual_batch_size: int | None) -> Geometry:
    """Work out the geometry; without its cache where that would be traced into a graph, or sizes are no ints."""
    if BACKEND == "torch" and layout.is_recorded():  # where they are tensors
        with layout.known_sizes():
            shape = [int(size) for size in shape]
    sizes = tuple(size if isinstance(size, int) else None for size in shape)
    make: Callable[..., Geometry] = geometry.plan
    if BACKEND == "torch" and torch.compiler.is_compiling():
        sizes, make = tuple(shape), geometry.plan.__wrapped__
    return make(sizes, axis, virtual_batch_size)


def train(
    x: Any,
    plan: Geometry,
    options: Options,
    clipping: Clipping,
    values: Values,
    adjustment: Pair | None,
    by_feature: bool,
    weights: Any,
    merge: Merge | None,
) -> tuple[Any, Moments, str]:
    """Normalize by the batch.

    Args:
        x: The batch, of a floating-point type.
        plan: Its geometry.
        options: What the layer was asked for.
        clipping: Limits of renorm's correction, as they are at this step.
        values: Parameters and averages of the layer, by name.
        adjustment: a and b, or None.
        by_feature: Whether these have one value for each feature.
        weights: How much each value counts, of the rank of x, or None.
        merge: Puts the moments of replicas together, or None.

    Returns:
        The output, in a type of at least the width of x; what averages move to, constants of one value for each
        feature; and the name of who served.
    """
    gamma, beta = values.get("gamma"), values.get("beta")
    renorm = Renorm(values["renorm_mean"], values["renorm_stddev"], clipping) if options.renorm else None
    epsilon = options.epsilon
    if weights is None and plan.group_axis is not None and not isinstance(xp.shape(x)[0], int):
        weights = _ones(x, plan)  # so that virtual batches need not divide a size that is not known yet
    kernel = passes.select(options.fused, {KERNEL: by_feature and merge is None and serves(x, plan, epsilon, weights)})
    if kernel == KERNEL:
        if adjustment is not None:
            adjustment = normalize.by_feature(xp, plan, adjustment)
        factor, offset = normalize.fold(xp, gamma, beta, adjustment)
        y, averaged = forward(x, plan, epsilon, factor, offset, renorm, weights)
    else:
        trained = normalize.train(
            xp,
            upcast(x),
            plan,
            epsilon,
            gamma=gamma,
            beta=beta,
            adjustment=adjustment,
            renorm=renorm,
            weights=weights,
            merge=merge,
        )
        y, averaged = trained.y, trained.averaged
    averaged = algebra.reshaped(xp, averaged, plan.whole.parameter_shape)
    mean, variance = xp.stop_gradient(averaged.mean), xp.stop_gradient(averaged.variance)
    return y, Moments(mean, variance, averaged.count), kernel


def infer(x: Any, plan: Geometry, options: Options, values: Values) -> Any:
    """Normalize by the moving averages, with operations of the backend, so that exported models need no other."""
    names = ("moving_mean", "moving_variance", "gamma", "beta")
    given = [None if values.get(name) is None else upcast(values[name], x) for name in names]
    if options.fused is not False and infers(x, plan):
        return inferred(x, plan, options.epsilon, *given)
    mean, variance, gamma, beta = given
    return normalize.infer(xp, upcast(x), plan, options.epsilon, mean, variance, gamma=gamma, beta=beta)


def upcast(value: Any, x: Any = None) -> Any:
    """An array in the type of the arithmetic on it, or on a batch x: float32 or wider."""
    dtype = keras.backend.standardize_dtype((value if x is None else x).dtype)
    return keras.ops.cast(value, dtype if dtype == "float64" else "float32")  # Keras promotes these two to float32


def _ones(x: Any, plan: Geometry) -> Any:
    """A mask of everything."""
    return xp.ones_like(x[tuple(slice(0, 1 if axis in plan.axes else None) for axis in range(plan.rank))]) > 0


def _by_position(weights: Any, plan: Geometry) -> bool:
    """Tell whether weights are of positions, the same for all features."""
    return weights is None or all(weights.shape[axis] == 1 for axis in plan.axes)
