"""Variables of a layer under the names of each framework."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm.core.dialects import DIALECTS, complete, find

from .conftest import Arrays


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_layer_is_found_under_the_names_of_each_dialect(dialect: str) -> None:
    spoken = DIALECTS[dialect]
    for scope in ("", f"net{spoken.separator}bn"):
        prefix = f"{scope}{spoken.separator}" if scope else ""
        keys = {ours: f"{prefix}{theirs}" for ours, theirs in spoken.names.items()}
        if dialect == "linen":
            for ours, key in keys.items():
                keys[ours] = f"{'params' if ours in ('gamma', 'beta') else 'batch_stats'}/{key}"
        found = find([*keys.values(), "other/kernel", "optimizer/moving_mean", "head.weight", "head.bias"])
        assert set(found) == {scope}
        assert found[scope].dialect == dialect
        assert found[scope].keys == keys


def test_layers_of_one_file_are_kept_apart_and_the_limits_of_sbx_belong_to_theirs() -> None:
    names = ("scale", "bias", "mean", "var", "steps", "r_max", "d_max")
    keys = [
        f"{'params' if at < 2 else 'batch_stats'}/{scope}/{name}" for scope in "ab" for at, name in enumerate(names)
    ]
    found = find(keys)
    assert set(found) == {"a", "b"}
    assert found["a"].spare == ("batch_stats/a/r_max", "batch_stats/a/d_max")
    contrib = find(["q.norm.ra_mean", "q.norm.ra_var", "q.norm.steps", "q.norm.scale", "q.norm.bias"])
    assert contrib["q.norm"].dialect == "torch"
    assert contrib["q.norm"].keys["moving_variance"] == "q.norm.ra_var"


def test_what_is_missing_follows_from_what_is_there(xp: Arrays) -> None:
    mean, variance = xp.array([1.0, 2.0]), xp.array([3.0, 8.0])
    wanted = (
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
        "moving_stddev",
        "renorm_mean",
        "renorm_stddev",
        "steps",
    )
    found = complete(xp.namespace, {"moving_mean": mean, "moving_variance": variance}, wanted, 1.0)
    assert tuple(found) == wanted
    expected = [[1, 1], [0, 0], [1, 2], [3, 8], [2, 3], [1, 2], [2, 3], 0]
    for value, exact in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(value), exact)
    assert found["renorm_mean"] is not mean


def test_what_is_not_wanted_goes_but_for_parameters(xp: Arrays) -> None:
    one = xp.array([1.0])
    given = dict.fromkeys(("moving_mean", "moving_variance", "renorm_mean", "renorm_stddev"), one)
    assert set(complete(xp.namespace, given, ("moving_mean", "moving_variance"), None)) == set(list(given)[:2])
    for name in ("gamma", "beta"):
        with pytest.raises(ValueError, match=f"the target has no {name}"):
            complete(xp.namespace, {name: one, **given}, ("moving_mean", "moving_variance"), None)
    with pytest.raises(ValueError, match="epsilon must be given"):
        complete(xp.namespace, given, (*given, "moving_stddev"), None)
