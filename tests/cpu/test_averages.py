"""The step of the moving averages, against `batchnorm.core`, and limits of renorm that cross."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.core import algebra
from batchnorm.core.algebra import Moments
from batchnorm.numpy import namespace as xp

from .cases import EPSILON, TYPES, Array, Options, View, drawn, forward, kernel

NAMES = {"running_mean": "moving_mean", "running_variance": "moving_variance", "running_stddev": "moving_stddev"}
VIEW = View(12, 4, 1, 3, 1)


def moments(kind: Any = np.float64) -> Moments:
    random = np.random.default_rng(1)
    return Moments(random.normal(size=(4, 3)).astype(kind), random.uniform(0.5, 2, (4, 3)).astype(kind), 3)


def averages(*names: str, kind: Any = np.float64) -> dict[str, Array]:
    random = np.random.default_rng(2)
    return {name: random.uniform(0.5, 2, 3).astype(kind) for name in names}


@pytest.mark.parametrize(
    "names",
    [
        ("running_mean", "running_variance"),
        ("running_mean",),
        ("running_variance",),
        ("running_mean", "running_variance", "renorm_mean", "renorm_stddev"),
        ("running_mean", "running_variance", "running_stddev", "renorm_mean", "renorm_stddev"),
    ],
    ids="-".join,
)
def test_the_step_is_that_of_the_core_over_the_groups_means(names: tuple[str, ...]) -> None:
    found, given = averages(*names), moments()
    expected = algebra.step(
        xp,
        {NAMES.get(name, name): value for name, value in found.items()},
        Moments(given.mean.mean(axis=0), given.variance.mean(axis=0), 12),
        EPSILON,
        rate=0.3,
        renorm_rate=0.1,
    )
    kernel(VIEW, np.dtype(np.float64)).move_averages(
        mean=given.mean, variance=given.variance, **found, momentum=0.3, renorm_momentum=0.1
    )
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[NAMES.get(name, name)], rtol=1e-14)


def test_the_variance_moves_to_the_mean_of_the_groups_unbiased_ones() -> None:
    found, given = averages("running_variance"), moments()
    expected = 0.7 * found["running_variance"] + 0.3 * 1.5 * given.variance.mean(axis=0)
    kernel(VIEW, np.dtype(np.float64)).move_averages(
        mean=given.mean, variance=given.variance, **found, momentum=0.3, unbiased=True
    )
    np.testing.assert_allclose(found["running_variance"], expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("renorm_mean",), "renorm_mean and renorm_stddev"),
        (("running_variance", "running_stddev"), "running_stddev goes with"),
        (("running_stddev", "renorm_mean", "renorm_stddev"), "running_stddev goes with"),
    ],
)
def test_averages_that_go_together_are_refused_by_half(names: tuple[str, ...], message: str) -> None:
    given = moments()
    with pytest.raises(ValueError, match=message):
        kernel(VIEW, np.dtype(np.float64)).move_averages(
            mean=given.mean, variance=given.variance, **averages(*names), momentum=0.3
        )


@pytest.mark.parametrize("name", ["mean", "running_mean"])
def test_averages_of_another_size_or_type_are_refused(name: str) -> None:
    found = {"mean": moments().mean, "variance": moments().variance, **averages("running_mean")}
    for value, error in ((found[name].reshape(-1)[:-1].copy(), ValueError), (found[name].astype(np.int64), TypeError)):
        with pytest.raises(error, match=f"^{name} must"):
            kernel(VIEW, np.dtype(np.float64)).move_averages(**{**found, name: value}, momentum=0.3)


def test_where_limits_cross_the_upper_one_wins() -> None:
    view = View(8, 1, 1, 2, 1)
    renorm = np.zeros(2, np.float32), np.ones(2, np.float32)
    result = forward(view, drawn(view, TYPES[0], 0), given=Options(None, None, renorm, (4.0, 1.5, 5.0)))
    assert result.r is not None
    assert result.r.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("renorm", [False, True])
def test_parameters_whose_moments_are_not_finite_keep_their_averages(renorm: bool, bad: float) -> None:
    names = ("running_mean", "running_variance", *(("renorm_mean", "renorm_stddev") if renorm else ()))
    found, given = averages(*names), moments()
    before = {name: value.copy() for name, value in found.items()}
    given.mean[2, 0], given.variance[1, 1] = bad, abs(bad)
    expected = algebra.step(
        xp,
        {NAMES.get(name, name): value for name, value in found.items()},
        Moments(given.mean.mean(axis=0), given.variance.mean(axis=0), 12),
        EPSILON,
        rate=0.3,
        renorm_rate=0.1,
    )
    of = kernel(VIEW, np.dtype(np.float64))
    step: dict[str, Any] = {"momentum": 0.3, "renorm_momentum": 0.1, "skip_nonfinite": True, **found}
    assert of.move_averages(mean=given.mean, variance=given.variance, **step)
    for name, value in found.items():
        np.testing.assert_array_equal(value[:2], before[name][:2])
        np.testing.assert_allclose(value[2], expected[NAMES.get(name, name)][2], rtol=1e-14)
        assert value[2] != before[name][2]
    assert not of.move_averages(mean=np.full((4, 3), bad), variance=given.variance, **step)
