"""Which numbers, over every array namespace, against loops and plain NumPy in float64."""

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


@pytest.mark.parametrize(("count", "safe"), [(0, 1), (1, 1), (2, 2), (10**9, 10**9)])
def test_a_count_is_made_safe_to_divide_by(xp: Arrays, count: int, safe: int) -> None:
    assert algebra.at_least_one(xp.namespace, count) == safe
    near(xp, algebra.at_least_one(xp.namespace, xp.array(float(count))), float(safe))


def test_the_standard_deviation_has_epsilon_under_the_root(xp: Arrays) -> None:
    variance = np.array([0.0, 1.0, 8.75])
    near(xp, algebra.stddev(xp.namespace, xp.array(variance), 0.25), [0.5, math.sqrt(1.25), 3.0])


def test_groups_are_averaged_with_their_axis_kept(xp: Arrays) -> None:
    mean, variance = drawn(1, 3, 1, 2), positive(1, 3, 1, 2)
    averaged = algebra.average_groups(xp.namespace, Moments(xp.array(mean), xp.array(variance)), 1, 3)
    for actual, of in zip(averaged, (mean, variance), strict=True):
        expected = np.zeros((1, 1, 1, 2))
        for feature in range(2):
            expected[0, 0, 0, feature] = sum(of[0, group, 0, feature] for group in range(3)) / 3
        near(xp, actual, expected)


def test_no_groups_have_averages_of_zero(xp: Arrays) -> None:
    none = xp.array(np.zeros((1, 0, 1, 2)))
    for averaged in algebra.average_groups(xp.namespace, Moments(none, none), 1, 0):
        near(xp, averaged, np.zeros((1, 1, 1, 2)))


@pytest.mark.parametrize(("count", "factor"), [(1, 1.0), (2, 2.0), (3, 1.5), (101, 1.01)])
def test_the_unbiased_variance_is_n_over_n_minus_1_times_the_biased_and_a_single_value_is_left(
    xp: Arrays, count: int, factor: float
) -> None:
    variance = np.array([0.0, 1.0, 4.0])
    near(xp, algebra.bessel(xp.namespace, xp.array(variance), count), variance * factor)
    near(xp, algebra.bessel(xp.namespace, xp.array(variance), xp.array(float(count))), variance * factor)


def test_a_whole_batch_has_nothing_to_average(xp: Arrays) -> None:
    moments = Moments(xp.array(drawn(3)), xp.array(positive(3)))
    assert algebra.average_groups(xp.namespace, moments, None, 1) is moments


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
        Moments(xp.array(mean), xp.array(variance)),
        xp.array(old_mean),
        xp.array(old_stddev),
        1e-2,
        clipping,
    )
    expected_r, expected_d = [], []
    for i in range(40):
        s = max(old_stddev[i], 0.1)
        one_r, one_d = math.sqrt(variance[i] + 1e-2) / s, (mean[i] - old_mean[i]) / s
        one_r = min(max(one_r, limits.get("rmin", 0.0)), limits.get("rmax", math.inf))
        dmax = limits.get("dmax", math.inf)
        expected_r.append(one_r)
        expected_d.append(min(max(one_d, -dmax), dmax))
    near(xp, r, expected_r)
    near(xp, d, expected_d)


@pytest.mark.parametrize("old_stddev", [0.0, 0.1, 0.4999, -2.0])
def test_the_old_standard_deviation_counts_as_at_least_the_root_of_epsilon(xp: Arrays, old_stddev: float) -> None:
    moments = Moments(xp.array([3.0]), xp.array([0.75]))
    r, d = algebra.correction(xp.namespace, moments, xp.array([2.0]), xp.array([old_stddev]), 0.25, Clipping())
    near(xp, r, [2.0])
    near(xp, d, [2.0])


def test_where_scheduled_limits_cross_the_upper_one_wins(xp: Arrays) -> None:
    moments = Moments(xp.array([3.0, -3.0]), xp.array([0.75, 0.75]))
    clipping = Clipping(rmin=xp.array(4.0), rmax=xp.array(1.5), dmax=xp.array(-1.0))
    r, d = algebra.correction(xp.namespace, moments, xp.array([0.0, 0.0]), xp.array([1.0, 1.0]), 0.25, clipping)
    near(xp, r, [1.5, 1.5])
    near(xp, d, [-1.0, -1.0])


def test_without_limits_the_correction_undoes_the_normalization_by_the_batch(xp: Arrays) -> None:
    # ((x - m)/σ)·r + d = (x - renorm_mean)/renorm_stddev, whatever m and σ are.
    mean, variance, old_mean, old_stddev = drawn(7), positive(7), drawn(7, seed=2), positive(7, seed=3)
    moments = Moments(xp.array(mean), xp.array(variance))
    correction = algebra.correction(xp.namespace, moments, xp.array(old_mean), xp.array(old_stddev), 1e-3, Clipping())
    scale, shift = algebra.affine(xp.namespace, moments, 1e-3, correction=correction)
    near(xp, scale, 1 / old_stddev)
    near(xp, shift, -old_mean / old_stddev, rtol=1e-10)


