"""What counts, and uneven virtual batches, on the kernels: against loops in float64 and the composed layer."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from batchnorm.jax import batch_norm, init, primitives
from tests.oracle import Oracle

from .test_options import EPSILON, LIMITS, NAMES

Array = npt.NDArray[Any]
LAYOUTS: dict[str, tuple[tuple[int, ...], int | tuple[int, ...]]] = {
    "table": ((11, 3), -1),
    "features last": ((7, 2, 3, 2), -1),
    "features first": ((7, 3, 2, 2), 1),
    "axes apart": ((7, 2, 3, 2), (1, 3)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, **LIMITS},
    "uneven virtual batches": {"virtual_batch_size": 3},
    "renorm and uneven virtual batches": {"renorm": True, **LIMITS, "virtual_batch_size": 2},
    "renorm and adjustment": {"renorm": True, "adjustment": True},
}
MASKS = ("none given", "all", "some", "one", "nothing", "a group of nothing", "weights")


def masked(kind: str, sizes: tuple[int, ...], rng: np.random.Generator) -> Array | None:
    mask: Array = rng.random(sizes) < {"all": 2.0, "nothing": -1.0}.get(kind, 0.6)
    if kind == "one":
        mask = np.arange(mask.size).reshape(sizes) == 5
    if kind == "a group of nothing":
        mask[::3] = False
    if kind == "weights":
        mask = mask * rng.uniform(0.5, 2.0, sizes)
    return None if kind == "none given" else mask


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_and_gradients_are_those_of_loops_and_of_the_composed_layer(layout: str, option: str) -> None:
    shape, axis = LAYOUTS[layout]
    if "virtual_batch_size" in OPTIONS[option] and layout == "axes apart":
        axis = (2, 3)  # which lie together
    axes = {each % len(shape) for each in (axis if isinstance(axis, tuple) else (axis,))}
    rng, asked, pair = np.random.default_rng(0), dict(OPTIONS[option]), None
    if asked.pop("adjustment", False):
        size = tuple(size if at in axes else 1 for at, size in enumerate(shape))
        pair = rng.uniform(0.5, 1.5, size), rng.uniform(-0.5, 0.5, size)
    oracle = Oracle.build(shape, axis, epsilon=EPSILON, momentum=0.8, **asked, adjustment=pair and (lambda _: pair))
    for value in oracle.variables.values():
        value[...] = rng.uniform(0.7, 1.3, value.shape)
    if "moving_stddev" in oracle.variables:
        oracle.variables["moving_stddev"] = np.sqrt(oracle.variables["moving_variance"] + EPSILON)
    parameters = {"scale": jnp.asarray(oracle.variables["gamma"]), "bias": jnp.asarray(oracle.variables["beta"])}
    statistics = {name: jnp.asarray(oracle.variables[long]) for name, long in NAMES.items() if long in oracle.variables}
    limits = {name: asked[name] for name in LIMITS if name in asked} or None

    @functools.partial(jax.jit, static_argnames="fused")
    def step(x: Any, mask: Any, dy: Any, statistics: Any, fused: bool | None) -> Any:
        def function(x: Any, parameters: Any, pair: Any) -> Any:
            return batch_norm(
                x,
                parameters,
                statistics,
                training=True,
                axis=axis,
                momentum=0.8,
                epsilon=EPSILON,
                renorm_clipping=limits,
                virtual_batch_size=asked.get("virtual_batch_size"),
                adjustment=pair,
                mask=mask,
                fused=fused,
            )

        y, vjp, moved = jax.vjp(function, x, parameters, pair, has_aux=True)
        return y, moved, vjp(dy)

    for kind in MASKS:
        mask = masked(kind, tuple(1 if at in axes else size for at, size in enumerate(shape)), rng)
        weights = None if mask is None else mask.astype(np.float64)
        live = np.ones(shape, bool) if mask is None else np.broadcast_to(mask > 0, shape)
        x, dy = np.where(live, rng.normal(2.0, 1.5, shape), 50.0), rng.normal(size=shape)
        if primitives.available() and kind in ("none given", "all", "weights"):
            text = step.lower(x, mask, dy, statistics, None).as_text()
            assert all(f"@{target}(" in text for target in primitives.TARGETS.values())
        # With gradients everywhere, also where nothing counts.
        found, composed = (step(x, mask, dy, statistics, fused) for fused in (None, False))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(composed), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9, err_msg=kind)
        dy = np.where(live, dy, 0)
        corrections = oracle.corrections(oracle.averages(oracle.moments(x, weights)))
        expected = oracle.gradients(x, dy, corrections, pair, weights)
        y, statistics, (dx, dparameters, _) = step(x, mask, dy, statistics, None)
        np.testing.assert_allclose(y, oracle.train(x, weights), rtol=1e-9, atol=1e-9, err_msg=kind)
        np.testing.assert_allclose(dx, expected.x, rtol=1e-8, atol=1e-9, err_msg=kind)
        np.testing.assert_allclose(dparameters["scale"], expected.gamma, rtol=1e-8, atol=1e-9, err_msg=kind)
        np.testing.assert_allclose(dparameters["bias"], expected.beta, rtol=1e-8, atol=1e-9, err_msg=kind)
        for name, value in statistics.items():
            np.testing.assert_allclose(value, oracle.variables[NAMES[name]], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("size", [None, 3])
def test_a_mapped_axis_of_masks_is_many_calls(size: int | None, fused: bool | None) -> None:
    rng = np.random.default_rng(0)
    x, mask = rng.normal(1.0, 2.0, (4, 7, 5, 3)).astype(np.float32), rng.random((4, 7, 5, 1)) < 0.6
    mask[1] = False
    parameters, statistics = init(3, renorm=True)

    def apart(x: Any, mask: Any) -> Any:
        def loss(x: Any) -> Any:
            y, moved = batch_norm(
                x, parameters, statistics, training=True, mask=mask, virtual_batch_size=size, fused=fused
            )
            return jnp.sum(y**3), (y, moved)

        return jax.grad(loss, has_aux=True)(x)

    for of in (mask, mask.astype(np.float32) / 3, mask[0]):
        axes = (0, 0 if of.ndim == x.ndim else None)
        mapped = jax.jit(jax.vmap(apart, axes))(x, of)
        each = [apart(one, of[i] if axes[1] == 0 else of) for i, one in enumerate(x)]
        right = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        for one, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("axis", [1, -1])
def test_weights_may_be_scaled_and_short_types_count_in_float32(axis: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1.0, 2.0, (40, 3, 50) if axis == 1 else (40, 50, 3)), dtype)
    mask = rng.random((40, 1, 50) if axis == 1 else (40, 50, 1)) < 0.7
    right = batch_norm(x, *init(3), training=True, axis=axis, mask=mask, momentum=0.0)
    wide = np.moveaxis(np.asarray(x, np.float64), axis, -1)[np.squeeze(mask, axis)]
    np.testing.assert_allclose(right[1]["mean"], wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(right[1]["var"], wide.var(0), rtol=1e-5)
    for weights in (
        mask * np.float32(0.1),
        mask * np.float32(10),
        (mask * 3).astype(np.int32),
        jnp.asarray(mask, dtype),
    ):
        found = batch_norm(x, *init(3), training=True, axis=axis, mask=weights, momentum=0.0)
        assert found[0].dtype == dtype
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(
                np.asarray(one, np.float32),
                np.asarray(other, np.float32),
                rtol=float(jnp.finfo(dtype).eps) + 1e-5,
                atol=1e-6,
            )


# ---- What the kernels refuse of who calls them by hand.

VIEW = {"rows": 6, "groups": 1, "span": 1, "features": 3, "inner": 1, "grouped_parameters": 0}
X, THREE, NONE, ONE = (
    np.ones((6, 3), np.float32),
    np.ones(3, np.float32),
    np.ones(0, np.float32),
    np.ones(1, np.float32),
)
FORWARD: dict[str, Array] = {
    "x": X,
    "weights": np.ones(0, bool),
    "factor": THREE,
    "offset": THREE,
    "renorm_mean": NONE,
    "renorm_stddev": NONE,
    "limits": NONE,
}
BACKWARD: dict[str, Array] = {
    "x": X,
    "dy": X,
    "weights": np.ones(0, bool),
    "mean": THREE,
    "variance": THREE,
    "rest": THREE,
    "count": ONE,
    "factor": THREE,
    "r": NONE,
    "d": NONE,
}
RESULTS: dict[str, tuple[Array, ...]] = {
    "forward": (X, THREE, THREE, THREE, ONE, NONE, NONE),
    "backward": (X, THREE, THREE),
}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("forward", {"x": np.ones((6, 3), np.int32)}, "x must be float32, float64, float16 or bfloat16"),
    ("forward", {"rows": 7}, "x must have the size of its view"),
    ("forward", {"rows": 0}, "x must have the size of its view"),
    ("forward", {"groups": 0}, "groups, span, features and inner >= 1"),
    ("forward", {"span": 4}, "rows must be a multiple of span"),
    ("forward", {"groups": 7}, "rows must be at least groups"),
    ("forward", {"groups": 4, "grouped_parameters": 1}, "for groups of parameters"),
    ("forward", {"groups": 2**60}, "fewer than 2**57"),
    ("forward", {"inner": 1.5}, "inner must be an integer"),
    ("forward", {"epsilon": None}, "epsilon is missing"),
    ("forward", {"weights": np.ones(18, bool)}, "weights must have one element for each position"),
    ("forward", {"weights": np.ones(6, np.int32)}, "weights must be booleans"),
    ("forward", {"factor": np.ones(2, np.float32)}, "a statistic must have"),
    ("forward", {"offset": np.ones(3, np.int32)}, "statistics must be float32"),
    ("forward", {"renorm_mean": THREE}, "what renorm needs goes together"),
    ("backward", {"dy": np.ones((5, 3), np.float32)}, "arrays must have the shape and type of x"),
    ("backward", {"count": NONE}, "a statistic must have"),
    ("backward", {"mean": NONE}, "a statistic must have"),
    ("backward", {"r": THREE}, "r and d go together"),
]


def _call(direction: str, changed: dict[str, Any]) -> Any:
    results = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in RESULTS[direction]]
    known = {name: np.int64(value) for name, value in VIEW.items()} | {"epsilon": np.float64(1e-3)}
    operands = dict(FORWARD if direction == "forward" else BACKWARD)
    for name, value in changed.items():
        if name in operands:
            operands[name] = value
        elif value is None:
            del known[name]
        else:
            known[name] = np.float64(value) if isinstance(value, float) else np.int64(value)
    return jax.block_until_ready(jax.ffi.ffi_call(primitives.TARGETS[direction], results)(*operands.values(), **known))


@pytest.mark.skipif(not primitives.available(), reason="the kernels were not built")
def test_the_kernels_refuse_what_does_not_fit() -> None:
    for direction in RESULTS:
        _call(direction, {})
    for direction, changed, message in BAD:
        with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
            _call(direction, changed)
