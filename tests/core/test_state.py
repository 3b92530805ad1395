"""What a layer remembers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from batchnorm.core.options import Options
from batchnorm.core.state import averages, modernize, names

from .conftest import Arrays

ALL = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


@pytest.mark.parametrize(("scale", "center", "renorm"), list(itertools.product([False, True], repeat=3)))
def test_variables_are_named_in_the_order_of_the_original_without_those_switched_off(
    scale: bool, center: bool, renorm: bool
) -> None:
    absent = set() if scale else {"gamma"}
    absent |= set() if center else {"beta"}
    absent |= set() if renorm else {"moving_stddev", "renorm_mean", "renorm_stddev"}
    options = Options(scale=scale, center=center, renorm=renorm)
    assert names(options) == tuple(name for name in ALL if name not in absent)


def test_all_but_the_parameters_are_averages() -> None:
    assert list(averages(dict.fromkeys(ALL))) == list(ALL[2:])


def test_todays_variables_pass_through(xp: Arrays) -> None:
    present = {name: xp.array([float(i)]) for i, name in enumerate(ALL)}
    modern = modernize(xp.namespace, present, 1e-3)
    assert list(modern) == list(ALL)
    assert modern is not present
    for name in ALL:
        assert modern[name] is present[name]


def test_the_older_averages_of_renorm_are_divided_by_their_weights(xp: Arrays) -> None:
    older = {
        "gamma": xp.array([2.0, 3.0]),
        "moving_mean": xp.array([1.0, -1.0]),
        "moving_variance": xp.array([4.0, 0.25]),
        "renorm_mean": xp.array([0.5, -0.25]),
        "renorm_mean_weight": xp.array(0.5),
        "renorm_stddev": xp.array([0.75, 1.5]),
        "renorm_stddev_weight": xp.array(0.25),
    }
    given = dict(older)
    modern = modernize(xp.namespace, older, 0.5)
    assert set(modern) == set(ALL) - {"beta"}
    np.testing.assert_allclose(xp.numpy(modern["renorm_mean"]), [1.0, -0.5])
    np.testing.assert_allclose(xp.numpy(modern["renorm_stddev"]), [3.0, 6.0])
    np.testing.assert_allclose(xp.numpy(modern["moving_stddev"]), np.sqrt([4.5, 0.75]), rtol=1e-6)
    for name in ("gamma", "moving_mean", "moving_variance"):
        assert modern[name] is older[name]
    assert list(older) == list(given)
    for name, value in given.items():
        assert older[name] is value


def test_older_averages_without_any_weight_begin_at_the_moving_statistics(xp: Arrays) -> None:
    older = {
        "moving_mean": xp.array([1.0]),
        "moving_variance": xp.array([4.0]),
        "renorm_mean": xp.array([0.0]),
        "renorm_mean_weight": xp.array(0.0),
        "renorm_stddev": xp.array([0.0]),
        "renorm_stddev_weight": xp.array(0.0),
    }
    modern = modernize(xp.namespace, older, 1e-3)
    np.testing.assert_allclose(xp.numpy(modern["renorm_mean"]), [1.0])
    np.testing.assert_allclose(xp.numpy(modern["renorm_stddev"]), np.sqrt([4.001]), rtol=1e-6)
    np.testing.assert_allclose(xp.numpy(modern["moving_stddev"]), np.sqrt([4.001]), rtol=1e-6)


def test_each_of_the_two_weights_counts_for_its_own_average(xp: Arrays) -> None:
    older = {
        "moving_mean": xp.array([1.0]),
        "moving_variance": xp.array([3.0]),
        "renorm_mean": xp.array([2.0]),
        "renorm_mean_weight": xp.array(0.5),
        "renorm_stddev": xp.array([0.0]),
        "renorm_stddev_weight": xp.array(0.0),
    }
    modern = modernize(xp.namespace, older, 1.0)
    np.testing.assert_allclose(xp.numpy(modern["renorm_mean"]), [4.0])
    np.testing.assert_allclose(xp.numpy(modern["renorm_stddev"]), [2.0])


def test_a_negative_moving_variance_of_the_older_generation_counts_as_zero(xp: Arrays) -> None:
    older = {
        "moving_mean": xp.array([0.0]),
        "moving_variance": xp.array([-1e-4]),
        "renorm_mean": xp.array([0.0]),
        "renorm_mean_weight": xp.array(1.0),
        "renorm_stddev": xp.array([1.0]),
        "renorm_stddev_weight": xp.array(1.0),
    }
    modern = modernize(xp.namespace, older, 0.25)
    np.testing.assert_allclose(xp.numpy(modern["moving_stddev"]), [0.5])