@pytest.mark.parametrize("wide", [False, True], ids=["adjustment-by-feature", "adjustment-by-value"])
@pytest.mark.parametrize(
    ("corrected", "adjusted", "scaled", "centered"), list(itertools.product([False, True], repeat=4))
)
def test_the_whole_layer_is_one_affine_map(
    xp: Arrays, corrected: bool, adjusted: bool, scaled: bool, centered: bool, wide: bool
) -> None:
    x, mean, variance = drawn(4, 3, seed=9), drawn(1, 3), positive(1, 3)
    r, d = positive(1, 3, seed=2), drawn(1, 3, seed=3)
    a, b = (positive(4, 3, seed=4), drawn(4, 1, seed=5)) if wide else (positive(1, 3, seed=4), drawn(1, 1, seed=5))
    gamma, beta = drawn(1, 3, seed=6), drawn(1, 3, seed=7)
    scale, shift = algebra.affine(
        xp.namespace,
        Moments(xp.array(mean), xp.array(variance)),
        1e-3,
        correction=Correction(xp.array(r), xp.array(d)) if corrected else None,
        adjustment=(xp.array(a), xp.array(b)) if adjusted else None,
        gamma=xp.array(gamma) if scaled else None,
        beta=xp.array(beta) if centered else None,
    )
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
    near(xp, xp.array(x) * scale + shift, expected, rtol=1e-11)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_gradient_of_the_input_is_one_map_too(xp: Arrays, n: int) -> None:
    x, weights, factor = drawn(n, 3), drawn(n, 3, seed=1), np.array([[0.5, -2.0, 1.0]])

    def loss(at: Array) -> float:
        total = 0.0
        for j in range(3):
            mean = sum(at[i, j] for i in range(n)) / n
            variance = sum((at[i, j] - mean) ** 2 for i in range(n)) / n
            for i in range(n):
                total += weights[i, j] * (at[i, j] - mean) / math.sqrt(variance + 0.1) * factor[0, j]
        return total

    mean, variance = x.mean(axis=0, keepdims=True), x.var(axis=0, keepdims=True)
    dy_weight, x_weight, constant = algebra.combination(
        xp.namespace,
        Moments(xp.array(mean), xp.array(variance)),
        0.1,
        n,
        xp.array(factor),
        xp.array(weights.sum(axis=0, keepdims=True)),
        xp.array((weights * (x - mean)).sum(axis=0, keepdims=True)),
    )
    dx = xp.array(weights) * dy_weight + xp.array(x) * x_weight + constant
    near(xp, dx, differences(loss, x), rtol=1e-8)


def test_a_moving_average_keeps_the_weight_of_its_old_value(xp: Arrays) -> None:
    old, new = drawn(5), drawn(5, seed=1)
    for decay in (0.0, 0.25, 0.99, 1.0):
        moved = xp.array(old) - algebra.decrement(xp.array(old), xp.array(new), decay)
        near(xp, moved, decay * old + (1 - decay) * new)
        scheduled = xp.array(old) - algebra.decrement(xp.array(old), xp.array(new), xp.array(decay))
        near(xp, scheduled, decay * old + (1 - decay) * new)


def test_decay_1_keeps_the_old_value_exactly_whatever_comes(xp: Arrays) -> None:
    old = drawn(5)
    moved = xp.array(old) - algebra.decrement(xp.array(old), xp.array(drawn(5, seed=1) * 1e30), 1.0)
    assert xp.numpy(moved).tolist() == old.tolist()


def test_decrements_of_several_calls_add_up(xp: Arrays) -> None:
    old, new = xp.array([8.0]), (xp.array([4.0]), xp.array([0.0]))
    moved = old - algebra.decrement(old, new[0], 0.75) - algebra.decrement(old, new[1], 0.75)
    near(xp, moved, [5.0])


def test_the_variance_of_inference_belongs_to_the_moving_standard_deviation_and_is_not_negative(xp: Arrays) -> None:
    variance = algebra.inference_variance(xp.namespace, xp.array([0.0, 0.4, 0.5, 1.0, 3.0]), 0.25)
    near(xp, variance, [0.0, 0.0, 0.0, 0.75, 8.75])


def test_the_variance_of_inference_undoes_the_standard_deviation(xp: Arrays) -> None:
    variance = positive(20)
    sigma = algebra.stddev(xp.namespace, xp.array(variance), 1e-3)
    near(xp, algebra.inference_variance(xp.namespace, sigma, 1e-3), variance)


def test_without_renorm_the_mean_and_the_given_variance_are_moved(xp: Arrays) -> None:
    moments, stored = Moments(xp.array([1.0]), xp.array([2.0])), xp.array([3.0])
    moved = algebra.targets(xp.namespace, moments, stored, 0.25, 0.9, False, 0.5)
    assert list(moved) == ["moving_mean", "moving_variance"]
    assert moved["moving_mean"].value is moments.mean
    assert moved["moving_variance"].value is stored
    assert {target.decay for target in moved.values()} == {0.9}


def test_with_renorm_the_standard_deviation_is_moved_with_both_momenta_and_the_variance_is_not(xp: Arrays) -> None:
    moments = Moments(xp.array([1.0]), xp.array([2.0]))
    moved = algebra.targets(xp.namespace, moments, xp.array([3.0]), 0.25, 0.9, True, 0.5)
    assert {name: target.decay for name, target in moved.items()} == {
        "moving_mean": 0.9,
        "moving_stddev": 0.9,
        "renorm_mean": 0.5,
        "renorm_stddev": 0.5,
    }
    for name, target in moved.items():
        near(xp, target.value, [1.0] if name.endswith("mean") else [1.5])
