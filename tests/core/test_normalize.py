"""The layer composed of passes and algebra, over every array namespace, against the oracle of loops in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from batchnorm.core import algebra, geometry, normalize
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Renorm
from batchnorm.core.options import Clipping
from batchnorm.numpy import namespace
from tests.oracle import Corrections, Gradients, Oracle, Pair, differences

from .conftest import Arrays

Array = npt.NDArray[Any]
NUMPY = Arrays("numpy", namespace, np.asarray)
EPSILON = 1e-2
LIMITS = {"rmin": 0.7, "rmax": 1.4, "dmax": 0.4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch, and what is asked for: `weights` names one of `WEIGHTS`, `adjustment` gives the shapes of its arrays."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    size: int | None = None
    renorm: dict[str, float] | None = None
    adjustment: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    scale: bool = True
    center: bool = True
    weights: str | None = None
    masked: normalize.Masked = "normalized"
    unbiased: bool = False

    @property
    def plan(self) -> Geometry:
        return geometry.plan(self.shape, self.axis, self.size)

    @property
    def limits(self) -> dict[str, Any]:
        return dict(self.renorm or {})

    def oracle(self) -> Oracle:
        """The oracle, all of its variables drawn."""
        pair = self.pair()
        oracle = Oracle.build(
            self.shape,
            self.axis,
            center=self.center,
            scale=self.scale,
            renorm=self.renorm is not None,
            epsilon=EPSILON,
            virtual_batch_size=self.size,
            adjustment=None if pair is None else lambda shape: pair,
            bessel=self.unbiased,
            masked=self.masked,
            **self.limits,
        )
        rng = np.random.default_rng(2)
        for name, value in oracle.variables.items():
            low, high = (0.3, 2.0) if name.endswith(("variance", "stddev")) else (-1.5, 1.5)
            oracle.variables[name] = rng.uniform(low, high, value.shape)
        return oracle

    def pair(self) -> Pair | None:
        if self.adjustment is None:
            return None
        rng = np.random.default_rng(3)
        return rng.uniform(0.5, 1.5, self.adjustment[0]), rng.uniform(-0.5, 0.5, self.adjustment[1])

    def values(self) -> Array:
        return np.random.default_rng(0).normal(1.0, 2.0, self.shape)

    def own_weights(self) -> Array | None:
        return None if self.weights is None else WEIGHTS[self.weights](self)

    def spoilt(self) -> Array:
        """The batch, with nothing that can be counted on under weight 0."""
        x, weights = self.values(), self.own_weights()
        if weights is None:
            return x
        return np.where(np.broadcast_to(weights, self.shape) > 0, x, np.random.default_rng(4).choice(LOST, self.shape))


LOST = [np.nan, np.inf, -np.inf]


def position_shape(case: Case) -> tuple[int, ...]:
    return tuple(1 if axis in case.plan.axes else size for axis, size in enumerate(case.shape))


def drawn(case: Case) -> Array:
    return np.random.default_rng(5).uniform(-1, 2, position_shape(case))


def by_group(case: Case, weight: float) -> Array:
    """Weights that differ, but for one virtual batch: all of its samples have the same."""
    weights = np.random.default_rng(6).uniform(0.5, 1.5, position_shape(case))
    groups = 1 if case.size is None else math.ceil(case.shape[0] / case.size)
    weights[::groups] = weight
    return weights


def by_value(case: Case) -> Array:
    """Weights for each value, one feature with nothing."""
    weights = np.maximum(np.random.default_rng(7).uniform(-0.5, 2, case.shape), 0)
    weights[tuple(0 if axis in case.plan.axes else slice(None) for axis in range(len(case.shape)))] = 0
    return weights


WEIGHTS: dict[str, Callable[[Case], Array]] = {
    "booleans": lambda case: drawn(case) > 0,
    "numbers": lambda case: np.maximum(drawn(case), 0.0),
    "whole numbers": lambda case: np.maximum(np.round(2 * drawn(case)), 0.0).astype(np.int64),
    "narrow": lambda case: np.maximum(drawn(case), 0.0).astype(np.float32),
    "fractions": lambda case: np.maximum(drawn(case), 0.0) * 1e-3,
    "one group of nothing": lambda case: by_group(case, 0.0),
    "by value, one feature of nothing": by_value,
    "nothing": lambda case: np.zeros(position_shape(case), bool),
    "everything": lambda case: np.ones(position_shape(case), bool),
}

GEOMETRIES: dict[str, dict[str, Any]] = {
    "table": {"shape": (6, 3)},
    "channels last": {"shape": (4, 3, 2)},
    "channels first": {"shape": (4, 3, 2, 2), "axis": 1},
    "the batch's axis": {"shape": (3, 5), "axis": 0},
    "axes side by side": {"shape": (4, 2, 3), "axis": (1, 2)},
    "axes apart": {"shape": (4, 2, 3, 2), "axis": (-1, 1)},
    "every axis": {"shape": (2, 3), "axis": (0, 1)},
    "virtual": {"shape": (6, 2, 3), "size": 2},
    "virtual, axes apart": {"shape": (6, 2, 3, 2), "axis": (1, 3), "size": 3},
    "virtual of 3, 2 and 2": {"shape": (7, 2, 3), "size": 3},
    "virtual of 3, 2 and 2, channels first": {"shape": (7, 3, 2), "axis": 1, "size": 3},
    "virtual of 3, 2 and 2, axes apart": {"shape": (7, 2, 2, 2), "axis": (1, 3), "size": 3},
    "virtual, fewer than one": {"shape": (2, 3), "size": 5},
    "virtual of one sample": {"shape": (4, 2, 3), "size": 1},
    "virtual of one value": {"shape": (3, 3), "size": 1},
    "virtual of 2 values and 1": {"shape": (5, 3), "size": 2},
    "one sample": {"shape": (1, 3)},
    "no sample": {"shape": (0, 3)},
    "no virtual batch": {"shape": (0, 2, 3), "size": 3},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no scale": {"scale": False},
    "neither": {"scale": False, "center": False},
    "renorm": {"renorm": {}},
    "limited renorm": {"renorm": LIMITS},
    "renorm without scale": {"renorm": LIMITS, "scale": False, "center": False},
    "unbiased": {"unbiased": True},
}
ADJUSTED: dict[str, dict[str, Any]] = {
    "by feature": {"shape": (5, 2, 3), "adjustment": ((3,), (1, 1, 3))},
    "by number": {"shape": (5, 2, 3), "adjustment": ((), ())},
    "by value": {"shape": (5, 2, 3), "adjustment": ((5, 2, 3), (5, 2, 3))},
    "by sample": {"shape": (5, 3, 2), "axis": 1, "adjustment": ((5, 1, 1), (3, 1))},
    "by position, axes apart": {"shape": (4, 2, 3, 2), "axis": (1, 3), "adjustment": ((4, 1, 3, 1), (2, 1, 1))},
    "by sample, no scale": {"shape": (5, 3), "adjustment": ((5, 1), (3,)), "scale": False, "center": False},
    "by value, renorm": {"shape": (5, 3), "adjustment": ((5, 3), (3,)), "renorm": LIMITS},
}
CASES = {f"{one}, {other}": Case(**GEOMETRIES[one], **OPTIONS[other]) for one in GEOMETRIES for other in OPTIONS}
CASES |= {f"adjustment {name}": Case(**options) for name, options in ADJUSTED.items()}

BASES: dict[str, dict[str, Any]] = {
    "table": {"shape": (8, 3)},
    "channels first": {"shape": (4, 3, 2, 2), "axis": 1},
    "axes apart": {"shape": (5, 2, 3, 2), "axis": (1, 3)},
    "renorm": {"shape": (6, 2, 3), "renorm": LIMITS},
    "virtual": {"shape": (8, 2, 3), "size": 4},
    "virtual of 3, 2 and 2": {"shape": (7, 2, 3), "size": 3},
    "virtual of 3, 2 and 2, renorm": {"shape": (7, 3, 2), "axis": 1, "size": 3, "renorm": LIMITS},
    "adjustment by feature": {"shape": (6, 2, 3), "adjustment": ((3,), (1, 1, 3))},
    "adjustment by value": {"shape": (6, 2, 3), "adjustment": ((6, 2, 3), (6, 1, 1)), "renorm": LIMITS},
    "no parameters": {"shape": (8, 3), "scale": False, "center": False},
}
WEIGHTED = {
    f"{base}, {kind}, {masked}": Case(**BASES[base], weights=kind, masked=masked)
    for base in BASES
    for kind in WEIGHTS
    for masked in ("normalized", "zero")
}
WEIGHTED |= {
    f"{base}, {kind}, unbiased": Case(**BASES[base], weights=kind, unbiased=True)
    for base in ("table", "virtual", "virtual of 3, 2 and 2")
    for kind in WEIGHTS
}
ALL = CASES | WEIGHTED


def near(actual: Any, expected: Array, tolerance: float = 1e-11) -> None:
    found = np.asarray(actual)
    assert found.shape == expected.shape
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, finite.max(initial=0.0)))


def arguments(xp: Arrays, case: Case, oracle: Oracle) -> dict[str, Any]:
    """What `train` is given beside the batch; parameters have the shape of the feature axes."""
    pair, weights = case.pair(), case.own_weights()
    given: dict[str, Any] = {
        name: xp.array(oracle.variables[name]) for name in ("gamma", "beta") if name in oracle.variables
    }
    if pair is not None:
        given["adjustment"] = xp.array(pair[0]), xp.array(pair[1])
    if case.renorm is not None:
        averages = xp.array(oracle.variables["renorm_mean"]), xp.array(oracle.variables["renorm_stddev"])
        given["renorm"] = Renorm(*averages, Clipping(**case.renorm))
    if weights is not None:
        given |= {"weights": xp.array(weights), "masked": case.masked}
    return given


def averages(oracle: Oracle, found: dict[Any, tuple[float, float]]) -> Array:
    """Means and variances by feature, 0 where nothing counts."""
    both = np.zeros((2, *oracle.sizes))
    for feature, (mean, variance) in found.items():
        both[(0, *feature)], both[(1, *feature)] = mean, variance
    return both


def corrections(oracle: Oracle, x: Array, weights: Array | None) -> Corrections:
    return oracle.corrections(oracle.averages(oracle.moments(x, weights)))


@pytest.mark.parametrize("name", ALL)
def test_a_training_step_is_that_of_the_oracle(xp: Arrays, name: str) -> None:
    case = ALL[name]
    oracle, x, weights, plan = case.oracle(), case.spoilt(), case.own_weights(), case.plan
    with np.errstate(invalid="ignore"):  # infinity under the mask stays there as what arithmetic makes of it
        found = normalize.train(
            xp.namespace, xp.array(x), plan, EPSILON, unbiased=case.unbiased, **arguments(xp, case, oracle)
        )
    assert xp.numpy(found.y).dtype == np.float64
    groups = oracle.moments(x, weights)
    parts = plan.split(case.shape)[1] if case.size else min(case.shape[0], 1)
    assert len(groups) == math.prod(oracle.sizes) * parts
    used = corrections(oracle, x, weights)
    near(xp.numpy(found.y), oracle.output(x, used, oracle.adjust(case.shape), weights))
    expected = averages(oracle, oracle.averages(groups, case.unbiased))
    for value, by_feature in zip(found.averaged[:2], expected, strict=True):
        near(xp.numpy(value), by_feature.reshape(plan.view_shape))
    if case.renorm is None:
        assert found.correction is None
    elif used:
        assert found.correction is not None
        for which, value in enumerate(found.correction):
            by_feature = averages(oracle, used)[which]
            near(xp.numpy(value), by_feature.reshape(plan.view_shape))
    centered = xp.numpy(found.centered)
    assert centered.shape[2 if case.size else 1 :] == case.shape[1:]
    assert np.isfinite(centered).all()


@pytest.mark.parametrize("name", ALL)
def test_averages_move_as_those_of_the_oracle_and_not_at_all_where_nothing_counts(xp: Arrays, name: str) -> None:
    case = ALL[name]
    oracle, x = case.oracle(), case.spoilt()
    with np.errstate(invalid="ignore"):
        found = normalize.train(
            xp.namespace, xp.array(x), case.plan, EPSILON, unbiased=case.unbiased, **arguments(xp, case, oracle)
        )
    before = {name: value.copy() for name, value in oracle.variables.items() if name not in ("gamma", "beta")}
    shape = case.plan.view_shape
    old = {name: xp.array(value.reshape(shape)) for name, value in before.items()}
    moved = algebra.step(
        xp.namespace, old, found.averaged, EPSILON, rate=1 - oracle.momentum, renorm_rate=1 - oracle.renorm_momentum
    )
    oracle.train(x, case.own_weights())
    assert set(moved) == set(before)
    for name, value in moved.items():
        now = xp.numpy(value).reshape(oracle.sizes)
        near(now, oracle.variables[name])
        still = oracle.variables[name] == before[name]
        assert now[still].tobytes() == before[name][still].tobytes()
    if case.weights == "nothing" or 0 in case.shape:
        assert all((oracle.variables[name] == value).all() for name, value in before.items())


@pytest.mark.parametrize("name", ALL)
def test_inference_is_that_of_the_oracle_and_sees_a_whole_batch(xp: Arrays, name: str) -> None:
    case = ALL[name]
    oracle, x, weights = case.oracle(), case.spoilt(), case.own_weights()
    given = {
        key: value
        for key, value in arguments(xp, case, oracle).items()
        if key in ("gamma", "beta", "weights", "masked")
    }
    mean, variance = (xp.array(oracle.variables[key]) for key in ("moving_mean", "moving_variance"))
    with np.errstate(invalid="ignore"):
        y = normalize.infer(xp.namespace, xp.array(x), case.plan, EPSILON, mean, variance, **given)
    near(xp.numpy(y), oracle.infer(x, weights))


def test_weights_may_be_scaled_without_changing_anything_but_their_count(xp: Arrays) -> None:
    case = WEIGHTED["virtual of 3, 2 and 2, numbers, normalized"]
    weights = case.own_weights()
    assert weights is not None
    x = xp.array(case.values())
    found = [
        normalize.train(xp.namespace, x, case.plan, EPSILON, weights=xp.array(weights * factor), unbiased=True)
        for factor in (1.0, 1e-6)
    ]
    near(xp.numpy(found[1].y), xp.numpy(found[0].y))
    for value, other in zip(found[1].averaged[:2], found[0].averaged[:2], strict=True):
        near(xp.numpy(value), xp.numpy(other))
    near(xp.numpy(found[1].averaged.count) * 1e6, xp.numpy(found[0].averaged.count))


def test_a_whole_number_of_weight_is_that_many_values(xp: Arrays) -> None:
    x = np.random.default_rng(0).normal(size=(5, 3))
    weights = np.array([[1], [0], [3], [2], [1]])
    weighted = normalize.train(
        xp.namespace, xp.array(x), geometry.plan((5, 3), 1, None), EPSILON, weights=xp.array(weights)
    )
    repeated = np.repeat(x, weights[:, 0], axis=0)
    plan = geometry.plan(repeated.shape, 1, None)
    several = normalize.train(xp.namespace, xp.array(repeated), plan, EPSILON)
    for value, other in zip(weighted.averaged[:2], several.averaged[:2], strict=True):
        near(xp.numpy(value), xp.numpy(other))


@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, True), (False, False)])
def test_what_a_kernel_sees_of_parameters_and_an_adjustment_is_one_value_for_each_feature(
    xp: Arrays, parameters: tuple[bool, bool]
) -> None:
    plan, rng = geometry.plan((4, 2, 3, 5), (1, 3), None), np.random.default_rng(0)
    gamma, beta = (rng.normal(size=(2, 5)) if present else None for present in parameters)
    a, b = rng.normal(size=(2, 1, 1)), rng.normal(size=5)
    pair = normalize.by_feature(xp.namespace, plan, (xp.array(a), xp.array(b)))
    given = [None if value is None else xp.array(value) for value in (gamma, beta)]
    factor, offset = normalize.fold(xp.namespace, given[0], given[1], pair)
    expected = np.zeros((2, 2, 5))
    for j, k in np.ndindex(2, 5):
        g, h = 1.0 if gamma is None else gamma[j, k], 0.0 if beta is None else beta[j, k]
        expected[:, j, k] = a[j, 0, 0] * g, b[k] * g + h
    near(xp.numpy(factor), expected[0].reshape(-1))
    near(xp.numpy(offset), expected[1].reshape(-1))


def test_without_an_adjustment_a_kernel_sees_the_parameters_themselves(xp: Arrays) -> None:
    gamma, beta = xp.array(np.ones((2, 5))), xp.array(np.zeros((2, 5)))
    for scale, bias in ((gamma, beta), (gamma, None), (None, beta), (None, None)):
        factor, offset = normalize.fold(xp.namespace, scale, bias, None)
        assert factor is scale
        assert offset is bias


def test_a_correction_that_renorm_once_gave_gives_the_same_again(xp: Arrays) -> None:
    case = CASES["virtual of 3, 2 and 2, limited renorm"]
    given = arguments(xp, case, case.oracle())
    first = normalize.train(xp.namespace, xp.array(case.values()), case.plan, EPSILON, **given)
    del given["renorm"]
    again = normalize.train(
        xp.namespace, xp.array(case.values()), case.plan, EPSILON, correction=first.correction, **given
    )
    assert xp.numpy(again.y).tobytes() == xp.numpy(first.y).tobytes()


# Replicas


SHARES: dict[str, list[int]] = {
    "of one size": [4, 4, 4],
    "of several sizes": [1, 9, 2],
    "some of them empty": [0, 12, 0],
    "a single one": [12],
}


@pytest.mark.parametrize("size", [None, 3])
def test_moments_that_are_given_take_the_place_of_the_batch_s_own(xp: Arrays, size: int | None) -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, (6, 4, 3))
    plan = geometry.plan(x.shape, -1, size)
    view = xp.array(x.reshape(plan.split(x.shape)))
    measured = normalize.measure(xp.namespace, view, plan.reduced_axes)
    mean, variance = (xp.numpy(value) for value in measured[:2])
    np.testing.assert_allclose(mean, xp.numpy(view).mean(plan.reduced_axes, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(variance, xp.numpy(view).var(plan.reduced_axes, keepdims=True), rtol=1e-9)
    own = normalize.train(xp.namespace, xp.array(x), plan, EPSILON)
    same = normalize.train(xp.namespace, xp.array(x), plan, EPSILON, moments=measured)
    np.testing.assert_allclose(xp.numpy(same.y), xp.numpy(own.y), atol=1e-9)
    other = Moments(measured.mean + 1.0, measured.variance * 4.0, 1)
    given = normalize.train(xp.namespace, xp.array(x), plan, EPSILON, moments=other)
    expected = ((xp.numpy(view) - mean - 1) / np.sqrt(4 * variance + EPSILON)).reshape(x.shape)
    np.testing.assert_allclose(xp.numpy(given.y), expected, atol=1e-9)
    averaged = np.mean(mean + 1, axis=1, keepdims=True) if size else mean + 1
    np.testing.assert_allclose(xp.numpy(given.averaged.mean), averaged, atol=1e-9)


def collective(arrays: Arrays, mine: int, others: list[Moments]) -> Callable[[Moments], Moments]:
    """Put moments of one replica together with those of all others, as an all-gather would."""
    xp = arrays.namespace

    def merge(moments: Moments) -> Moments:
        shape = xp.shape(moments.mean)
        parts = [moments if at == mine else other for at, other in enumerate(others)]

        def gathered(values: list[Any]) -> Any:
            full = [xp.broadcast_to(value, shape) for value in values]
            return xp.concat([xp.reshape(value, (1, *shape)) for value in full], axis=0)

        def array(value: Any) -> Any:
            return arrays.array(float(value)) if isinstance(value, (int, float)) else value

        squares = [part.square_count for part in parts]
        merged = algebra.merge(
            xp,
            Moments(
                gathered([part.mean for part in parts]),
                gathered([part.variance for part in parts]),
                gathered([array(part.count) for part in parts]),
                gathered([array(part.rest) for part in parts]),
                None if squares[mine] is None else gathered(squares),
            ),
            0,
        )
        return Moments(*(None if value is None else xp.reshape(value, shape) for value in merged))

    return merge


@pytest.mark.parametrize("options", ["plain", "limited renorm", "unbiased"])
@pytest.mark.parametrize("weights", [None, *WEIGHTS])
@pytest.mark.parametrize("shares", SHARES)
def test_replicas_together_are_the_whole_batch(xp: Arrays, shares: str, weights: str | None, options: str) -> None:
    case = Case((12, 2, 3), weights=weights, **OPTIONS[options])
    oracle, x = case.oracle(), case.spoilt()
    given = arguments(xp, case, oracle)
    own: Array | None = case.own_weights()
    with np.errstate(invalid="ignore"):
        whole = normalize.train(xp.namespace, xp.array(x), case.plan, EPSILON, unbiased=case.unbiased, **given)
    bounds = np.cumsum([0, *SHARES[shares]])

    def part(at: int, **more: Any) -> normalize.Trained:
        span = slice(bounds[at], bounds[at + 1])
        some = given if own is None else given | {"weights": xp.array(own[span])}
        plan = geometry.plan(x[span].shape, -1, None)
        with np.errstate(invalid="ignore"):
            return normalize.train(
                xp.namespace, xp.array(x[span]), plan, EPSILON, unbiased=case.unbiased, **some, **more
            )

    alone = [part(at).moments for at in range(len(SHARES[shares]))]
    for at in range(len(alone)):
        found = part(at, merge=collective(xp, at, alone))
        near(xp.numpy(found.y), xp.numpy(whole.y)[bounds[at] : bounds[at + 1]], 1e-12)
        for value, other in zip(found.averaged[:2], whole.averaged[:2], strict=True):
            near(xp.numpy(value), xp.numpy(other), 1e-12)
        mine, all_of_it = (np.broadcast_to(xp.numpy(each.averaged.count), (1, 1, 3)) for each in (found, whole))
        near(mine, all_of_it)


# Accuracy


COMPOSED: dict[str, dict[str, Any]] = {
    "plain": {"shape": (64, 4, 3)},
    "channels first": {"shape": (64, 3, 4), "axis": 1},
    "renorm": {"shape": (64, 4, 3), "renorm": {}},
    "limited renorm": {"shape": (64, 4, 3), "renorm": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}},
    "virtual": {"shape": (64, 4, 3), "size": 16},
    "virtual, uneven": {"shape": (61, 4, 3), "size": 16},
    "virtual and renorm": {"shape": (64, 4, 3), "size": 16, "renorm": {}},
    "virtual, uneven and renorm": {"shape": (61, 4, 3), "size": 16, "renorm": {}},
    "weights": {"shape": (64, 4, 3), "weights": "numbers"},
    "weights, virtual and renorm": {"shape": (64, 4, 3), "size": 16, "renorm": {}, "weights": "booleans"},
    "adjustment": {"shape": (64, 4, 3), "adjustment": ((64, 1, 1), (3,)), "renorm": {}},
}


@pytest.mark.parametrize("name", COMPOSED)
def test_in_float32_a_large_mean_beside_the_spread_costs_nothing(xp: Arrays, name: str) -> None:
    case = Case(**COMPOSED[name])
    oracle, weights = case.oracle(), case.own_weights()
    rng = np.random.default_rng(8)
    x = rng.normal(1e4, 1.0, case.shape).astype(np.float32)
    for key, value in oracle.variables.items():
        if key.endswith("mean"):
            value += 1e4
        oracle.variables[key] = value.astype(np.float32).astype(np.float64)
        if key == "gamma":
            oracle.variables[key] = np.ones(value.shape)

    def narrow(value: Any) -> Any:
        if isinstance(value, Renorm):
            return Renorm(narrow(value.mean), narrow(value.stddev), value.clipping)
        if isinstance(value, tuple):
            return tuple(narrow(each) for each in value)
        return value if isinstance(value, str) else xp.array(xp.numpy(value).astype(np.float32))

    given = {key: narrow(value) for key, value in arguments(xp, case, oracle).items()}
    found = normalize.train(xp.namespace, xp.array(x), case.plan, EPSILON, **given)
    wide = x.astype(np.float64)
    used = corrections(oracle, wide, weights)
    assert xp.numpy(found.y).dtype == np.float32
    expected = oracle.output(wide, used, oracle.adjust(case.shape), weights)
    np.testing.assert_allclose(xp.numpy(found.y), expected, rtol=0, atol=1e-5)
    mean, variance = (xp.array(oracle.variables[key].astype(np.float32)) for key in ("moving_mean", "moving_variance"))
    kept = {key: value for key, value in given.items() if key in ("gamma", "beta")}
    y = normalize.infer(xp.namespace, xp.array(x), case.plan, EPSILON, mean, variance, **kept)
    np.testing.assert_allclose(xp.numpy(y), oracle.infer(wide), rtol=0, atol=1e-5)


# Gradients


def upstream(case: Case, anywhere: bool = True) -> Array:
    """A gradient of y; 0 under the mask, or anywhere."""
    dy, weights = np.random.default_rng(9).normal(size=case.shape), case.own_weights()
    return dy if anywhere or weights is None else np.where(np.broadcast_to(weights, case.shape) > 0, dy, 0)


def trained_gradients(case: Case, x: Array, dy: Array) -> tuple[Oracle, Any]:
    """The gradients of a step over NumPy, and the oracle of it."""
    oracle = case.oracle()
    given = arguments(NUMPY, case, oracle)
    with np.errstate(invalid="ignore"):
        found = normalize.train(namespace, x, case.plan, EPSILON, **given)
    given.pop("renorm", None)
    return oracle, normalize.train_gradient(namespace, dy, found, case.plan, EPSILON, **given)


def check(found: Any, expected: Gradients, case: Case, tolerance: float) -> None:
    shape = case.plan.view_shape
    near(found.x, expected.x, tolerance)
    for value, other, present in ((found.gamma, expected.gamma, case.scale), (found.beta, expected.beta, case.center)):
        if present:
            near(value, other.reshape(shape), tolerance)
        else:
            assert value is None
    assert (found.adjustment is None) == (expected.adjustment is None)
    for value, other in zip(found.adjustment or (), expected.adjustment or (), strict=True):
        near(value, other, tolerance)


@pytest.mark.parametrize("name", ALL)
def test_gradients_in_training_are_those_of_the_formulas_and_nothing_under_the_mask_reaches_them(name: str) -> None:
    case = ALL[name]
    x, dy, weights = case.spoilt(), upstream(case), case.own_weights()
    oracle, found = trained_gradients(case, x, dy)
    used = corrections(oracle, x, weights)
    check(found, oracle.gradients(x, dy, used, oracle.adjust(case.shape), weights), case, 1e-11)
    for value in (found.x, found.gamma, found.beta, *(found.adjustment or ())):
        assert value is None or np.isfinite(value).all()


def finite_differences(oracle: Oracle, x: Array, dy: Array, output: Callable[[Array, Pair | None], Array]) -> Gradients:
    """Gradients of Σdy·y by central differences of the oracle."""
    pair = oracle.adjust(x.shape)

    def loss(at: Array, adjustment: Pair | None) -> float:
        return float((output(at, adjustment) * dy).sum())

    def of(name: str) -> Array:
        if name not in oracle.variables:
            return np.zeros(oracle.sizes)
        kept = oracle.variables[name]

        def function(at: Array) -> float:
            oracle.variables[name] = at
            return loss(x, pair)

        gradient = differences(function, kept)
        oracle.variables[name] = kept
        return gradient

    adjustment = None
    if pair is not None:
        scale, bias = pair
        adjustment = (
            differences(lambda at: loss(x, (at, bias)), scale),
            differences(lambda at: loss(x, (scale, at)), bias),
        )
    return Gradients(differences(lambda at: loss(at, pair), x), of("gamma"), of("beta"), adjustment)


FINITE = {
    name: case
    for name, case in ALL.items()
    if (case.weights is None and "unbiased" not in name and 0 not in case.shape)
    or (case.weights in ("booleans", "numbers", "one group of nothing") and not case.unbiased)
}


@pytest.mark.parametrize("name", FINITE)
def test_gradients_in_training_are_those_of_finite_differences_where_nothing_flows_to_what_is_masked(name: str) -> None:
    case = FINITE[name]
    x, dy, weights = case.values(), upstream(case, anywhere=case.masked == "zero"), case.own_weights()
    oracle, found = trained_gradients(case, x, dy)
    used = corrections(oracle, x, weights)
    # Where dy is 0 at what weighs nothing, x there has no part in Σdy·y.
    expected = finite_differences(oracle, x, dy, lambda at, pair: oracle.output(at, used, pair, weights))
    check(found, expected, case, 1e-7)


INFERRED = {
    name: case for name, case in ALL.items() if case.renorm is None and not case.unbiased and not case.adjustment
}


@pytest.mark.parametrize("name", INFERRED)
def test_gradients_in_inference_are_those_of_finite_differences(name: str) -> None:
    case = INFERRED[name]
    x, dy = case.values(), upstream(case, anywhere=case.masked == "zero")
    oracle, weights = case.oracle(), case.own_weights()
    given = arguments(NUMPY, case, oracle)
    given.pop("beta", None)
    mean, variance = (oracle.variables[key] for key in ("moving_mean", "moving_variance"))
    beta = oracle.variables.get("beta")

    def gradients(at: Array) -> Any:
        return normalize.infer_gradient(namespace, dy, at, case.plan, EPSILON, mean, variance, beta=beta, **given)

    found = gradients(x)
    expected = finite_differences(oracle, x, dy, lambda at, pair: oracle.infer(at, weights))
    whole = dataclasses.replace(case, size=None)
    check(found, expected._replace(adjustment=None), whole, 1e-7)
    with np.errstate(invalid="ignore"):
        spoilt = gradients(case.spoilt())
    for value, other in zip(spoilt[:3], found[:3], strict=True):
        assert (value is None) == (other is None)
        assert value is None or value.tobytes() == other.tobytes()


FOLDS: dict[str, dict[str, Any]] = {
    "by feature": {"shapes": ((1, 1, 3), (3,))},
    "by number": {"shapes": ((), ())},
    "no parameters": {"shapes": ((1, 3), (3,)), "parameters": False},
    "several axes": {"shapes": ((2, 1), (3,)), "axis": (1, 2)},
    "axes apart": {"shapes": ((4, 1, 1), (1, 3)), "axis": (0, 2)},
}


@pytest.mark.parametrize("name", FOLDS)
def test_the_fold_s_gradients_are_those_of_finite_differences(name: str) -> None:
    rng, options = np.random.default_rng(0), FOLDS[name]
    plan = geometry.plan((4, 2, 3), options.get("axis", 2), None)
    present = options.get("parameters", True)
    gamma, beta = (rng.normal(size=plan.feature_sizes) if present else None for _ in range(2))
    a, b = (rng.normal(size=shape) for shape in options["shapes"])
    features = math.prod(plan.feature_sizes)
    dfactor, doffset = (rng.normal(size=features) for _ in range(2))

    def loss(gamma: Array | None, beta: Array | None, a: Array, b: Array) -> float:
        folded = normalize.fold(namespace, gamma, beta, normalize.by_feature(namespace, plan, (a, b)))
        pairs = zip((dfactor, doffset), folded, strict=True)
        return sum(float(up @ value) for up, value in pairs if value is not None)

    flat = normalize.by_feature(namespace, plan, (a, b))
    dgamma, dbeta = normalize.fold_gradient(dfactor, doffset, gamma, flat)
    shapes = options["shapes"]
    da, db = normalize.adjustment_gradient(namespace, plan, dfactor, doffset, gamma, shapes)
    near(da, differences(lambda at: loss(gamma, beta, at, b), a), 1e-8)
    near(db, differences(lambda at: loss(gamma, beta, a, at), b), 1e-8)
    if gamma is not None and beta is not None:
        near(dgamma, differences(lambda at: loss(at, beta, a, b), gamma).reshape(-1), 1e-8)
        near(dbeta, differences(lambda at: loss(gamma, at, a, b), beta).reshape(-1), 1e-8)


def test_without_an_adjustment_the_parameters_gradients_are_those_of_the_fold() -> None:
    dfactor, doffset = np.ones(3), np.zeros(3)
    found = normalize.fold_gradient(dfactor, doffset, np.ones(3), None)
    assert found[0] is dfactor
    assert found[1] is doffset


DIFFERENTIATED = {
    name: case
    for name, case in ALL.items()
    if 0 not in case.shape
    and not case.unbiased
    and case.weights in (None, "booleans", "numbers", "one group of nothing")
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_in_training_are_those_that_frameworks_find_by_themselves(differentiating: Arrays, name: str) -> None:
    case, xp = DIFFERENTIATED[name], differentiating
    x, dy = case.spoilt(), upstream(case)
    oracle, found = trained_gradients(case, x, dy)
    given = arguments(xp, case, oracle)
    names = [key for key in ("gamma", "beta") if key in given]
    adjusted = list(given.pop("adjustment", ()))
    expected: list[Any] = [found.x, *(getattr(found, key) for key in names), *(found.adjustment or ())]

    def function(x: Any, *others: Any) -> Any:
        more = dict(zip(names, others, strict=False))
        if adjusted:
            more["adjustment"] = others[len(names) :]
        return normalize.train(xp.namespace, x, case.plan, EPSILON, **(given | more)).y

    at = [xp.array(x), *(given[key] for key in names), *adjusted]
    assert xp.vjp is not None
    gradients = xp.vjp(function, at, xp.array(dy))
    for gradient, value in zip(gradients, expected, strict=True):
        near(xp.numpy(gradient).reshape(value.shape), np.asarray(value), 1e-11)


@pytest.mark.parametrize("name", [name for name in INFERRED if name in DIFFERENTIATED])
def test_gradients_in_inference_are_those_that_frameworks_find_by_themselves(
    differentiating: Arrays, name: str
) -> None:
    case, xp = DIFFERENTIATED[name], differentiating
    x, dy, oracle = case.spoilt(), upstream(case), case.oracle()
    given = arguments(xp, case, oracle)
    names = [key for key in ("gamma", "beta") if key in given]
    mean, variance = (oracle.variables[key] for key in ("moving_mean", "moving_variance"))
    plain = arguments(NUMPY, case, oracle)
    with np.errstate(invalid="ignore"):
        found = normalize.infer_gradient(namespace, dy, x, case.plan, EPSILON, mean, variance, **plain)

    def function(x: Any, *others: Any) -> Any:
        more = given | dict(zip(names, others, strict=True))
        return normalize.infer(xp.namespace, x, case.plan, EPSILON, xp.array(mean), xp.array(variance), **more)

    assert xp.vjp is not None
    gradients = xp.vjp(function, [xp.array(x), *(given[key] for key in names)], xp.array(dy))
    for gradient, value in zip(gradients, [found.x, *(getattr(found, key) for key in names)], strict=True):
        near(xp.numpy(gradient).reshape(value.shape), value, 1e-11)


def test_no_gradient_flows_through_r_and_d(differentiating: Arrays) -> None:
    # Without limits y = (x - renorm_mean)/renorm_stddev, whose derivative would not be centered.
    xp, case = differentiating, Case((6, 3), renorm={})
    given = arguments(xp, case, case.oracle())
    assert xp.vjp is not None
    (dx,) = xp.vjp(
        lambda x: normalize.train(xp.namespace, x, case.plan, EPSILON, **given).y,
        [xp.array(case.values())],
        xp.array(upstream(case)),
    )
    np.testing.assert_allclose(xp.numpy(dx).sum(axis=0), np.zeros(3), rtol=0, atol=1e-12)
