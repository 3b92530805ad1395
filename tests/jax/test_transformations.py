"""Every transformation of JAX over the kernels and their primitives, against the composed layer under the same one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from batchnorm import cpu
from batchnorm.jax import batch_norm, init, primitives

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (4, 8, 3))
SCALE, BIAS = RNG.uniform(0.5, 1.5, 3), RNG.normal(size=3)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True},
    "virtual batches": {"virtual_batch_size": 4},
    "no parameters": {"bare": True},
    "mask, renorm and uneven virtual batches": {
        "mask": RNG.random((8, 1)) < 0.6,
        "renorm": True,
        "virtual_batch_size": 3,
    },
}


def _norm(x: Any, scale: Any, bias: Any, *, fused: bool | None, options: dict[str, Any]) -> Any:
    _, statistics = init(3, renorm="renorm" in options, dtype=x.dtype)
    parameters = {} if "bare" in options else {"scale": scale, "bias": bias}
    limits = {"rmin": 0.5, "rmax": 1.5, "dmax": 0.2} if "renorm" in options else None
    known = {name: options[name] for name in ("mask", "virtual_batch_size") if name in options}
    return batch_norm(x, parameters, statistics, training=True, fused=fused, renorm_clipping=limits, **known)[0]


def _loss(n: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, scale, bias: (n(x, scale, bias) ** 3).sum()


TRANSFORMATIONS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "eager": lambda n: n(X[0], SCALE, BIAS),
    "grad": lambda n: jax.jit(jax.grad(_loss(n), (0, 1, 2)))(X[0], SCALE, BIAS),
    "jvp": lambda n: jax.jvp(n, (X[0], SCALE, BIAS), (X[1], BIAS, SCALE)),
    "hessian": lambda n: jax.hessian(_loss(n), (0, 1))(X[0], SCALE, BIAS),
    "grad of grad": lambda n: jax.grad(lambda x: (jax.grad(_loss(n))(x, SCALE, BIAS) ** 2).sum())(X[0]),
    "grad of jvp": lambda n: jax.grad(lambda s: (jax.jvp(lambda x: n(x, s, BIAS), (X[0],), (X[1],))[1] ** 2).sum())(
        SCALE
    ),
    "jacobians": lambda n: (jax.jacfwd(n)(X[0], SCALE, BIAS), jax.jacrev(n, 1)(X[0], SCALE, BIAS)),
    "vmap of batches": lambda n: jax.jit(jax.vmap(jax.grad(_loss(n), (0, 1)), (0, None, None)))(X, SCALE, BIAS),
    "vmap of parameters": lambda n: jax.vmap(n, (None, 0, None))(X[0], jnp.stack([SCALE, BIAS]), BIAS),
    "vmap of vmap": lambda n: jax.vmap(jax.vmap(n, (0, None, None)), (None, 0, 0))(
        X, jnp.stack([SCALE, BIAS]), jnp.stack([BIAS, SCALE])
    ),
    "vmap of an axis inside": lambda n: jax.vmap(n, (1, None, None), 2)(jnp.swapaxes(X, 0, 1), SCALE, BIAS),
    "scan": lambda n: jax.grad(
        lambda s: jax.lax.scan(lambda carry, x: (n(carry, s, BIAS) + x, None), X[0], X[1:])[0].sum() ** 2
    )(SCALE),
    "checkpoint": lambda n: jax.grad(jax.checkpoint(_loss(n)), (0, 1))(X[0], SCALE, BIAS),
    "donated": lambda n: jax.jit(n, donate_argnums=0)(jnp.array(X[0]), SCALE, BIAS),
    "linearized": lambda n: jax.linearize(n, X[0], SCALE, BIAS)[1](X[1], BIAS, SCALE),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    "option", [pytest.param(name, marks=pytest.mark.slow) if "mask" in OPTIONS[name] else name for name in OPTIONS]
)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformations_give_what_they_give_of_the_composed_layer(transformation: str, option: str) -> None:
    transform = TRANSFORMATIONS[transformation]
    found, right = (
        jax.tree.leaves(transform(functools.partial(_norm, fused=fused, options=OPTIONS[option])))
        for fused in (None, False)
    )
    for one, other in zip(found, right, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fused", [None, False])
def test_derivatives_of_both_modes_and_orders_are_those_of_differences(fused: bool | None) -> None:
    norm = functools.partial(_norm, fused=fused, options={})
    check_grads(norm, (jnp.asarray(X[0]), jnp.asarray(SCALE), jnp.asarray(BIAS)), order=2, modes=("fwd", "rev"))


def test_the_kernels_are_there_where_they_were_built() -> None:
    assert primitives.available() == (cpu.binding("xla") is not None)


@pytest.mark.skipif(not primitives.available(), reason="the kernels were not built")
def test_a_jitted_step_calls_the_kernels_forward_and_backward_once() -> None:
    x = jnp.asarray(X, jnp.float32)

    def calls(fused: bool | None) -> tuple[int, ...]:
        norm = functools.partial(_norm, fused=fused, options={})
        scale, bias = jnp.asarray(SCALE, jnp.float32), jnp.asarray(BIAS, jnp.float32)
        text = jax.jit(jax.vmap(jax.grad(_loss(norm), (0, 1, 2)), (0, None, None))).lower(x, scale, bias).as_text()
        return tuple(text.count(f"@{target}(") for target in primitives.TARGETS.values())

    assert calls(None) == (1, 1)
    assert calls(False) == (0, 0)


@pytest.mark.skipif(not primitives.available(), reason="the kernels were not built")
def test_a_runtime_that_refuses_the_kernels_is_told_of_once_and_xla_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("an unknown version")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    primitives.available.cache_clear()
    try:
        x = jnp.asarray(RNG.normal(size=(7, 3)), jnp.float32)  # of a shape that nothing else has compiled
        with pytest.warns(UserWarning, match="does not take the CPU kernels.*an unknown version"):
            y, _ = batch_norm(x, *init(3), training=True)
        assert not primitives.available()
        np.testing.assert_allclose(y, batch_norm(x, *init(3), training=True, fused=False)[0], atol=1e-6)
    finally:
        primitives.available.cache_clear()


MAPPED: dict[str, tuple[set[str], dict[str, Any]]] = {
    "batches": ({"x"}, {}),
    "parameters": ({"parameters"}, {}),
    "statistics": ({"x", "statistics"}, {}),
    "limits": ({"x", "limits"}, {}),
    "batches and masks": ({"x", "mask"}, {}),
    "batches under one mask": ({"x", "parameters"}, {"mask": "shared"}),
    "masks": ({"mask"}, {}),
    "uneven virtual batches": ({"x", "parameters", "statistics"}, {"virtual_batch_size": 3}),
    "uneven virtual batches and masks": ({"x", "mask"}, {"virtual_batch_size": 3}),
    "axes apart": ({"x", "parameters", "statistics"}, {"axis": (0, 2)}),
    "axes apart and masks": ({"x", "parameters", "mask"}, {"axis": (0, 2)}),
    "axes apart behind positions": ({"x", "parameters"}, {"axis": (1, 3)}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mapped", MAPPED)
def test_a_mapped_axis_is_one_call_of_the_kernels_which_gives_what_a_loop_gives(mapped: str) -> None:
    rng = np.random.default_rng(0)
    names, options = set(MAPPED[mapped][0]), dict(MAPPED[mapped][1])
    shape, axis = (7, 2, 5, 3) if options.get("axis") == (1, 3) else (7, 5, 3), options.get("axis", -1)
    axes = [each % len(shape) for each in (axis if isinstance(axis, tuple) else (axis,))]
    sizes = tuple(shape[each] for each in axes)
    positions = tuple(1 if at in axes else size for at, size in enumerate(shape))
    masked = options.pop("mask", None) == "shared" or "mask" in names

    def values(name: str, size: tuple[int, ...], low: float = 0.5) -> Any:
        return jnp.asarray(rng.uniform(low, low + 1, (4, *size) if name in names else size))

    given = {
        "x": values("x", shape),
        "parameters": {name: values("parameters", sizes) for name in ("scale", "bias")},
        "statistics": {name: values("statistics", sizes) for name in ("mean", "var", "renorm_mean", "renorm_stddev")},
        "limits": {"rmin": 0.8, "rmax": 1.5, "dmax": values("limits", (), 0.1)},
        "mask": values("mask", positions, 0) < 0.6 if masked else None,
    }

    def step(given: dict[str, Any]) -> Any:
        def loss(x: Any, parameters: Any) -> Any:
            y, moved = batch_norm(
                x,
                parameters,
                given["statistics"],
                training=True,
                renorm_clipping=given["limits"],
                mask=given["mask"],
                **options,
            )
            return (y**3).sum(), (y, moved)

        return jax.grad(loss, (0, 1), has_aux=True)(given["x"], given["parameters"])

    where = {
        name: ({"rmin": None, "rmax": None, "dmax": 0} if name == "limits" else 0) if name in names else None
        for name in given
    }
    together = jax.jit(jax.vmap(step, (where,)))
    text = together.lower(given).as_text()
    assert "stablehlo.while" not in text
    if primitives.available():
        assert [text.count(f"@{target}(") for target in primitives.TARGETS.values()] == [1, 1]

    def one(name: str, at: int) -> Any:
        if name not in names:
            return given[name]
        return jax.tree.map(lambda value: value[at] if jnp.ndim(value) else value, given[name])

    alone = jax.jit(step)
    loop = [alone({name: one(name, at) for name in given}) for at in range(4)]
    right = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    for found, expected in zip(jax.tree.leaves(together(given)), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_without_wide_types_everything_is_float32() -> None:
    x = jnp.asarray(X[0])
    assert x.dtype == jnp.float32
    y, statistics = batch_norm(x, *init(3, renorm=True), training=True)
    assert {value.dtype for value in (y, *statistics.values())} == {jnp.dtype(jnp.float32)}


def test_parameters_and_statistics_are_pytrees_that_a_compiled_loop_carries() -> None:
    parameters, statistics = init(3, renorm=True)
    x = jnp.asarray(RNG.normal(size=(5, 16, 3)), jnp.float32)

    def step(statistics: Any, x: Any) -> Any:
        y, statistics = batch_norm(x, parameters, statistics, training=True)
        return statistics, y

    carried, outputs = jax.jit(lambda s: jax.lax.scan(step, s, x))(statistics)
    for each, y in zip(x, outputs, strict=True):
        statistics, right = step(statistics, each)
        np.testing.assert_allclose(y, right, atol=1e-6)
    for name, value in carried.items():
        np.testing.assert_allclose(value, statistics[name], rtol=1e-6)


def test_synchronised_statistics_are_those_of_all_values_under_vmap_with_unequal_counts() -> None:
    x = RNG.normal(3.0, 2.0, (3, 8, 2)).astype(np.float32)
    mask = np.zeros((3, 8, 1), bool)
    mask[0, :5] = mask[2, :7] = True  # of the second nothing counts
    parameters, statistics = init(2)

    def apart(x: Any, mask: Any) -> Any:
        return batch_norm(x, parameters, statistics, training=True, mask=mask, axis_name="i", momentum=0.0)

    def loss(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: (function(x)[0] ** 3 * mask).sum()

    both = jax.vmap(apart, axis_name="i")
    y, moved = both(x, mask)
    whole, right = batch_norm(x, parameters, statistics, training=True, mask=mask, momentum=0.0)
    np.testing.assert_allclose(y, whole, atol=1e-5)
    for name, value in moved.items():
        np.testing.assert_allclose(value, np.broadcast_to(right[name], value.shape), rtol=1e-5)
    gradient = jax.grad(loss(lambda x: both(x, mask)))(x)
    expected = jax.grad(loss(lambda x: batch_norm(x, parameters, statistics, training=True, mask=mask)))(x)
    np.testing.assert_allclose(gradient, expected, atol=1e-4)
