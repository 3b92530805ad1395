"""Every option against the oracle, in float64: outputs, statistics and gradients over several steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from batchnorm.jax import ClippingSchedule, batch_norm, init, with_renorm, without_renorm
from tests.oracle import Oracle

Array = npt.NDArray[Any]
EPSILON = 1e-3
NAMES = {
    "mean": "moving_mean",
    "var": "moving_variance",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}
LIMITS = {"rmin": 0.6, "rmax": 1.4, "dmax": 0.3}
LAYOUTS: dict[str, tuple[tuple[int, ...], int | tuple[int, ...]]] = {
    "table": ((12, 3), -1),
    "features last": ((6, 2, 3, 2), -1),
    "features first": ((6, 3, 2, 2), 1),
    "axes side by side": ((6, 2, 3, 2), (1, 2)),
    "axes apart": ((6, 2, 3, 2), (1, 3)),
    "axes around the batch": ((2, 6, 3), (0, 2)),
    "three runs of axes": ((2, 3, 2, 3, 2), (0, 2, 4)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True},
    "limited renorm": {"renorm": True, **LIMITS, "renorm_momentum": 0.7},
    "virtual batches": {"virtual_batch_size": 3},
    "uneven virtual batches": {"virtual_batch_size": 4, "renorm": True, **LIMITS},
    "renorm and virtual batches": {"virtual_batch_size": 2, "renorm": True, **LIMITS},
    "adjustment by feature": {"adjustment": "by feature", "renorm": True},
    "adjustment by sample": {"adjustment": "by sample"},
    "mask": {"mask": "booleans", "renorm": True, **LIMITS},
    "mask by feature": {"mask": "by feature"},
    "weights and virtual batches": {"mask": "weights", "virtual_batch_size": 4},
}


def legal() -> list[Any]:
    found = []
    for layout, (_, axis) in LAYOUTS.items():
        for option, asked in OPTIONS.items():
            if layout not in ("table", "axes apart") and option not in ("limited renorm", "renorm and virtual batches"):
                continue
            if not ("virtual_batch_size" in asked and isinstance(axis, tuple) and 0 in axis):
                found.append(pytest.param(layout, option, id=f"{layout}, {option}"))
    return found


def _mask(kind: str, rng: np.random.Generator, shape: tuple[int, ...], axes: set[int]) -> Array:
    sizes = shape if kind == "by feature" else tuple(1 if at in axes else size for at, size in enumerate(shape))
    mask: Array = rng.random(sizes) < 0.7
    return mask * rng.uniform(0.5, 2.0, sizes) if kind == "weights" else mask


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fused", [None, False], ids=["fastest", "composed"])
@pytest.mark.parametrize(("layout", "option"), legal())
def test_steps_and_gradients_are_those_of_the_oracle(layout: str, option: str, fused: bool | None) -> None:
    shape, axis = LAYOUTS[layout]
    axes = {each % len(shape) for each in (axis if isinstance(axis, tuple) else (axis,))}
    asked = dict(OPTIONS[option])
    rng = np.random.default_rng(0)
    kind, masked = asked.pop("adjustment", None), asked.pop("mask", None)
    pair = None
    if kind is not None:
        kept = axes if kind == "by feature" else {0}
        size = tuple(size if at in kept else 1 for at, size in enumerate(shape))
        pair = rng.uniform(0.5, 1.5, size), rng.uniform(-0.5, 0.5, size)
    oracle = Oracle.build(shape, axis, epsilon=EPSILON, momentum=0.8, **asked, adjustment=pair and (lambda _: pair))
    for value in oracle.variables.values():
        value[...] = rng.uniform(0.7, 1.3, value.shape)
    if "moving_stddev" in oracle.variables:
        oracle.variables["moving_stddev"] = np.sqrt(oracle.variables["moving_variance"] + EPSILON)
    parameters = {"scale": jnp.asarray(oracle.variables["gamma"]), "bias": jnp.asarray(oracle.variables["beta"])}
    statistics = {name: jnp.asarray(oracle.variables[long]) for name, long in NAMES.items() if long in oracle.variables}
    limits = {name: asked[name] for name in LIMITS if name in asked} or None

    @jax.jit
    def step(x: Any, parameters: Any, pair: Any, statistics: Any, mask: Any, dy: Any) -> Any:
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
                renorm_momentum=asked.get("renorm_momentum", 0.99),
                virtual_batch_size=asked.get("virtual_batch_size"),
                adjustment=pair,
                mask=mask,
                fused=fused,
            )

        y, vjp, moved = jax.vjp(function, x, parameters, pair, has_aux=True)
        return y, moved, vjp(dy)

    for _ in range(2):
        x, dy = rng.normal(2.0, 1.5, shape), rng.normal(size=shape)
        mask = None if masked is None else _mask(masked, rng, shape, axes)
        weights = None if mask is None else mask.astype(np.float64)
        if mask is not None:  # a gradient where nothing counts is defined with NaN there or not, but not compared
            dy = np.where(mask > 0, dy, 0)
        corrections = oracle.corrections(oracle.averages(oracle.moments(x, weights)))
        expected = oracle.gradients(x, dy, corrections, pair, weights)
        right = oracle.train(x, weights)
        y, statistics, (dx, dparameters, dpair) = step(x, parameters, pair, statistics, mask, dy)
        np.testing.assert_allclose(y, right, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(dx, expected.x, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(dparameters["scale"], expected.gamma, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(dparameters["bias"], expected.beta, rtol=1e-8, atol=1e-9)
        if pair is not None:
            for found, one in zip(dpair, expected.adjustment or (), strict=True):
                np.testing.assert_allclose(found, one, rtol=1e-8, atol=1e-9)
        for name, value in statistics.items():
            np.testing.assert_allclose(value, oracle.variables[NAMES[name]], rtol=1e-9, atol=1e-12, err_msg=name)
    y, same = batch_norm(x, parameters, statistics, training=False, axis=axis, epsilon=EPSILON)
    np.testing.assert_allclose(y, oracle.infer(x), rtol=1e-9, atol=1e-9)
    assert all(same[name] is statistics[name] for name in statistics)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fused", [None, False])
def test_short_types_have_statistics_in_float32(dtype: Any, fused: bool | None) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 1.5, (64, 3)), dtype)
    y, statistics = batch_norm(x, *init(3), training=True, momentum=0.0, fused=fused)
    wide = np.asarray(x, np.float64)
    assert y.dtype == dtype
    assert {value.dtype for value in statistics.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(statistics["mean"], wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics["var"], wide.var(0), rtol=1e-5)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=4 * float(jnp.finfo(dtype).eps))
    assert batch_norm(x, *init(3), training=True, dtype=jnp.float32)[0].dtype == jnp.float32


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("renorm", [False, True])
def test_features_that_are_not_finite_are_skipped_bit_for_bit_and_the_others_move(
    fused: bool | None, renorm: bool
) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    x[3, 1] = np.inf
    parameters, statistics = init(3, renorm=renorm, steps=True)
    _, moved = batch_norm(x, parameters, statistics, training=True, skip_nonfinite=True, fused=fused)
    for name in statistics.keys() - {"steps"}:
        changed = np.asarray(moved[name]) != np.asarray(statistics[name])
        np.testing.assert_array_equal(changed, [True, False, True])
    assert int(moved["steps"]) == 1
    _, same = batch_norm(x * np.nan, parameters, statistics, training=True, skip_nonfinite=True, fused=fused)
    for name, value in statistics.items():
        np.testing.assert_array_equal(same[name], value)
    _, lost = batch_norm(x, parameters, statistics, training=True, fused=fused)
    assert not np.isfinite(np.asarray(lost["var"])[1])


def test_nan_under_a_mask_stays_there_and_under_a_mask_of_nothing_nothing_moves() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 5, 3)).astype(np.float32)
    mask = rng.random((8, 5, 1)) < 0.6
    dirty = np.where(mask, x, np.nan)
    parameters, statistics = init(3, renorm=True, steps=True)

    def loss(x: Any, parameters: Any, mask: Any) -> Any:
        y, moved = batch_norm(x, parameters, statistics, training=True, mask=mask)
        return jnp.sum(jnp.where(mask, y, 0) ** 3), moved

    clean, filled = (jax.grad(loss, (0, 1), has_aux=True)(value, parameters, mask) for value in (x, dirty))
    for found, right in zip(jax.tree.leaves(filled), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(found, right)
    moved = jax.jit(loss)(dirty, parameters, np.zeros_like(mask))[1]
    for name, value in statistics.items():
        np.testing.assert_array_equal(moved[name], value)


def test_a_schedule_of_the_steps_limits_the_correction_and_switches_where_its_ends_are_its_start() -> None:
    switch = ClippingSchedule(2, rmax=3.0, rmax_end=2, dmax=5.0, dmax_end=2)
    x = np.random.default_rng(0).normal(1.0, 2.0, (32, 3)).astype(np.float32)
    parameters, statistics = init(3, renorm=True, steps=True)
    plain = batch_norm(x, *init(3), training=True)[0]
    step = jax.jit(lambda statistics: batch_norm(x, parameters, statistics, training=True, renorm_clipping=switch))
    outputs = []
    for _ in range(3):
        y, statistics = step(statistics)
        outputs.append(y)
    np.testing.assert_allclose(outputs[0], plain, atol=1e-6)
    np.testing.assert_allclose(outputs[1], plain, atol=1e-6)
    assert float(jnp.abs(outputs[2] - plain).max()) > 0.1
    assert int(statistics["steps"]) == 3


def test_nothing_moves_where_no_update_is_asked_for() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    parameters, statistics = init(3, renorm=True)
    y, same = batch_norm(x, parameters, statistics, training=True, update=False)
    moved_y, moved = batch_norm(x, parameters, statistics, training=True)
    np.testing.assert_array_equal(y, moved_y)
    assert all(same[name] is statistics[name] for name in statistics)
    assert float(jnp.abs(moved["mean"] - statistics["mean"]).max()) > 0


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 3)])
def test_batches_of_no_values_or_of_one_give_finite_results(shape: tuple[int, int], fused: bool | None) -> None:
    parameters, statistics = init(shape[1])
    y, moved = batch_norm(np.ones(shape, np.float32), parameters, statistics, training=True, fused=fused)
    np.testing.assert_array_equal(y, np.zeros(shape))
    assert all(bool(jnp.isfinite(value).all()) for value in moved.values())
    if shape[0] == 0:
        for name, value in statistics.items():
            np.testing.assert_array_equal(moved[name], value)


def test_statistics_of_plain_layers_get_renorm_and_lose_it_at_any_depth() -> None:
    plain = {"block": {"norm": {"mean": jnp.ones(2), "var": jnp.full(2, 3.0), "r_max": 3, "d_max": 5, "steps": 7}}}
    found = with_renorm({**plain, "other": jnp.zeros(1)}, epsilon=1.0)
    np.testing.assert_array_equal(found["block"]["norm"]["renorm_mean"], np.ones(2))
    np.testing.assert_array_equal(found["block"]["norm"]["renorm_stddev"], np.full(2, 2.0))
    assert set(found["block"]["norm"]) == {"mean", "var", "renorm_mean", "renorm_stddev", "steps"}
    assert set(without_renorm(found)["block"]["norm"]) == {"mean", "var"}


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_statistics_that_got_renorm_may_be_donated() -> None:
    parameters, statistics = init(3)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    expected = batch_norm(x, parameters, with_renorm(statistics), training=True)[1]
    step = jax.jit(lambda statistics: batch_norm(x, parameters, statistics, training=True)[1], donate_argnums=0)
    for name, value in step(with_renorm(statistics)).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6)


def test_sizes_may_be_ints_of_any_kind() -> None:
    parameters, statistics = init(np.int64(3))  # type: ignore[arg-type]
    assert parameters["scale"].shape == statistics["mean"].shape == (3,)
    assert init([2, 3])[0]["bias"].shape == (2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: init(3.5), TypeError, "features must be an int.*received 3.5"),  # type: ignore[arg-type]
        (lambda: init(-3), ValueError, "features must be an int.*received -3"),
        (lambda: init(3, dtype=np.int32), TypeError, "dtype must be of a floating-point type; received int32"),
        (lambda: init(3, dtype="no type"), TypeError, "dtype must be of a floating-point type; received 'no type'"),
        (lambda: with_renorm({}, epsilon=-1.0), ValueError, "epsilon must be finite and at least 0; received -1.0"),
    ],
)
def test_bad_arguments_of_what_makes_statistics_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


GOOD = np.ones((4, 3), np.float32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": np.ones((4, 3), np.int32)}, TypeError, "x must be of a floating-point type; received int32"),
    ({"training": 0.5}, TypeError, "training must be True or False; received 0.5"),
    ({"axis": 2}, ValueError, r"axis must be in \[-2, 2\)"),
    ({"momentum": 1.5}, ValueError, "momentum must be in"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be finite"),
    ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be None or at least 1"),
    ({"renorm_clipping": {"rmax": -1.0}}, ValueError, "renorm_clipping must have rmin <= rmax"),
    ({"renorm_clipping": ClippingSchedule()}, ValueError, r"statistics must have 'steps'.*\['mean', 'var'\]"),
    ({"adjustment": (np.ones(2), np.ones(3))}, ValueError, "adjustment must be or return arrays that broadcast"),
    ({"adjustment": 3}, ValueError, "adjustment must be or return a pair.*received 3"),
    ({"skip_nonfinite": "no"}, TypeError, "skip_nonfinite must be True or False"),
    ({"update": None}, TypeError, "update must be True or False"),
    ({"mask": np.ones(4, bool)}, ValueError, "mask must broadcast to x"),
    ({"mask": np.ones((4, 1), np.complex64)}, TypeError, "mask must be of booleans or real weights"),
    ({"axis_name": "i", "virtual_batch_size": 2}, ValueError, "cannot be used together"),
    ({"axis_index_groups": [[0]]}, ValueError, "must come with axis_name"),
    ({"dtype": np.int32}, TypeError, "dtype must be of a floating-point type; received int32"),
    ({"dtype": "no type"}, TypeError, "dtype must be of a floating-point type; received 'no type'"),
    ({"parameters": None}, TypeError, "parameters must be a dictionary of arrays; received None"),
    ({"statistics": [1]}, TypeError, r"statistics must be a dictionary of arrays; received \[1\]"),
    ({"parameters": {"scale": [1.0, 1.0, 1.0]}}, TypeError, r"scale must be an array; received \[1.0"),
    ({"parameters": {"scale": np.ones(2)}}, ValueError, r"scale must have shape \(3,\)"),
    ({"statistics": {"mean": np.ones(3)}}, ValueError, "statistics must have 'mean' and 'var'"),
    ({"statistics": {**init(3)[1], "renorm_mean": np.ones(3)}}, ValueError, "'renorm_mean' and 'renorm_stddev'"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_refused_with_what_was_received(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    parameters, statistics = init(3)
    given = {"x": GOOD, "parameters": parameters, "statistics": statistics, "training": True, **changed}
    with pytest.raises(error, match=message):
        batch_norm(**given)
