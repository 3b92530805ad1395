"""Which numbers, over every array namespace, against loops in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from batchnorm.core import algebra
from batchnorm.core.algebra import Correction, Moments
from batchnorm.core.options import Clipping
from tests.oracle import differences

from .conftest import Arrays

Array = npt.NDArray[Any]


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def positive(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).uniform(0.1, 3.0, shape)


def near(xp: Arrays, actual: Any, expected: Any, rtol: float = 1e-12) -> None:
    found = xp.numpy(actual)
    assert found.dtype == np.float64
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("count", "safe"), [(0, 1), (1, 1), (2, 2), (10**9, 10**9), (0.25, 0.25), (0.0, 1)])
def test_a_count_is_made_safe_to_divide_by_and_may_be_a_fraction(xp: Arrays, count: float, safe: float) -> None:
    assert algebra.divisor(xp.namespace, count) == safe
    near(xp, algebra.divisor(xp.namespace, xp.array(float(count))), float(safe))


def test_a_count_by_group_is_made_safe_group_by_group(xp: Arrays) -> None:
    near(xp, algebra.divisor(xp.namespace, xp.array([0.0, 0.5, 3.0])), [1.0, 0.5, 3.0])


def test_the_standard_deviation_has_epsilon_under_the_root(xp: Arrays) -> None:
    variance = np.array([0.0, 1.0, 8.75])
    near(xp, algebra.stddev(xp.namespace, xp.array(variance), 0.25), [0.5, math.sqrt(1.25), 3.0])


def test_moments_near_an_origin_keep_what_rounding_takes_from_the_mean(xp: Arrays) -> None:
    origin, distance = np.float32(1e4), np.float32(1 / 3)
    moments = Moments.near(xp.array([origin]), xp.array([distance]), xp.array([np.float32(1)]), 7)
    mean, rest = (float(xp.numpy(value)[0]) for value in (moments.mean, moments.rest))
    assert mean == float(np.float32(1e4 + 1 / 3))
    assert mean + rest == pytest.approx(1e4 + float(distance), abs=1e-7)
    assert moments.count == 7
    assert moments.square_count is None


GROUPS = 3
COUNTS: dict[str, Any] = {
    "of one size": 5,
    "of several sizes": np.array([3.0, 2.0, 2.0]).reshape(1, 3, 1, 1),
    "one of them empty": np.array([3.0, 0.0, 1.0]).reshape(1, 3, 1, 1),
    "of fractions": np.array([0.25, 0.5, 0.125]).reshape(1, 3, 1, 1),
    "by feature": np.array([[3.0, 0.0], [0.5, 0.0], [1.0, 4.0]]).reshape(1, 3, 1, 2),
}


def by_group(count: Any) -> Array:
    """The count of each group and feature."""
    return np.broadcast_to(np.asarray(count, np.float64), (1, GROUPS, 1, 2))


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("kind", COUNTS)
def test_groups_are_averaged_by_their_counts_with_their_axis_kept(xp: Arrays, kind: str, rest: bool) -> None:
    count = COUNTS[kind]
    mean, variance, more = drawn(1, 3, 1, 2), positive(1, 3, 1, 2), drawn(1, 3, 1, 2, seed=2) * 1e-3
    given = count if isinstance(count, int) else xp.array(count)
    moments = Moments(xp.array(mean), xp.array(variance), given, xp.array(more) if rest else 0.0)
    averaged = algebra.average_groups(xp.namespace, moments, 1)
    counts = by_group(count)
    expected = np.zeros((3, 1, 1, 1, 2))
    for feature in range(2):
        total = sum(counts[0, group, 0, feature] for group in range(GROUPS))
        for group in range(GROUPS):
            n = counts[0, group, 0, feature]
            exact = mean[0, group, 0, feature] + rest * more[0, group, 0, feature]
            expected[:, 0, 0, 0, feature] += n * exact / total, n * variance[0, group, 0, feature] / total, n
    near(xp, averaged.mean + averaged.rest, expected[0])
    near(xp, averaged.variance, expected[1])
    np.testing.assert_allclose(np.broadcast_to(xp.numpy(averaged.count), (1, 1, 1, 2)), expected[2], rtol=1e-12)


@pytest.mark.parametrize("count", [4, "by group"])
def test_no_groups_have_averages_of_zero(xp: Arrays, count: Any) -> None:
    none = xp.array(np.zeros((1, 0, 1, 2)))
    many = xp.array(np.zeros((1, 0, 1, 1))) if count == "by group" else count
    averaged = algebra.average_groups(xp.namespace, Moments(none, none, many), 1)
    for value in averaged[:2]:
        near(xp, value, np.zeros((1, 1, 1, 2)))
    assert not xp.numpy(averaged.count).any()


def test_groups_of_nothing_have_averages_of_zero(xp: Arrays) -> None:
    zero = xp.array(np.zeros((1, 3, 1, 2)))
    averaged = algebra.average_groups(xp.namespace, Moments(zero, zero, zero), 1)
    for value in averaged[:3]:
        near(xp, value, np.zeros((1, 1, 1, 2)))


def test_a_whole_batch_has_nothing_to_average(xp: Arrays) -> None:
    moments = Moments(xp.array(drawn(3)), xp.array(positive(3)), 7)
    assert algebra.average_groups(xp.namespace, moments, None) is moments


@pytest.mark.parametrize(
    ("count", "factor"), [(0, 1.0), (1, 1.0), (2, 2.0), (3, 1.5), (101, 1.01), (0.5, 1.0), (1.5, 3.0)]
)
def test_the_unbiased_variance_is_n_over_n_minus_1_times_the_biased_and_a_single_value_is_left(
    xp: Arrays, count: float, factor: float
) -> None:
    variance = np.array([0.0, 1.0, 4.0])
    for n in (count, xp.array(float(count)), xp.array([float(count)] * 3)):
        moments = Moments(xp.array(variance), xp.array(variance), n)
        near(xp, algebra.unbiased_variance(xp.namespace, moments), variance * factor)


def test_under_weights_n_is_the_square_of_their_sum_over_the_sum_of_their_squares(xp: Arrays) -> None:
    weights = [[2.0, 2.0, 2.0], [0.1, 0.1, 0.2], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
    count, squares = (np.array([math.fsum(w**power for w in some) for some in weights]) for power in (1, 2))
    n = [3.0, 0.16 / 0.06]  # and one value, and none
    moments = Moments(xp.array(np.zeros(4)), xp.array(np.full(4, 2.0)), xp.array(count), 0.0, xp.array(squares))
    expected = [2 * n[0] / (n[0] - 1), 2 * n[1] / (n[1] - 1), 2.0, 2.0]
    near(xp, algebra.unbiased_variance(xp.namespace, moments), expected)


# Replicas


def split_moments(x: Array, weights: Array, sizes: list[int]) -> tuple[list[Array], Array]:
    """Mean, variance, Σw and Σw² of consecutive parts of an array of values by feature, and of the whole, by loops."""
    bounds = [0, *itertools.accumulate(sizes)]
    spans = [*itertools.pairwise(bounds), (0, len(x))]
    found = np.zeros((4, len(spans), x.shape[1]))
    for part, (begin, end) in enumerate(spans):
        for j in range(x.shape[1]):
            live = [(float(weights[i, j]), float(x[i, j])) for i in range(begin, end) if weights[i, j] > 0]
            total = math.fsum(w for w, _ in live)
            mean = math.fsum(w * value for w, value in live) / (total or 1.0)
            variance = math.fsum(w * (value - mean) ** 2 for w, value in live) / (total or 1.0)
            found[:, part, j] = mean, variance, total, math.fsum(w * w for w, _ in live)
    return [value[:-1] for value in found], found[:, -1:]


PARTS: dict[str, tuple[list[int], Array]] = {
    "of one size": ([8, 8, 8], np.ones((24, 3))),
    "of several sizes": ([1, 20, 3], np.ones((24, 3))),
    "some of them empty": ([0, 24, 0], np.ones((24, 3))),
    "one value each": ([1] * 24, np.ones((24, 3))),
    "a single part": ([24], np.ones((24, 3))),
    "weighted": ([4, 15, 5], np.random.default_rng(5).uniform(0, 1, (24, 1)) * np.ones(3)),
    "weighted below 1": ([4, 15, 5], np.random.default_rng(5).uniform(0, 0.02, (24, 1)) * np.ones(3)),
    "weighted by feature, one with nothing": ([4, 15, 5], np.array([1.0, 0.5, 0.0]) * np.ones((24, 1))),
    "one weighing nothing": ([4, 15, 5], np.repeat([[0.0], [2.0], [1.0]], [4, 15, 5], axis=0) * np.ones(3)),
    "all weighing nothing": ([4, 15, 5], np.zeros((24, 3))),
}


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("name", PARTS)
def test_merged_parts_have_the_moments_of_the_whole(xp: Arrays, name: str, spread: float) -> None:
    sizes, weights = PARTS[name]
    x = 5.0 + spread * drawn(24, 3, seed=11)
    parts, whole = split_moments(x, weights, sizes)
    mean, variance, count, squares = (xp.array(value) for value in parts)
    merged = algebra.merge(xp.namespace, Moments(mean, variance, count, 0.0, squares), 0)
    near(xp, merged.mean + merged.rest, whole[0])
    near(xp, merged.variance / spread**2, whole[1] / spread**2)
    near(xp, merged.count, whole[2])
    near(xp, merged.square_count, whole[3])


TOTALS = [name for name in PARTS if "by feature" not in name]  # replicas have one count for all features


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("name", TOTALS)
def test_totals_of_parts_add_up_to_the_moments_of_the_whole(xp: Arrays, name: str, shape: tuple[int, ...]) -> None:
    sizes, weights = PARTS[name]
    parts, whole = split_moments(5.0 + drawn(24, 3, seed=11), weights, sizes)

    def moments(part: int) -> Moments:
        mean, variance, count, squares = (xp.array(value[part].reshape(shape)) for value in parts)
        if (weights == 1).all():
            return Moments(mean, variance, sizes[part])
        one = (slice(0, 1),) * len(shape)
        return Moments(mean - 0.25, variance, count[one], 0.25, squares[one])

    total = xp.array(np.zeros(8))
    for part in range(len(sizes)):
        total = total + algebra.totals(xp.namespace, moments(part), xp.array(0.0).dtype)
    merged = algebra.from_totals(xp.namespace, total, shape, total.dtype)
    near(xp, merged.mean + merged.rest, whole[0].reshape(shape))
    near(xp, merged.variance, whole[1].reshape(shape))
    near(xp, merged.count, whole[2][0, :1])
    near(xp, merged.square_count, whole[3][0, :1])


def test_totals_in_float64_leave_float32_moments_right_where_the_mean_is_large_beside_the_spread(xp: Arrays) -> None:
    sizes, weights = PARTS["of several sizes"]
    x = np.random.default_rng(0).normal(1e4, 1.0, (24, 3))
    parts, whole = split_moments(x, weights, sizes)
    double, single = xp.array(0.0).dtype, xp.array(np.float32(0)).dtype
    total = xp.array(np.zeros(8))
    for part, size in enumerate(sizes):
        mean = parts[0][part].astype(np.float32)
        rest, variance = (parts[0][part] - mean).astype(np.float32), parts[1][part].astype(np.float32)
        moments = Moments(xp.array(mean), xp.array(variance), size, xp.array(rest))
        total = total + algebra.totals(xp.namespace, moments, double)
    merged = algebra.from_totals(xp.namespace, total, (3,), single)
    assert merged.mean.dtype == merged.variance.dtype == merged.rest.dtype == merged.count.dtype == single
    mean, rest = (xp.numpy(value).astype(np.float64) for value in (merged.mean, merged.rest))
    np.testing.assert_allclose(mean + rest, whole[0][0], rtol=1e-10)
    np.testing.assert_allclose(xp.numpy(merged.variance), whole[1][0], rtol=1e-6)


def test_parts_of_as_many_values_are_merged_by_a_number(xp: Arrays) -> None:
    parts, whole = split_moments(drawn(24, 3), np.ones((24, 3)), [6] * 4)
    merged = algebra.merge(xp.namespace, Moments(xp.array(parts[0]), xp.array(parts[1]), 6), 0)
    near(xp, merged.mean + merged.rest, whole[0])
    near(xp, merged.variance, whole[1])
    assert merged.count == 24
    assert merged.square_count is None


def test_merging_in_float32_stays_right_where_the_mean_is_large_beside_the_spread(xp: Arrays) -> None:
    sizes = [40, 0, 7, 1, 16]
    x = np.random.default_rng(0).normal(1e4, 1.0, (64, 6)).astype(np.float32)
    parts, whole = split_moments(x.astype(np.float64), np.ones((64, 6)), sizes)
    mean, variance, count = (xp.array(value.astype(np.float32)) for value in parts[:3])
    rest = xp.array((parts[0] - parts[0].astype(np.float32)).astype(np.float32))
    merged = algebra.merge(xp.namespace, Moments(mean, variance, count, rest), 0)
    found = xp.numpy(merged.mean).astype(np.float64) + xp.numpy(merged.rest)
    assert xp.numpy(merged.mean).dtype == xp.numpy(merged.variance).dtype == np.float32
    np.testing.assert_allclose(found, whole[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(xp.numpy(merged.variance), whole[1], rtol=2e-6)


# Batch renormalization


LIMITS: list[dict[str, float]] = [
    {},
    {"rmin": 0.9},
    {"rmax": 1.1},
    {"rmin": 0.5, "rmax": 1.5},
    {"dmax": 0.3},
    {"dmax": 0.0},
    {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0},
    {"rmin": 0.8, "rmax": 3.0, "dmax": 5.0},
]


@pytest.mark.parametrize("as_arrays", [False, True])
@pytest.mark.parametrize("limits", LIMITS)
def test_the_correction_is_sigma_over_s_and_the_shift_of_the_mean_over_s_within_the_limits(
    xp: Arrays, limits: dict[str, float], as_arrays: bool
) -> None:
    mean, variance = drawn(40), positive(40)
    old_mean, old_stddev = drawn(40, seed=2), positive(40, seed=3)
    clipping = Clipping(**{key: xp.array(value) if as_arrays else value for key, value in limits.items()})
    r, d = algebra.correction(
        xp.namespace,
        Moments(xp.array(mean), xp.array(variance), 5),
        xp.array(old_mean),
        xp.array(old_stddev),
        1e-2,
        clipping,
    )
    expected_r, expected_d = [], []
    for i in range(40):
        s = max(old_stddev[i], 0.1)
        found_r, found_d = math.sqrt(variance[i] + 1e-2) / s, (mean[i] - old_mean[i]) / s
        found_r = min(max(found_r, limits.get("rmin", 0.0)), limits.get("rmax", math.inf))
        dmax = limits.get("dmax", math.inf)
        expected_r.append(found_r)
        expected_d.append(min(max(found_d, -dmax), dmax))
    near(xp, r, expected_r)
    near(xp, d, expected_d)


@pytest.mark.parametrize("old_stddev", [0.0, 0.1, 0.4999, -2.0])
def test_the_old_standard_deviation_counts_as_at_least_the_root_of_epsilon(xp: Arrays, old_stddev: float) -> None:
    moments = Moments(xp.array([3.0]), xp.array([0.75]), 5)
    r, d = algebra.correction(xp.namespace, moments, xp.array([2.0]), xp.array([old_stddev]), 0.25, Clipping())
    near(xp, r, [2.0])
    near(xp, d, [2.0])


def test_where_scheduled_limits_cross_the_upper_one_wins(xp: Arrays) -> None:
    moments = Moments(xp.array([3.0, -3.0]), xp.array([0.75, 0.75]), 5)
    clipping = Clipping(rmin=xp.array(4.0), rmax=xp.array(1.5), dmax=xp.array(-1.0))
    r, d = algebra.correction(xp.namespace, moments, xp.array([0.0, 0.0]), xp.array([1.0, 1.0]), 0.25, clipping)
    near(xp, r, [1.5, 1.5])
    near(xp, d, [-1.0, -1.0])


def test_the_shift_sees_what_rounding_took_from_the_mean(xp: Arrays) -> None:
    moments = Moments(xp.array([3.0]), xp.array([0.75]), 5, xp.array([0.125]))
    _, d = algebra.correction(xp.namespace, moments, xp.array([2.0]), xp.array([0.5]), 0.25, Clipping())
    near(xp, d, [2.25])


def test_without_limits_the_correction_undoes_the_normalization_by_the_batch(xp: Arrays) -> None:
    # ((x - m)/σ)·r + d = (x - renorm_mean)/renorm_stddev, whatever m and σ are.
    mean, variance, old_mean, old_stddev = drawn(7), positive(7), drawn(7, seed=2), positive(7, seed=3)
    moments = Moments(xp.array(mean), xp.array(variance), 5)
    correction = algebra.correction(xp.namespace, moments, xp.array(old_mean), xp.array(old_stddev), 1e-3, Clipping())
    scale, offset = algebra.affine(xp.namespace, moments, 1e-3, correction=correction)
    near(xp, scale, 1 / old_stddev)
    near(xp, offset, (mean - old_mean) / old_stddev, rtol=1e-10)


# The map and its gradient


@pytest.mark.parametrize("wide", [False, True], ids=["adjustment-by-feature", "adjustment-by-value"])
@pytest.mark.parametrize(
    ("corrected", "adjusted", "scaled", "centered"), list(itertools.product([False, True], repeat=4))
)
def test_the_whole_layer_is_one_affine_map_of_x_minus_m(
    xp: Arrays, corrected: bool, adjusted: bool, scaled: bool, centered: bool, wide: bool
) -> None:
    x, mean, variance = drawn(4, 3, seed=9), drawn(1, 3), positive(1, 3)
    r, d = positive(1, 3, seed=2), drawn(1, 3, seed=3)
    a, b = (positive(4, 3, seed=4), drawn(4, 1, seed=5)) if wide else (positive(1, 3, seed=4), drawn(1, 1, seed=5))
    gamma, beta = drawn(1, 3, seed=6), drawn(1, 3, seed=7)
    factor, offset = algebra.fold(
        xp.array(gamma) if scaled else None,
        xp.array(beta) if centered else None,
        (xp.array(a), xp.array(b)) if adjusted else None,
    )
    scale, shift = algebra.affine(
        xp.namespace,
        Moments(xp.array(mean), xp.array(variance), 5),
        1e-3,
        correction=Correction(xp.array(r), xp.array(d)) if corrected else None,
        factor=factor,
        offset=offset,
    )
    assert (shift is None) == (not (corrected or adjusted or centered))
    expected = np.empty((4, 3))
    for i, j in np.ndindex(4, 3):
        y = (x[i, j] - mean[0, j]) / math.sqrt(variance[0, j] + 1e-3)
        if corrected:
            y = y * r[0, j] + d[0, j]
        if adjusted:
            y = y * (a[i, j] if wide else a[0, j]) + (b[i, 0] if wide else b[0, 0])
        if scaled:
            y = y * gamma[0, j]
        if centered:
            y = y + beta[0, j]
        expected[i, j] = y
    y = xp.array(x - mean) * scale
    near(xp, y if shift is None else y + shift, expected, rtol=1e-11)


def test_without_an_adjustment_factor_and_offset_are_the_parameters_themselves(xp: Arrays) -> None:
    gamma, beta = xp.array(drawn(3)), xp.array(drawn(3, seed=1))
    for given in itertools.product((gamma, None), (beta, None)):
        folded = algebra.fold(given[0], given[1], None)
        assert [mine is yours for mine, yours in zip(folded, given, strict=True)] == [True, True]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_gradients_are_one_map_and_two_sums_too(xp: Arrays, n: int, corrected: bool) -> None:
    x, dy, factor, offset = drawn(n, 3), drawn(n, 3, seed=1), np.array([[0.5, -2.0, 1.0]]), drawn(1, 3, seed=4)
    r, d = (positive(1, 3, seed=2), drawn(1, 3, seed=3)) if corrected else (np.ones((1, 3)), np.zeros((1, 3)))

    def loss(at: Array, by: Array, to: Array) -> float:
        total = 0.0
        for j in range(3):
            mean = sum(at[i, j] for i in range(n)) / n
            variance = sum((at[i, j] - mean) ** 2 for i in range(n)) / n
            for i in range(n):
                normalized = (at[i, j] - mean) / math.sqrt(variance + 0.1) * r[0, j] + d[0, j]
                total += dy[i, j] * (normalized * by[0, j] + to[0, j])
        return total

    mean, variance = x.mean(axis=0, keepdims=True), x.var(axis=0, keepdims=True)
    moments = Moments(xp.array(mean), xp.array(variance), n)
    sums = xp.array(dy.sum(axis=0, keepdims=True)), xp.array((dy * (x - mean)).sum(axis=0, keepdims=True))
    a, b, c = algebra.gradient_map(xp.namespace, moments, 0.1, xp.array(factor * r), *sums)
    near(xp, xp.array(dy) * a + xp.array(x - mean) * b + c, differences(lambda at: loss(at, factor, offset), x), 1e-8)
    correction = Correction(xp.array(r), xp.array(d)) if corrected else None
    dfactor, doffset = algebra.parameter_gradients(xp.namespace, moments, 0.1, correction, *sums)
    near(xp, dfactor, differences(lambda at: loss(x, at, offset), factor), 1e-8)
    near(xp, doffset, differences(lambda at: loss(x, factor, at), offset), 1e-8)


# Averages


def averages_of(xp: Arrays, *names: str, dtype: Any = np.float64) -> dict[str, Any]:
    return {name: xp.array(positive(4, seed=seed).astype(dtype)) for seed, name in enumerate(names)}


PLAIN = ("moving_mean", "moving_variance")
RENORM = (*PLAIN, "moving_stddev", "renorm_mean", "renorm_stddev")
WITHOUT_STDDEV = (*PLAIN, "renorm_mean", "renorm_stddev")
AVERAGES = {"plain": PLAIN, "renorm": RENORM, "renorm by its variance": WITHOUT_STDDEV, "a mean": PLAIN[:1]}


def stepped(name: str, old: dict[str, Array], mean: Array, variance: Array, rate: float, other: float) -> Array:
    """One average of renorm or without after a step, by the page."""
    renorm = "renorm_mean" in old
    sigma = np.array([math.sqrt(v + 0.25) for v in variance])
    if name == "moving_variance" and renorm:
        stddev = old.get("moving_stddev", np.array([math.sqrt(v + 0.25) for v in old[name]]))
        return np.array([max(0.0, (s - (s - n) * rate) ** 2 - 0.25) for s, n in zip(stddev, sigma, strict=True)])
    new = mean if name.endswith("mean") else variance if name == "moving_variance" else sigma
    return old[name] - (old[name] - new) * (other if name.startswith("renorm") else rate)


@pytest.mark.parametrize("as_arrays", [False, True])
@pytest.mark.parametrize(("rate", "other"), [(0.01, 0.3), (1.0, 0.5), (0.25, 0.0)])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_move_by_their_rates_and_with_renorm_the_variance_follows(
    xp: Arrays, kind: str, rate: float, other: float, as_arrays: bool
) -> None:
    old = averages_of(xp, *AVERAGES[kind])
    mean, variance = drawn(4, seed=8), positive(4, seed=9)
    rates: list[Any] = [xp.array(value) if as_arrays else value for value in (rate, other)]
    moments = Moments(xp.array(mean), xp.array(variance), 6)
    new = algebra.step(xp.namespace, old, moments, 0.25, rate=rates[0], renorm_rate=rates[1])
    assert list(new) == list(old)
    plain = {name: xp.numpy(value) for name, value in old.items()}
    for name, value in new.items():
        near(xp, value, stepped(name, plain, mean, variance, rate, other))


def test_rate_0_keeps_the_old_value_exactly_whatever_comes(xp: Arrays) -> None:
    old = averages_of(xp, *PLAIN)
    moments = Moments(xp.array(drawn(4) * 1e30), xp.array(positive(4) * 1e30), 6)
    for name, value in algebra.step(xp.namespace, old, moments, 1e-3, rate=0.0).items():
        assert xp.numpy(value).tobytes() == xp.numpy(old[name]).tobytes()


def test_what_several_calls_subtract_from_one_average_adds_up(xp: Arrays) -> None:
    old = {"moving_mean": xp.array([8.0])}
    first, second = (Moments(xp.array([mean]), xp.array([1.0]), 6) for mean in (4.0, 0.0))
    taken = [algebra.decrements(xp.namespace, old, moments, 1e-3, rate=0.25) for moments in (first, second)]
    near(xp, old["moving_mean"] - taken[0]["moving_mean"] - taken[1]["moving_mean"], [5.0])


ODD = [-0.0, math.nan, math.inf, 1e-37]


@pytest.mark.parametrize("how", ["moves", "count"])
@pytest.mark.parametrize("new", [7.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_does_not_move_stays_bit_for_bit_whatever_the_batch_was(
    xp: Arrays, kind: str, new: float, how: str, dtype: Any
) -> None:
    values = np.array([*ODD, *ODD], dtype)
    moves = np.array([False] * 4 + [True] * 4)
    old = {name: xp.array(values) for name in AVERAGES[kind]}
    count = xp.array(np.where(moves, 3.0, 0.0)) if how == "count" else 3
    moments = Moments(xp.array(np.full(8, new)), xp.array(np.full(8, abs(new))), count)
    given = xp.array(moves) if how == "moves" else None
    with np.errstate(invalid="ignore"):
        after = algebra.step(xp.namespace, old, moments, 1e-3, rate=0.5, renorm_rate=0.5, moves=given)
    for name, value in after.items():
        found = xp.numpy(value)
        assert found.dtype == dtype
        assert found[:4].tobytes() == values[:4].tobytes(), name
        assert (found[4:].view(np.uint8) != values[4:].view(np.uint8)).any(), name


def test_a_feature_moves_only_where_there_are_values_and_all_else_holds(xp: Arrays) -> None:
    count, moves = xp.array([0.0, 0.5, 3.0, 0.0]), xp.array([True, True, False, False])
    four = xp.array(np.ones(4))
    found = algebra.moving(Moments(four, four, count), moves)
    assert xp.numpy(found).tolist() == [False, True, False, False]
    assert xp.numpy(algebra.moving(Moments(four, four, count))).tolist() == [False, True, True, False]
    assert algebra.moving(Moments(four, four, 3)) is None
    assert algebra.moving(Moments(four, four, 3), moves) is moves
    assert algebra.moving(Moments(four, four, 0), moves) is False


@pytest.mark.parametrize("kind", AVERAGES)
def test_of_no_values_nothing_moves(xp: Arrays, kind: str) -> None:
    old = averages_of(xp, *AVERAGES[kind])
    none = Moments(xp.array(np.zeros(4)), xp.array(np.zeros(4)), 0)
    assert algebra.decrements(xp.namespace, old, none, 1e-3, rate=0.5, renorm_rate=0.5) == {}
    new = algebra.step(xp.namespace, old, none, 1e-3, rate=0.5, renorm_rate=0.5)
    assert list(new) == list(old)
    assert all(new[name] is value for name, value in old.items())


def test_averages_keep_their_type_and_move_in_that_of_the_moments(xp: Arrays) -> None:
    old = averages_of(xp, *RENORM, dtype=np.float32)
    moments = Moments(xp.array(drawn(4)), xp.array(positive(4, seed=3)), 6)
    new = algebra.step(xp.namespace, old, moments, 1e-3, rate=0.1, renorm_rate=0.1)
    assert {xp.numpy(value).dtype.name for value in new.values()} == {"float32"}
    wide = {name: xp.array(xp.numpy(value).astype(np.float64)) for name, value in old.items()}
    for name, value in algebra.step(xp.namespace, wide, moments, 1e-3, rate=0.1, renorm_rate=0.1).items():
        np.testing.assert_allclose(xp.numpy(new[name]), xp.numpy(value), rtol=3e-7)
    taken = algebra.decrements(xp.namespace, old, moments, 1e-3, rate=0.1, renorm_rate=0.1)
    assert {xp.numpy(value).dtype.name for value in taken.values()} == {"float64"}


def test_the_variance_of_inference_belongs_to_the_moving_standard_deviation_and_is_not_negative(xp: Arrays) -> None:
    variance = algebra.inference_variance(xp.namespace, xp.array([0.0, 0.4, 0.5, 1.0, 3.0]), 0.25)
    near(xp, variance, [0.0, 0.0, 0.0, 0.75, 8.75])


def test_the_variance_of_inference_undoes_the_standard_deviation(xp: Arrays) -> None:
    variance = positive(20)
    sigma = algebra.stddev(xp.namespace, xp.array(variance), 1e-3)
    near(xp, algebra.inference_variance(xp.namespace, sigma, 1e-3), variance)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_what_has_moved_is_told_with_the_averages(xp: Arrays, skip_nonfinite: bool) -> None:
    old = {"moving_mean": xp.array([1.0, 2.0, 3.0]), "moving_variance": xp.array([1.0, 1.0, 1.0])}
    moments = Moments(xp.array([5.0, float("nan"), 5.0]), xp.array([2.0, 2.0, float("inf")]), 3)
    options: dict[str, Any] = {"rate": 0.5, "renorm_rate": None, "skip_nonfinite": skip_nonfinite}
    new, moves = algebra.track(xp.namespace, old, moments, 1e-3, **options)
    mean, variance = (xp.numpy(new[name]) for name in ("moving_mean", "moving_variance"))
    if skip_nonfinite:
        assert xp.numpy(moves).tolist() == [True, False, False]
        assert (mean.tolist(), variance.tolist()) == ([3.0, 2.0, 3.0], [1.5, 1.0, 1.0])
    else:
        assert moves is None
        np.testing.assert_array_equal(mean, [3.0, np.nan, 4.0])
        np.testing.assert_array_equal(variance, [1.5, 1.5, np.inf])
    assert algebra.track(xp.namespace, old, moments._replace(count=0), 1e-3, **options)[1] is False
