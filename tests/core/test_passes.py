"""The passes over the data, over every array namespace, and the rule that selects who serves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.core import passes
from batchnorm.core.algebra import Affine, GradientMap, Moments

from .conftest import Arrays

Array = npt.NDArray[Any]
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5, 3), (0,)),
    ((1, 3), (0,)),
    ((2, 3), (1,)),
    ((2, 3, 4, 5), (0, 1, 2)),
    ((2, 3, 4, 5), (0, 2, 3)),
    ((2, 3, 4, 5), (0, 2)),
    ((3, 2, 2, 2, 3), (0, 2, 3)),
    ((7,), (0,)),
    ((2, 3), ()),
]


def drawn(*shape: int, seed: int = 0, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(seed).normal(3.0, 2.0, shape).astype(dtype)


def gathered(x: Array, axes: tuple[int, ...]) -> dict[tuple[int, ...], list[float]]:
    """The values over `axes`, by the index where a sum over them puts its result."""
    values: dict[tuple[int, ...], list[float]] = {}
    for index in np.ndindex(*x.shape):
        kept = tuple(0 if axis in axes else i for axis, i in enumerate(index))
        values.setdefault(kept, []).append(float(x[index]))
    return values


def count(x: Array, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def moments(xp: Arrays, x: Any, axes: tuple[int, ...], many: Any, weights: Any = None) -> tuple[Moments, Any]:
    return passes.moments(xp.namespace, x, axes, many, weights)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_moments_are_the_mean_and_the_biased_variance_with_the_reduced_axes_kept(
    xp: Arrays, shape: tuple[int, ...], axes: tuple[int, ...], dtype: Any
) -> None:
    x = drawn(*shape, dtype=dtype)
    found, centered = moments(xp, xp.array(x), axes, count(x, axes))
    mean, variance, distance = (xp.numpy(value) for value in (found.mean, found.variance, centered))
    assert found.count == count(x, axes)
    assert found.square_count is None
    assert mean.shape == variance.shape == tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    assert mean.dtype == variance.dtype == distance.dtype == dtype
    near = 1e-5 if dtype == np.float32 else 1e-12
    for index, some in gathered(x, axes).items():
        expected = math.fsum(some) / len(some)
        assert mean[index] == pytest.approx(expected, rel=near)
        assert variance[index] == pytest.approx(
            math.fsum((value - expected) ** 2 for value in some) / len(some), rel=near, abs=near
        )
    exact = x.astype(np.float64) - x.astype(np.float64).mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(distance, exact, rtol=0, atol=near)


def test_the_count_may_be_an_array_as_it_is_where_the_batch_size_is_known_late(xp: Arrays) -> None:
    x = drawn(4, 3)
    known, _ = moments(xp, xp.array(x), (0,), 4)
    late, _ = moments(xp, xp.array(x), (0,), xp.array(4.0))
    for early, other in zip(known[:2], late[:2], strict=True):
        assert xp.numpy(early).tolist() == xp.numpy(other).tolist()


LAYOUTS = {
    "rows": ((8, 100_000), (1,)),
    "channels-first": ((10, 8, 100, 100), (0, 2, 3)),
    "channels-last": ((10, 100, 100, 4), (0, 1, 2)),
    "table": ((100_000, 4), (0,)),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_and_x_minus_m_stay_right_where_the_mean_is_large_beside_the_spread(
    xp: Arrays, layout: str, weighted: bool
) -> None:
    # In float32 the values are a thousandth apart. What is left is the rounding of sums of 1e5 distances, in one
    # accumulator where rows are added up; under weights they are from an origin that such a sum has made.
    shape, axes = LAYOUTS[layout]
    x = np.random.default_rng(0).normal(1e4, 1.0, shape).astype(np.float32)
    weights: Array | None = None
    if weighted:
        sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
        weights = (np.random.default_rng(1).integers(0, 4, sizes) / 2).astype(np.float32)
    found, centered = moments(xp, xp.array(x), axes, count(x, axes), None if weights is None else xp.array(weights))
    wide = x.astype(np.float64)
    own = np.ones(shape) if weights is None else np.broadcast_to(weights.astype(np.float64), shape)
    total = own.sum(axis=axes, keepdims=True)
    mean = (own * wide).sum(axis=axes, keepdims=True) / total
    variance = (own * (wide - mean) ** 2).sum(axis=axes, keepdims=True) / total
    assert {xp.numpy(value).dtype.name for value in (found.mean, found.variance, centered)} == {"float32"}
    np.testing.assert_allclose(xp.numpy(found.variance), variance, rtol=1e-4)
    exact, near = xp.numpy(found.mean).astype(np.float64) + xp.numpy(found.rest), 5e-5 if weighted else 1e-5
    np.testing.assert_allclose(exact, mean, rtol=0, atol=near)
    np.testing.assert_allclose(xp.numpy(centered), np.where(own > 0, wide - mean, 0), rtol=0, atol=near)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_million_values_are_not_too_many_for_their_large_mean(xp: Arrays, weighted: bool) -> None:
    # Their sum, 1e10, is a thousand from the next number in float32.
    x = np.random.default_rng(0).normal(1e4, 1.0, (1_000_000, 2)).astype(np.float32)
    weights = xp.array(np.ones((1_000_000, 1), np.float32)) if weighted else None
    found, _ = moments(xp, xp.array(x), (0,), 1_000_000, weights)
    wide = x.astype(np.float64)
    exact = xp.numpy(found.mean).astype(np.float64) + xp.numpy(found.rest)
    np.testing.assert_allclose(exact, wide.mean(axis=0, keepdims=True), rtol=0, atol=1e-4)
    np.testing.assert_allclose(xp.numpy(found.variance), wide.var(axis=0, keepdims=True), rtol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"), [((0, 3), (0,)), ((0, 5, 3), (0, 1)), ((4, 0, 3), (0, 1)), ((2, 0, 3), (0,)), ((4, 0), (0,))]
)
def test_moments_of_no_values_are_zero(
    xp: Arrays, shape: tuple[int, ...], axes: tuple[int, ...], weighted: bool
) -> None:
    x = np.zeros(shape, np.float32)
    number = count(x, axes)
    weights = xp.array(np.ones(shape, np.float32)) if weighted else None
    for many in (number, xp.array(np.float32(number))):
        found, centered = moments(xp, xp.array(x), axes, many, weights)
        assert xp.numpy(centered).shape == shape
        for moment in (found.mean, found.variance):
            value = xp.numpy(moment)
            assert value.shape == tuple(1 if axis in axes else size for axis, size in enumerate(shape))
            assert not value.any()


def test_a_constant_feature_has_no_variance(xp: Arrays) -> None:
    found, centered = moments(xp, xp.array(np.full((8, 2), 3.25)), (0,), 8)
    assert xp.numpy(found.mean).tolist() == [[3.25, 3.25]]
    assert xp.numpy(found.variance).tolist() == [[0.0, 0.0]]
    assert not xp.numpy(centered).any()


def test_nan_stays_in_its_feature(xp: Arrays) -> None:
    x = drawn(4, 3)
    x[2, 1] = np.nan
    found, centered = moments(xp, xp.array(x), (0,), 4)
    for moment in (found.mean, found.variance):
        assert np.isnan(xp.numpy(moment)).tolist() == [[False, True, False]]
    assert np.isnan(xp.numpy(centered)).any(axis=0).tolist() == [False, True, False]


@pytest.mark.parametrize("least", [0.0, 1e-3], ids=["some weigh nothing", "all weigh something"])
@pytest.mark.parametrize("form", ["by position", "by value"])
@pytest.mark.parametrize(("shape", "axes"), [((9, 3), (0,)), ((3, 4, 2, 5), (0, 1, 2)), ((3, 2, 4, 5), (0, 2, 3))])
def test_weights_count_and_what_weighs_nothing_is_never_read(
    xp: Arrays, shape: tuple[int, ...], axes: tuple[int, ...], form: str, least: float
) -> None:
    x, rng = drawn(*shape), np.random.default_rng(3)
    sizes = [size if form == "by value" or axis in axes else 1 for axis, size in enumerate(shape)]
    weights = np.maximum(rng.uniform(-1, 2, sizes), least)
    spread = np.broadcast_to(weights, shape)
    dirty = np.where(spread > 0, x, rng.choice([np.nan, np.inf, -np.inf, 1e300], shape))
    found, centered = moments(xp, xp.array(dirty), axes, None, xp.array(weights))
    of, values = gathered(spread, axes), gathered(x, axes)
    mean, variance, total, squares = (
        np.broadcast_to(xp.numpy(value), xp.numpy(found.mean).shape)
        for value in (found.mean, found.variance, found.count, found.square_count)
    )
    for index, some in values.items():
        n = math.fsum(of[index])
        expected = math.fsum(w * value for w, value in zip(of[index], some, strict=True)) / n
        assert total[index] == pytest.approx(n, rel=1e-12)
        assert squares[index] == pytest.approx(math.fsum(w * w for w in of[index]), rel=1e-12)
        assert mean[index] == pytest.approx(expected, rel=1e-12)
        second = math.fsum(w * (value - expected) ** 2 for w, value in zip(of[index], some, strict=True)) / n
        assert variance[index] == pytest.approx(second, rel=1e-11)
    np.testing.assert_allclose(xp.numpy(centered), np.where(spread > 0, x - mean, 0), rtol=0, atol=1e-12)


def test_a_group_and_a_feature_of_nothing_but_weight_0_have_moments_of_zero(xp: Arrays) -> None:
    x = np.full((3, 2, 2), np.nan)
    x[:, 1, 1] = [1.0, 2.0, 6.0]
    weights = np.where(np.isnan(x), 0.0, 0.125)
    found, centered = moments(xp, xp.array(x), (0,), None, xp.array(weights))
    assert xp.numpy(found.mean).tolist() == [[[0.0, 0.0], [0.0, 3.0]]]
    np.testing.assert_allclose(xp.numpy(found.variance), [[[0.0, 0.0], [0.0, 14 / 3]]], rtol=1e-14)
    assert xp.numpy(found.count).tolist() == [[[0.0, 0.0], [0.0, 0.375]]]
    assert xp.numpy(centered)[:, 1, 1].tolist() == [-2.0, -1.0, 3.0]
    assert np.count_nonzero(xp.numpy(centered)) == 3


def test_normalizing_is_one_multiplication_and_one_addition_per_value(xp: Arrays) -> None:
    centered, scale, offset = drawn(4, 3), drawn(1, 3, seed=1), drawn(4, 1, seed=2)
    y = xp.numpy(passes.normalize(xp.array(centered), Affine(xp.array(scale), xp.array(offset))))
    plain = xp.numpy(passes.normalize(xp.array(centered), Affine(xp.array(scale), None)))
    for i, j in np.ndindex(4, 3):
        assert y[i, j] == pytest.approx(scale[0, j] * centered[i, j] + offset[i, 0], rel=1e-14)
        assert plain[i, j] == scale[0, j] * centered[i, j]


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_gradient_sums_are_those_of_dy_and_of_dy_times_the_centered_input(
    xp: Arrays, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    centered, dy = drawn(*shape), drawn(*shape, seed=1)
    plain, product = (
        xp.numpy(total) for total in passes.gradient_sums(xp.namespace, xp.array(dy), xp.array(centered), list(axes))
    )
    assert plain.shape == product.shape == tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    values, upstream = gathered(centered, axes), gathered(dy, axes)
    for index in values:
        expected = [up * value for up, value in zip(upstream[index], values[index], strict=True)]
        assert plain[index] == pytest.approx(math.fsum(upstream[index]), rel=1e-11, abs=1e-11)
        assert product[index] == pytest.approx(math.fsum(expected), rel=1e-11, abs=1e-11)


def test_gradient_sums_of_no_values_are_zero(xp: Arrays) -> None:
    none = xp.array(np.zeros((0, 3)))
    for total in passes.gradient_sums(xp.namespace, none, none, (0,)):
        assert xp.numpy(total).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_combine_is_the_map_that_it_is_given(xp: Arrays, weighted: bool) -> None:
    dy, centered = drawn(4, 3), drawn(4, 3, seed=1)
    a, b, c = (drawn(1, 3, seed=seed) for seed in (2, 3, 4))
    weights = np.array([[0.0], [0.5], [2.0], [0.0]]) if weighted else np.ones((4, 1))
    dx = xp.numpy(
        passes.gradient_combine(
            xp.namespace,
            xp.array(dy),
            xp.array(centered),
            GradientMap(xp.array(a), xp.array(b), xp.array(c)),
            xp.array(weights) if weighted else None,
        )
    )
    for i, j in np.ndindex(4, 3):
        expected = a[0, j] * dy[i, j] + weights[i, 0] * (b[0, j] * centered[i, j] + c[0, j])
        assert dx[i, j] == pytest.approx(expected, rel=1e-13)


def test_what_weighs_nothing_takes_no_part_in_the_moments_gradient_even_where_that_is_not_finite(xp: Arrays) -> None:
    lost = GradientMap(xp.array([[2.0]]), xp.array([[np.nan]]), xp.array([[np.inf]]))
    weights = xp.array([[0.0], [1.0]])
    dx = passes.gradient_combine(xp.namespace, xp.array([[3.0], [3.0]]), xp.array([[1.0], [1.0]]), lost, weights)
    assert xp.numpy(dx)[0].tolist() == [6.0]
    assert np.isnan(xp.numpy(dx)[1]).all()


@given(
    st.sampled_from([None, True, False]),
    st.lists(st.tuples(st.text(min_size=1), st.booleans()), max_size=5, unique_by=lambda pair: pair[0]),
)
def test_the_first_kernel_that_can_serve_is_selected_unless_the_composed_path_is_asked_for(
    fused: bool | None, offered: list[tuple[str, bool]]
) -> None:
    selected = passes.select(fused, dict(offered))
    able = [name for name, serves in offered if serves]
    assert selected == (able[0] if able and fused is not False else "composed")


def test_selecting_changes_nothing_and_answers_the_same_again() -> None:
    offered = {"first": False, "second": True, "third": True}
    assert passes.select(None, offered) == passes.select(True, offered) == "second"
    assert offered == {"first": False, "second": True, "third": True}
