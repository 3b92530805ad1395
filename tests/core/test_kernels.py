"""The passes over the data, over every array namespace, and the rule that selects who serves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.core import kernels
from batchnorm.core.algebra import Affine, Combination, Moments

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


def moments(xp: Arrays, x: Any, axes: tuple[int, ...], many: Any) -> Moments:
    return kernels.moments(xp.namespace, x, axes, many, kernels.origin(xp.namespace, x, axes))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_moments_are_the_mean_and_the_biased_variance_with_the_reduced_axes_kept(
    xp: Arrays, shape: tuple[int, ...], axes: tuple[int, ...], dtype: Any
) -> None:
    x = drawn(*shape, dtype=dtype)
    mean, variance = (xp.numpy(one) for one in moments(xp, xp.array(x), axes, count(x, axes)))
    values = gathered(x, axes)
    assert mean.shape == variance.shape == tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    assert mean.dtype == variance.dtype == dtype
    near = 1e-5 if dtype == np.float32 else 1e-12
    for index, some in values.items():
        expected = math.fsum(some) / len(some)
        assert mean[index] == pytest.approx(expected, rel=near)
        assert variance[index] == pytest.approx(
            math.fsum((value - expected) ** 2 for value in some) / len(some), rel=near, abs=near
        )


def test_the_count_may_be_an_array_as_it_is_where_the_batch_size_is_known_late(xp: Arrays) -> None:
    x = drawn(4, 3)
    known = moments(xp, xp.array(x), (0,), 4)
    late = moments(xp, xp.array(x), (0,), xp.array(4.0))
    for one, other in zip(known, late, strict=True):
        assert xp.numpy(one).tolist() == xp.numpy(other).tolist()


LAYOUTS = {
    "rows": ((8, 100_000), (1,)),
    "channels-first": ((10, 8, 100, 100), (0, 2, 3)),
    "channels-last": ((10, 100, 100, 4), (0, 1, 2)),
    "table": ((100_000, 4), (0,)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_stays_right_where_the_mean_is_large_beside_the_spread(xp: Arrays, layout: str) -> None:
    # With an error δ of the mean the variance is off by δ², so 1e-4 of it asks for δ < 1e-2: the mean must be right to
    # 1e-6, over 1e5 values. A sum of the values themselves in a single float32 accumulator is off by 7e-4.
    shape, axes = LAYOUTS[layout]
    x = np.random.default_rng(0).normal(1e4, 1.0, shape).astype(np.float32)
    mean, variance = (xp.numpy(one) for one in moments(xp, xp.array(x), axes, count(x, axes)))
    wide = x.astype(np.float64)
    assert mean.dtype == variance.dtype == np.float32
    np.testing.assert_allclose(variance, wide.var(axis=axes, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(mean, wide.mean(axis=axes, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"), [((0, 3), (0,)), ((0, 5, 3), (0, 1)), ((4, 0, 3), (0, 1)), ((2, 0, 3), (0,)), ((4, 0), (0,))]
)
def test_moments_of_no_values_are_zero(xp: Arrays, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    number = count(x, axes)
    for many in (number, xp.array(np.float32(number))):
        for moment in moments(xp, xp.array(x), axes, many):
            found = xp.numpy(moment)
            assert found.shape == tuple(1 if axis in axes else size for axis, size in enumerate(shape))
            assert not found.any()


def test_a_constant_feature_has_no_variance(xp: Arrays) -> None:
    mean, variance = moments(xp, xp.array(np.full((8, 2), 3.25)), (0,), 8)
    assert xp.numpy(mean).tolist() == [[3.25, 3.25]]
    assert xp.numpy(variance).tolist() == [[0.0, 0.0]]


def test_nan_stays_in_its_feature(xp: Arrays) -> None:
    x = drawn(4, 3)
    x[2, 1] = np.nan
    for moment in moments(xp, xp.array(x), (0,), 4):
        assert np.isnan(xp.numpy(moment)).tolist() == [[False, True, False]]


def test_scale_shift_is_one_multiplication_and_one_addition_per_value(xp: Arrays) -> None:
    x, scale, shift = drawn(4, 3), drawn(1, 3, seed=1), drawn(4, 1, seed=2)
    y = xp.numpy(kernels.scale_shift(xp.array(x), Affine(xp.array(scale), xp.array(shift))))
    for i, j in np.ndindex(4, 3):
        assert y[i, j] == pytest.approx(scale[0, j] * x[i, j] + shift[i, 0], rel=1e-14)


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_gradient_sums_are_those_of_dy_and_of_dy_times_the_centered_input(
    xp: Arrays, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    x, dy = drawn(*shape), drawn(*shape, seed=1)
    mean = drawn(*(1 if axis in axes else size for axis, size in enumerate(shape)), seed=2)
    plain, centered = (
        xp.numpy(one)
        for one in kernels.gradient_sums(xp.namespace, xp.array(dy), xp.array(x), xp.array(mean), list(axes))
    )
    assert plain.shape == centered.shape == mean.shape
    values, upstream = gathered(x, axes), gathered(dy, axes)
    for index in values:
        expected = [up * (value - mean[index]) for up, value in zip(upstream[index], values[index], strict=True)]
        assert plain[index] == pytest.approx(math.fsum(upstream[index]), rel=1e-11, abs=1e-11)
        assert centered[index] == pytest.approx(math.fsum(expected), rel=1e-11, abs=1e-11)


def test_gradient_sums_of_no_values_are_zero(xp: Arrays) -> None:
    none, mean = xp.array(np.zeros((0, 3))), xp.array(np.ones((1, 3)))
    for one in kernels.gradient_sums(xp.namespace, none, none, mean, (0,)):
        assert xp.numpy(one).tolist() == [[0.0, 0.0, 0.0]]


def test_gradient_combine_is_the_map_that_it_is_given(xp: Arrays) -> None:
    dy, x = drawn(4, 3), drawn(4, 3, seed=1)
    by_dy, by_x, constant = (drawn(1, 3, seed=seed) for seed in (2, 3, 4))
    dx = xp.numpy(
        kernels.gradient_combine(
            xp.array(dy), xp.array(x), Combination(xp.array(by_dy), xp.array(by_x), xp.array(constant))
        )
    )
    for i, j in np.ndindex(4, 3):
        assert dx[i, j] == pytest.approx(by_dy[0, j] * dy[i, j] + by_x[0, j] * x[i, j] + constant[0, j], rel=1e-13)


@given(
    st.sampled_from([None, True, False]),
    st.lists(st.tuples(st.text(min_size=1), st.booleans()), max_size=5, unique_by=lambda pair: pair[0]),
)
def test_the_first_kernel_that_can_serve_is_selected_unless_the_composed_path_is_asked_for(
    fused: bool | None, offered: list[tuple[str, bool]]
) -> None:
    selected = kernels.select(fused, dict(offered))
    able = [name for name, serves in offered if serves]
    assert selected == (able[0] if able and fused is not False else "composed")


def test_selecting_changes_nothing_and_answers_the_same_again() -> None:
    offered = {"one": False, "two": True, "three": True}
    assert kernels.select(None, offered) == kernels.select(True, offered) == "two"
    assert offered == {"one": False, "two": True, "three": True}
