"""Where: shapes, axes, virtual batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from batchnorm.core.geometry import Geometry, View, counted_axes, plan


@st.composite
def layouts(draw: st.DrawFn, first: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and a set of axes from `first` on, in any order and counted from either end."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7]), min_size=first + 1, max_size=5)))
    axes = draw(st.lists(st.integers(first, len(shape) - 1), min_size=1, max_size=len(shape), unique=True))
    return shape, tuple(axis - len(shape) * draw(st.booleans()) for axis in axes)


@given(layouts())
def test_axes_are_sorted_and_counted_from_the_front_and_the_others_are_reduced(
    layout: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, axes = layout
    geometry = plan(shape, axes, None)
    assert geometry.rank == len(shape)
    assert list(geometry.axes) == sorted(axis % len(shape) for axis in axes)
    assert sorted(geometry.axes + geometry.reduced_axes) == list(range(len(shape)))
    assert geometry.features == tuple((axis, shape[axis]) for axis in geometry.axes)
    assert geometry.group_axis is None


@given(layouts())
def test_a_parameter_has_the_size_of_the_feature_axes_and_1_elsewhere(
    layout: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, axes = layout
    geometry = plan(shape, axes, None)
    expected = tuple(size if axis in geometry.axes else 1 for axis, size in enumerate(shape))
    assert geometry.input_shape == geometry.view_shape == expected
    assert geometry.parameter_shape == ((shape[axes[0]],) if len(axes) == 1 else expected)
    assert np.broadcast_shapes(geometry.input_shape, shape) == shape


@given(layouts())
def test_a_whole_batch_is_seen_as_it_is_and_each_feature_counts_its_values(
    layout: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, axes = layout
    geometry = plan(shape, axes, None)
    assert geometry.split(shape) == shape
    others = [size for axis, size in enumerate(shape) if axis not in geometry.axes]
    assert geometry.count(shape) == math.prod(others)


@given(layouts(first=1), st.sampled_from([1, 2, 3, 5]), st.integers(0, 4))
def test_virtual_batches_add_an_axis_of_size_1_to_every_parameter(
    layout: tuple[tuple[int, ...], tuple[int, ...]], size: int, groups: int
) -> None:
    shape, axes = layout
    shape = (size * groups, *shape[1:])
    geometry = plan(shape, axes, size)
    assert geometry.group_axis == 1
    assert geometry.split(shape) == (size if groups else 0, groups, *shape[1:])
    assert len(geometry.parameter_shape) == len(shape) + 1
    assert geometry.parameter_shape == geometry.view_shape == (1, 1, *geometry.input_shape[1:])
    seen = geometry.split(shape)
    kept = {1, *(axis + 1 for axis in geometry.axes)}
    assert set(geometry.reduced_axes) == set(range(len(seen))) - kept
    assert geometry.count(seen) == math.prod(n for axis, n in enumerate(seen) if axis not in kept)


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 3), max_size=3))
def test_sample_i_is_in_virtual_batch_i_mod_the_number_of_them(size: int, groups: int, rest: list[int]) -> None:
    shape = (size * groups, *rest, 2)
    samples = np.broadcast_to(np.arange(shape[0]).reshape(-1, *(1 for _ in shape[1:])), shape)
    geometry = plan(shape, -1, size)
    view = samples.reshape(geometry.split(shape))
    for group in range(groups):
        members = set(np.take(view, group, axis=1).flatten().tolist())
        assert members == {i for i in range(shape[0]) if i % groups == group}
        assert len(members) == size


@given(st.integers(1, 40), st.integers(2, 9))
def test_where_virtual_batches_must_divide_a_batch_that_does_not_is_refused_with_both_numbers(
    samples: int, size: int
) -> None:
    geometry = plan((None, 3), -1, size)
    geometry.check_divides(samples * size)
    geometry.check_divides(None)
    plan((None, 3), -1, None).check_divides(samples)
    assume(samples % size)
    with pytest.raises(ValueError, match=f"{samples} samples and virtual_batch_size={size}"):
        geometry.check_divides(samples)


@given(st.integers(0, 40), st.integers(1, 9), st.lists(st.integers(1, 3), max_size=2))
def test_virtual_batches_differ_by_one_at_most_never_exceed_their_size_and_what_is_missing_is_padded(
    samples: int, size: int, rest: list[int]
) -> None:
    shape = (samples, *rest, 2)
    geometry = plan(shape, -1, size)
    rows, groups, *others = geometry.split(shape)
    padding = geometry.padding(shape)
    assert others == [*rest, 2]
    assert groups == math.ceil(samples / size)
    assert rows * groups == samples + padding
    sizes = [len(range(group, samples, groups)) for group in range(groups)]
    assert sum(sizes) == samples
    assert max(sizes, default=0) <= size
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert padding < max(groups, 1)
    assert padding == sum(max(sizes) - members for members in sizes)
    assert (padding == 0) or samples % size


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [(7, 3, (3, 3)), (2, 5, (2, 1)), (4, 1, (1, 4)), (10, 4, (4, 3)), (8, 4, (4, 2)), (0, 4, (0, 0))],
)
def test_uneven_batches_split_into_rows_and_groups(samples: int, size: int, expected: tuple[int, int]) -> None:
    assert plan((None, 3), -1, size).split((samples, 3)) == (*expected, 3)


def test_nothing_is_padded_in_a_whole_batch_or_one_whose_size_is_not_known() -> None:
    assert plan((None, 3), -1, None).padding((7, 3)) == 0
    assert plan((None, 3), -1, 4).padding((object(), 3)) == 0


@given(layouts(first=1), st.sampled_from([1, 2, 3]))
def test_inference_sees_a_whole_batch(layout: tuple[tuple[int, ...], tuple[int, ...]], size: int) -> None:
    shape, axes = layout
    whole = plan(shape, axes, None)
    assert plan(shape, axes, size).whole == whole
    assert whole.whole is whole


@given(layouts())
def test_axes_are_counted_from_the_start_ascending(layout: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape, axes = layout
    found = counted_axes(axes, shape)
    assert list(found) == sorted(axis % len(shape) for axis in axes)
    if len(axes) == 1:
        assert counted_axes(axes[0], shape) == found
    for bad, message in (
        ((len(shape),), "must be in"),
        ((*axes, axes[0]), "must name each axis once"),
        ((-len(shape) - 1,), "must be in"),
    ):
        with pytest.raises(ValueError, match=f"^axis {message}"):
            counted_axes(bad, shape)


# What broadcasts


@given(layouts(), st.data())
def test_an_adjustment_is_by_feature_where_it_has_size_1_on_every_other_axis(
    layout: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    shape, axes = layout
    geometry = plan(shape, axes, None)
    kept = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    drop = data.draw(st.integers(0, len(shape)))
    given_shape = tuple(size if keep else 1 for size, keep in zip(shape, kept, strict=True))[drop:]
    within = all(
        size == 1 or axis in geometry.axes for axis, size in zip(range(drop, len(shape)), given_shape, strict=True)
    )
    assert geometry.check_adjustment((given_shape, ()), shape) == within
    assert geometry.check_adjustment((geometry.input_shape, given_shape), shape) == within


@pytest.mark.parametrize("wrong", [(3,), (5, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_an_adjustment_that_does_not_broadcast_is_refused_with_both_shapes(wrong: tuple[int, ...]) -> None:
    geometry = plan((None, 2), -1, None)
    for shapes in ((wrong, (2,)), ((2,), wrong)):
        with pytest.raises(ValueError, match=r"^adjustment must be or return.*shape \(4, 2\)") as caught:
            geometry.check_adjustment(shapes, (4, 2))
        assert repr(wrong) in str(caught.value)


def test_what_is_not_known_of_an_adjustment_may_fit_but_is_not_by_feature() -> None:
    geometry = plan((None, 2), -1, None)
    assert not geometry.check_adjustment([None, (2,)], (4, 2))
    assert not geometry.check_adjustment([(None, 2), (2,)], (4, 2))
    assert not geometry.check_adjustment([(9, 2), (2,)], (None, 2))
    assert geometry.check_adjustment([(None,), (1, 2)], (None, 2))


# What the kernels see


@given(layouts(), st.sampled_from([None, None, 1, 2, 3]))
def test_every_value_is_in_the_group_and_feature_that_the_kernels_see_it_in(
    layout: tuple[tuple[int, ...], tuple[int, ...]], size: int | None
) -> None:
    shape, axes = layout
    if size is not None:
        assume(0 not in {axis % len(shape) for axis in axes})
    geometry = plan(shape, axes, size)
    view = geometry.view(shape)
    runs = geometry.runs(shape)
    assert geometry.collapses(shape) == (len(runs) <= (2 if size is None else 1))
    assert (view is None) == (not geometry.collapses(shape))
    if view is None:
        return
    assert view.rows * view.features * view.inner == math.prod(shape)
    assert view.grouped_parameters == (len(runs) == 2)
    assert view.whole == plan(shape, axes, None).view(shape) if len(runs) < 2 else view.whole is view
    assert view.virtual_batches == (1 if size is None else geometry.split(shape)[1])
    if math.prod(shape) == 0:
        return
    assert view.parameters == math.prod(geometry.feature_sizes)
    rows = np.arange(view.rows)[:, None, None]
    group = np.broadcast_to(rows // view.span % view.groups, (view.rows, view.features, view.inner)).reshape(shape)
    feature = np.broadcast_to(np.arange(view.features)[None, :, None], (view.rows, view.features, view.inner))
    feature = feature.reshape(shape)
    for index in np.ndindex(*shape):
        at = np.ravel_multi_index([index[axis] for axis in geometry.axes], geometry.feature_sizes)
        if view.grouped_parameters:
            assert group[index] * view.features + feature[index] == at
        else:
            assert feature[index] == at
            assert group[index] == (0 if size is None else index[0] % view.groups)


def test_what_lies_too_far_apart_is_not_for_the_kernels_and_uneven_groups_are() -> None:
    assert plan((2, 3, 4, 5, 6), (1, 3), None).view((2, 3, 4, 5, 6)) == View(24, 3, 4, 5, 6, True)
    assert plan((2, 3, 4, 5, 6), (0, 2, 4), None).view((2, 3, 4, 5, 6)) is None
    assert plan((4, 3, 4, 5), (1, 3), 2).view((4, 3, 4, 5)) is None
    assert plan((7, 2, 3), -1, 3).view((7, 2, 3)) == View(14, 3, 2, 3, 1)
    assert plan((7, 3), -1, 3).whole.view((7, 3)) == View(7, 1, 1, 3, 1)


@pytest.mark.parametrize(("axis", "size"), [(1, None), (-1, 3), ((1, 3), None)])
def test_sizes_that_are_known_later_are_numbers_of_the_view(axis: int | tuple[int, ...], size: int | None) -> None:
    geometry = plan((None, 4, None, 2), axis, size)
    later = [np.int64(6), 4, np.int64(5), 2]  # which are no ints, as little as a symbol is
    assert geometry.view(later) == geometry.view((6, 4, 5, 2))


@pytest.mark.parametrize(
    ("shape", "axis", "size", "message"),
    [
        ((4, 3), 2, None, r"axis=2 .*\(4, 3\)"),
        ((4, 3), -3, None, r"axis=-3 .*\(4, 3\)"),
        ((4, 3), (1, 7), None, r"axis=\(1, 7\) .*\(4, 3\)"),
        ((), -1, None, r"axis=-1 .*\(\)"),
        ((4, 3), (1, -1), None, r"axis=\(1, -1\).*rank 2"),
        ((4, 5, 3), (-2, 2, 1), None, r"axis=\(-2, 2, 1\).*rank 3"),
        ((4, None), -1, None, r"known size.*axis=-1 .*\(4, None\)"),
        ((None, 3), (0, 1), None, r"known size.*axis=\(0, 1\) .*\(None, 3\)"),
        ((4, 3), 0, 2, r"virtual_batch_size=2.*axis=0"),
        ((4, 3), (1, -2), 2, r"virtual_batch_size=2.*axis=\(1, -2\)"),
    ],
)
def test_axes_that_do_not_fit_the_shape_are_refused_with_both(
    shape: tuple[int | None, ...], axis: int | tuple[int, ...], size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(shape, axis, size)


def test_sizes_off_the_feature_axes_may_be_unknown() -> None:
    assert plan((None, None, None, 3), -1, 4) == plan((8, 5, 5, 3), 3, 4)


def test_symbolic_sizes_pass_through() -> None:
    class Symbol(str):
        def __neg__(self) -> Symbol:
            return Symbol(f"-({self})")

        def __floordiv__(self, other: int) -> Symbol:
            return Symbol(f"{self} // {other}")

        def __rmul__(self, other: Any) -> Symbol:
            return Symbol(f"{other} * {self}")

    symbol = Symbol("n")
    geometry = plan((None, None, 3), -1, 4)
    assert geometry.split((symbol, 5, 3)) == (4, "-(-(n) // 4)", 5, 3)  # as many groups as hold all samples
    assert plan((None, 3), -1, None).count((symbol, 3)) == "1 * n"


def test_equal_questions_have_one_answer() -> None:
    first = plan((None, 5, 5, 11), (1, 3), None)
    assert plan((None, 5, 5, 11), (1, 3), None) is first
    assert plan((None, 5, 5, 13), (1, 3), None) is not first


def test_a_geometry_cannot_be_changed_and_can_be_a_key() -> None:
    geometry = plan((None, 3), -1, None)
    with pytest.raises(AttributeError):
        geometry.rank = 3  # type: ignore[misc]
    assert {geometry: 1}[Geometry.of(2, ((1, 3),), None)] == 1


@given(layouts(), st.data())
def test_an_input_fits_if_its_rank_and_feature_sizes_do(
    layout: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    shape, axes = layout
    geometry = plan(shape, axes, None)
    other = tuple(
        size if axis in geometry.axes else data.draw(st.sampled_from([None, 0, 1, 4]))
        for axis, size in enumerate(shape)
    )
    geometry.check_input(other)
    geometry.check_input([None] * len(shape))
    wrong = list(other)
    axis = data.draw(st.sampled_from(geometry.axes))
    wrong[axis] = shape[axis] + 1
    with pytest.raises(ValueError, match=f"size {shape[axis]} on axis {axis}.*received shape") as caught:
        geometry.check_input(wrong)
    assert repr(tuple(wrong)) in str(caught.value)


@pytest.mark.parametrize("change", [lambda shape: shape[1:], lambda shape: (1, *shape)])
def test_an_input_of_another_rank_does_not_fit(change: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"rank 3.*received shape \("):
        plan((None, 3, 3), -1, None).check_input(change((2, 3, 3)))
