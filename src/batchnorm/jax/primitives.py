"""The CPU kernels as primitives of JAX, with derivatives of every kind and order.

Three primitives have a composed meaning, made of `batchnorm.core`, and two of them the kernels as their lowering for
CPUs. Who serves is decided where a program is lowered, for only there is it known on what it runs: a kernel serves one
device, or each device of a `shard_map`; a program that XLA partitions gets the composed form, of which it gathers
nothing.

Forward gives y and its moments, which are constants to every derivative; y's tangent is Tangent, linear in its last
three operands, whose transpose is Backward; and the other way round. So reverse mode runs on the kernels, and whatever
goes further differentiates the composed form.

Operands may have `lead` axes in front, each of which is a batch of calls: they come of `vmap`. An operand that is
absent has no elements.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from batchnorm import cpu
from batchnorm.core import algebra, normalize
from batchnorm.core.algebra import Correction, Moments
from batchnorm.core.geometry import Geometry, View
from batchnorm.core.normalize import Renorm, Trained
from batchnorm.core.options import Clipping

from . import namespace as xp

__all__ = ["TARGETS", "available", "forward", "gather", "serves"]

Array = Any
Arrays = list[Any]
TARGETS = {"forward": "batchnorm_forward", "backward": "batchnorm_backward"}


class Saved(NamedTuple):
    """What of a forward pass a derivative wants; its moments are mean + rest and variance, of count values."""

    x: Array
    weights: Array
    mean: Array
    variance: Array
    rest: Array
    count: Array
    factor: Array
    r: Array
    d: Array


def serves(x: Array, plan: Geometry, weights: Array | None = None) -> bool:
    """Tell whether the primitives can express a training step on an array, under weights of positions."""
    return (
        x.size > 0
        and x.dtype.name in cpu.TYPES
        and plan.view(x.shape) is not None
        and (weights is None or all(weights.shape[axis] == 1 for axis in plan.axes))
    )


def forward(
    x: Array,
    plan: Geometry,
    epsilon: float,
    *,
    factor: Array | None,
    offset: Array | None,
    renorm: Renorm | None,
    weights: Array | None,
) -> tuple[Array, Moments]:
    """Normalize a batch in training.

    Args:
        x: The batch.
        plan: Its geometry, which `serves`.
        epsilon: Added to the variance.
        factor: One value for each feature, or None.
        offset: Likewise.
        renorm: What renorm corrects by, from before this step, or None.
        weights: Which positions count, of the rank of x with size 1 on the feature axes: booleans, or real weights,
            constants to derivatives; or None.

    Returns:
        The output, and what averages move to, with one value for each feature.
    """
    dtype = xp.accumulation_dtype(x.dtype)

    def flat(value: Array | None) -> Array:
        return jnp.zeros(0, dtype) if value is None else jnp.asarray(value, dtype).reshape(-1)

    limits = jnp.zeros(0, dtype)
    if renorm is not None:
        limits = jnp.stack([jnp.asarray(limit, dtype).reshape(()) for limit in renorm.clipping.limits])
    mean, stddev = (None, None) if renorm is None else (renorm.mean, renorm.stddev)
    weighed = jnp.zeros(0, bool) if weights is None else weights if weights.dtype == bool else weights.astype(dtype)
    operands = _varying([x, weighed, flat(factor), flat(offset), flat(mean), flat(stddev), limits])
    y, group_mean, variance, rest, found, _, _ = _forward_p.bind(*operands, plan=plan, epsilon=epsilon, lead=0)
    alike = weights is None and not plan.padding(x.shape)
    count = plan.count(plan.split(x.shape)) if alike else found[:, None]
    moments = Moments(group_mean, variance, count, rest)
    return y, algebra.average_groups(xp, moments, 0 if plan.group_axis is not None else None)


# ---- The composed meaning.


def _present(value: Array) -> Array | None:
    return value if value.size else None


def _composed_forward(
    x: Array,
    weights: Array,
    factor: Array,
    offset: Array,
    renorm_mean: Array,
    renorm_stddev: Array,
    limits: Array,
    *,
    plan: Geometry,
    epsilon: float,
) -> Arrays:
    dtype = xp.accumulation_dtype(x.dtype)
    renorm = None
    if limits.size:
        renorm = Renorm(renorm_mean, renorm_stddev, Clipping(*(limits[i] for i in range(3))))
    trained = normalize.train(
        xp,
        x.astype(dtype),
        plan,
        epsilon,
        gamma=_present(factor),
        beta=_present(offset),
        renorm=renorm,
        weights=_present(weights),
    )
    view = _view(x.shape, plan)
    mean, variance, count, rest, _ = trained.moments
    moments = [
        jnp.reshape(value, (view.groups, view.features)) for value in (mean, variance, rest * jnp.ones_like(mean))
    ]
    counts = jnp.broadcast_to(jnp.asarray(count, dtype).reshape(-1), view.virtual_batches)
    correction = trained.correction or (jnp.zeros(0, dtype), jnp.zeros(0, dtype))
    return [trained.y.astype(x.dtype), *moments, counts, *(value.reshape(-1) for value in correction)]


def _composed_y(
    x: Array, weights: Array, factor: Array, offset: Array, r: Array, d: Array, *, plan: Geometry, epsilon: float
) -> Array:
    trained = normalize.train(
        xp,
        x.astype(xp.accumulation_dtype(x.dtype)),
        plan,
        epsilon,
        gamma=_present(factor),
        beta=_present(offset),
        correction=(r, d) if r.size else None,
        weights=_present(weights),
    )
    return trained.y.astype(x.dtype)


def _composed_tangent(*operands: Array, **static: Any) -> Arrays:
    *values, tx, tfactor, toffset = operands
    saved = Saved(*values)

    def y(x: Array, factor: Array, offset: Array) -> Array:
        return _composed_y(x, saved.weights, factor, offset, saved.r, saved.d, **static)

    return [jax.jvp(y, (saved.x, saved.factor, jnp.zeros_like(toffset)), (tx, tfactor, toffset))[1]]


def _composed_backward(*operands: Array, plan: Geometry, epsilon: float, with_offset: bool) -> Arrays:
    """The gradients by their formulas, from the moments as they are."""
    *values, dy = operands
    saved = Saved(*values)
    x, r = saved.x, saved.r
    dtype, weights = xp.accumulation_dtype(x.dtype), _present(saved.weights)
    shape = plan.view_shape
    if plan.group_axis is not None:
        shape = (1, saved.mean.shape[0], *shape[2:])
    mean, variance, rest = (value.reshape(shape) for value in (saved.mean, saved.variance, saved.rest))
    count = saved.count.reshape([size if axis == plan.group_axis else 1 for axis, size in enumerate(shape)])
    moments = Moments(mean, variance, count, rest)
    correction = Correction(*(value.reshape(plan.view_shape) for value in (r, saved.d))) if r.size else None
    centered = normalize.centered(xp, x.astype(dtype), plan, moments, weights)
    gradients = normalize.train_gradient(
        xp,
        dy.astype(dtype),
        Trained(None, moments, moments, correction, centered),
        plan,
        epsilon,
        gamma=_present(saved.factor),
        beta=mean if with_offset else None,
        weights=weights,
    )
    nothing = jnp.zeros(0, dtype)
    return [
        gradients.x.astype(x.dtype),
        nothing if gradients.gamma is None else gradients.gamma.reshape(-1),
        nothing if gradients.beta is None else gradients.beta.reshape(-1),
    ]


def _differentiable_backward(*operands: Array, with_offset: bool, **static: Any) -> Arrays:
    """The same as a function of x alone, of which the moments are functions."""
    *values, dy = operands
    saved = Saved(*values)
    x = saved.x
    offset = jnp.zeros(_view(x.shape, static["plan"]).parameters if with_offset else 0, xp.accumulation_dtype(x.dtype))

    def y(x: Array, factor: Array, offset: Array) -> Array:
        return _composed_y(x, saved.weights, factor, offset, saved.r, saved.d, **static)

    return list(jax.vjp(y, x, saved.factor, offset)[1](dy))


def _view(shape: Sequence[int], plan: Geometry) -> View:
    view = plan.view(shape)
    assert view is not None
    return view


# ---- The kernels.


@functools.cache
def available() -> bool:
    """Tell whether there are kernels that this JAX can run; the first call registers them with XLA.

    Not at import, and after the CPU's backend: XLA checks at once then, and a refusal is an exception here and not the
    failure of the first operation of the user's program.
    """
    path = cpu.binding("xla")
    if path is None:
        return False
    try:
        jax.devices("cpu")
        library = ctypes.CDLL(path)
        for name in TARGETS.values():
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        cpu.share_threads(path)  # its pool is its own
    except Exception as error:
        warnings.warn(
            f"batchnorm: this jaxlib does not take the CPU kernels, so XLA computes everything: {error}", stacklevel=2
        )
        return False
    return True


def _is_alone(context: Any) -> bool:
    """Tell whether what is lowered runs on one device, with all that it means there.

    JAX promises none of these attributes: where one is missing, the composed form is right whatever holds.
    """
    module = context.module_context
    if getattr(getattr(module, "lowering_parameters", None), "for_export", False):
        return False  # jax.export refuses custom calls
    axes = module.axis_context
    mesh = getattr(axes, "mesh", None)
    if mesh is not None and hasattr(axes, "manual_axes"):  # shard_map
        return mesh.size == 1 or frozenset(mesh.axis_names) == frozenset(axes.manual_axes)
    return getattr(axes, "num_devices", None) == 1


def _call(direction: str, operands: Sequence[Array], results: Any, plan: Geometry, epsilon: float, lead: int) -> Any:
    x = operands[0]
    view = _view(x.shape[lead:], plan)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    call = jax.ffi.ffi_call(TARGETS[direction], shapes)  # dx where dy was would have XLA copy a dy that is needed still
    numbers = {name: np.int64(value) for name, value in view._asdict().items()}
    return call(*operands, epsilon=np.float64(epsilon), **numbers)


def _kernel_forward(*operands: Array, plan: Geometry, epsilon: float, lead: int) -> Arrays:
    x, renorm_mean = operands[0], operands[4]
    dtype, view, front = xp.accumulation_dtype(x.dtype), _view(x.shape[lead:], plan), x.shape[:lead]
    statistics = ((*front, view.groups, view.features), dtype)
    count, correction = ((*front, view.virtual_batches), dtype), (renorm_mean.shape, dtype)
    results = [(x.shape, x.dtype), *[statistics] * 3, count, correction, correction]
    return list(_call("forward", operands, results, plan, epsilon, lead))


def _kernel_backward(*operands: Array, plan: Geometry, epsilon: float, lead: int, with_offset: bool) -> Arrays:
    x, *saved, dy = operands
    dtype, factor = xp.accumulation_dtype(x.dtype), Saved(x, *saved).factor
    offset = (*x.shape[:lead], _view(x.shape[lead:], plan).parameters if with_offset else 0)
    results = [(x.shape, x.dtype), (factor.shape, dtype), (offset, dtype)]
    return list(_call("backward", (x, dy, *saved), results, plan, epsilon, lead))


# ---- The primitives.


def _batched(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """A function of single calls over operands with axes in front."""

    @functools.wraps(function)
    def over(*operands: Array, lead: int, **static: Any) -> Arrays:
        mapped = functools.partial(function, **static)
        for _ in range(lead):
            mapped = jax.vmap(mapped)
        return mapped(*operands)

    return over


def _primitive(name: str, composed: Callable[..., Arrays], kernel: Callable[..., Arrays] | None = None) -> Primitive:
    primitive = Primitive(f"batchnorm_{name}")
    primitive.multiple_results = True
    composed = _batched(composed)

    @functools.cache
    def compiled(**static: Any) -> Callable[..., Arrays]:
        jitted: Callable[..., Arrays] = jax.jit(functools.partial(primitive.bind, **static))
        return jitted

    @primitive.def_impl
    def _(*operands: Array, **static: Any) -> Arrays:
        return compiled(**static)(*operands)

    @functools.lru_cache(maxsize=1024)
    def abstract(avals: tuple[Any, ...], **static: Any) -> Arrays:
        return list(jax.make_jaxpr(functools.partial(composed, **static))(*avals).out_avals)

    # Traced, so that what an abstract value has besides its shape (its sharding, the axes it varies over) is right.
    @primitive.def_abstract_eval
    def _(*avals: Any, **static: Any) -> Arrays:
        return list(abstract(avals, **static))

    compose = mlir.lower_fun(composed, multiple_results=True)
    mlir.register_lowering(primitive, compose)
    if kernel is not None:
        serve = mlir.lower_fun(kernel, multiple_results=True)

        def lowering(context: Any, *operands: Any, **static: Any) -> Any:
            chosen = serve if _is_alone(context) and available() else compose
            return chosen(context, *operands, **static)

        mlir.register_lowering(primitive, lowering, platform="cpu")

    def batch(operands: Sequence[Array], axes: Sequence[Any], *, lead: int, **static: Any) -> tuple[Arrays, list[int]]:
        size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
        front = [
            jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(operands, axes, strict=True)
        ]
        found = primitive.bind(*front, lead=lead + 1, **static)
        return found, [0] * len(found)

    batching.primitive_batchers[primitive] = batch
    return primitive


_forward_p = _primitive("forward", _composed_forward, _kernel_forward)
_tangent_p = _primitive("tangent", _composed_tangent)
_backward_p = _primitive("backward", _composed_backward, _kernel_backward)
_dense = ad.instantiate_zeros


def _forward_jvp(primals: Sequence[Array], tangents: Sequence[Any], **static: Any) -> tuple[Arrays, Arrays]:
    found = _, mean, variance, rest, count, r, d = _forward_p.bind(*primals, **static)
    x, weights, factor, *_ = primals
    tx, _, tfactor, toffset, *_ = tangents
    saved = Saved(x, weights, mean, variance, rest, count, factor, r, d)
    (ty,) = _tangent_p.bind(*saved, _dense(tx), _dense(tfactor), _dense(toffset), **static)
    return found, [ty, *(ad.Zero(jax.typeof(value).to_tangent_aval()) for value in found[1:])]


def _linear_jvp(primitive: Primitive, composed: Callable[..., Arrays]) -> Callable[..., tuple[Arrays, Arrays]]:
    """The rule of a primitive that is linear in what follows what is saved, and a composed function of that."""

    def rule(primals: Sequence[Array], tangents: Sequence[Any], **static: Any) -> tuple[Arrays, Arrays]:
        n = len(Saved._fields)
        saved, by = Saved(*primals[:n]), Saved(*tangents[:n])
        out = primitive.bind(*primals, **static)
        tangent = primitive.bind(*saved, *map(_dense, tangents[n:]), **static)
        if type(by.x) is ad.Zero and type(by.factor) is ad.Zero:
            return out, tangent

        def of(x: Array, factor: Array) -> Arrays:
            return _batched(composed)(*saved._replace(x=x, factor=factor), *primals[n:], **static)

        _, more = jax.jvp(of, (saved.x, saved.factor), (_dense(by.x), _dense(by.factor)))
        return out, [ad.add_jaxvals(a, b) for a, b in zip(tangent, more, strict=True)]

    return rule


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, **static: Any) -> Arrays:
    n = len(Saved._fields)
    saved, linear = operands[:n], operands[n:]
    offset = linear[2].aval if ad.is_undefined_primal(linear[2]) else linear[2]
    found = _backward_p.bind(*saved, _dense(cotangents[0]), with_offset=offset.size > 0, **static)
    return [None] * n + [
        gradient if ad.is_undefined_primal(operand) else None for gradient, operand in zip(found, linear, strict=True)
    ]


def _backward_transpose(cotangents: Sequence[Any], *operands: Any, with_offset: bool, **static: Any) -> Arrays:
    *saved, _ = operands
    return [None] * len(saved) + list(_tangent_p.bind(*saved, *map(_dense, cotangents), **static))


ad.primitive_jvps[_forward_p] = _forward_jvp
ad.primitive_jvps[_tangent_p] = _linear_jvp(_tangent_p, _composed_tangent)
ad.primitive_jvps[_backward_p] = _linear_jvp(_backward_p, _differentiable_backward)
ad.primitive_transposes[_tangent_p] = _tangent_transpose
ad.primitive_transposes[_backward_p] = _backward_transpose


# ---- The types of `shard_map`.


def _axes(value: Array) -> frozenset[Any]:
    """The axes of a `shard_map` that a value is known to vary over."""
    aval = jax.typeof(value)
    return frozenset(getattr(aval, "vma", None) or getattr(getattr(aval, "mat", None), "varying", None) or ())


def gather(value: Array, axis_name: Any, groups: Any) -> Array:
    """Gather the values of a mapped axis, or of several, along a new axis in front.

    Where a `shard_map` checks which values are the same everywhere, the result is known to be: what follows of it
    needs no specification of its own.
    """
    names = frozenset(axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,))
    same = {}
    if groups is None and names & _axes(value):
        (value,) = _vary([value], names)
        same = {"to": "invarying"}
    return jax.lax.all_gather(value, axis_name, axis_index_groups=groups, **same)


def _varying(arrays: Arrays) -> Arrays:
    """Give all arrays the axes that any of them varies over, as jax.numpy does by itself."""
    return _vary(arrays, frozenset().union(*map(_axes, arrays)))


def _vary(arrays: Arrays, over: frozenset[Any]) -> Arrays:
    return [
        jax.lax.pcast(value, tuple(over - _axes(value)), to="varying") if over - _axes(value) else value
        for value in arrays
    ]
