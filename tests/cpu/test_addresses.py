"""The methods by address: what arrays give, and what is refused there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from .cases import (
    BUSY,
    EPSILON,
    NEAR,
    TYPES,
    Array,
    Options,
    View,
    along,
    apart,
    backward,
    by_parameter,
    check,
    drawn,
    forward,
    kernel,
    like,
    raw,
    same,
)

VIEWS = [*BUSY, View(12, 2, 3, 4, 2), View(12, 2, 3, 4, 1, True), View(6, 1, 1, 3, 1)]


def at(**arrays: Array | None) -> dict[str, int]:
    return {name: 0 if array is None else array.ctypes.data for name, array in arrays.items()}


def drawn_options(view: View, kind: Any, renorm: bool) -> Options:
    random = np.random.default_rng(0)
    values = [random.uniform(0.5, 2, view.parameters).astype(kind) for _ in range(4)]
    return Options(values[0], values[1], (values[2], values[3]) if renorm else None, (0.5, 2.0, 1.0))


def kind_of(dtype: np.dtype[Any]) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("renorm", [False, True])
def test_addresses_give_what_arrays_give(view: View, dtype: np.dtype[Any], renorm: bool) -> None:
    kind, x, dy = kind_of(dtype), drawn(view, dtype, 0), drawn(view, dtype, 1)
    o = drawn_options(view, kind, renorm)
    expected = forward(view, x, kind, o)
    found = [np.empty_like(array) if array is not None else None for array in expected]
    y, mean, variance, r, d = found
    average, stddev = o.renorm or (None, None)
    kernel(view, dtype).forward_at(
        threads=2, rmin=0.5, rmax=2.0, dmax=1.0,
        **at(x=x, y=y, mean=mean, variance=variance, factor=o.factor, offset=o.offset, renorm_mean=average,
             renorm_stddev=stddev, r=r, d=d),
    )  # fmt: skip
    assert same(found, expected)

    gradients = backward(view, x, dy, expected, o)
    dx, dfactor, doffset = like(x), np.empty_like(gradients.dfactor), np.empty_like(gradients.doffset)
    kernel(view, dtype).backward_at(
        threads=2,
        **at(x=x, dy=dy, dx=dx, mean=mean, variance=variance, factor=o.factor, r=r, d=d, dfactor=dfactor,
             doffset=doffset),
    )  # fmt: skip
    assert same([dx, dfactor, doffset], gradients)


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("renorm", [False, True])
def test_averages_move_by_the_weight_of_the_new_value(view: View, renorm: bool) -> None:
    random = np.random.default_rng(0)
    x = drawn(view, np.dtype(np.float64), 0)
    running = [random.uniform(0.5, 2, view.parameters) for _ in range(2)]
    pair = [random.uniform(0.5, 2, view.parameters) for _ in range(2)]
    before = [value.copy() for value in (*running, *pair)]
    y, mean, variance = like(x), np.empty(view.statistics), np.empty(view.statistics)
    r, d = (np.empty(view.parameters), np.empty(view.parameters)) if renorm else (None, None)
    kernel(view, x.dtype).forward_at(
        threads=1, momentum=0.3, unbiased=True, renorm_momentum=0.1,
        **at(x=x, y=y, mean=mean, variance=variance, r=r, d=d, running_mean=running[0], running_variance=running[1],
             renorm_mean=pair[0] if renorm else None, renorm_stddev=pair[1] if renorm else None),
    )  # fmt: skip
    shape = (1, -1) if view.grouped_parameters else view.statistics
    count = view.rows // view.groups * view.inner
    m, v = (moment.reshape(shape).mean(axis=0) for moment in (mean, variance))
    sigma = np.sqrt(v + EPSILON)

    def step(old: Any, new: Array, weight: float) -> Array:
        moved: Array = old + (new - old) * weight
        return moved

    np.testing.assert_allclose(running[0], step(before[0], m, 0.3), rtol=1e-12)
    if not renorm:
        np.testing.assert_allclose(running[1], step(before[1], v * count / (count - 1), 0.3), rtol=1e-12)
        return
    stddev = step(np.sqrt(before[1] + EPSILON), sigma, 0.3)
    np.testing.assert_allclose(running[1], np.maximum(stddev**2 - EPSILON, 0), rtol=1e-12)
    np.testing.assert_allclose(pair[0], step(before[2], m, 0.1), rtol=1e-12)
    np.testing.assert_allclose(pair[1], step(before[3], sigma, 0.1), rtol=1e-12)


def test_averages_that_are_not_given_stay() -> None:
    view = View(6, 1, 1, 3, 1)
    x = drawn(view, TYPES[0], 0)
    pair, r, d = np.ones((2, 3), np.float32), np.empty(3, np.float32), np.empty(3, np.float32)
    y, mean, variance = like(x), np.empty(3), np.empty(3)
    arrays = at(x=x, y=y, mean=mean, variance=variance, r=r, d=d, renorm_mean=pair[0], renorm_stddev=pair[1])
    kernel(view, x.dtype).forward_at(threads=1, momentum=0.3, **arrays)
    assert (pair == 1).all()


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_passes_by_address_give_what_they_give_by_arrays(view: View, dtype: np.dtype[Any]) -> None:
    x, dy = drawn(view, dtype, 0, mean=300.0), drawn(view, dtype, 1)
    mean, variance, first, second, *others = np.zeros((8, math.prod(view.statistics)))
    count, square_count = np.zeros((2, view.virtual_batches))
    kernel(view, dtype).moments_at(
        threads=2, **at(x=x, mean=mean, variance=variance, count=count, square_count=square_count)
    )
    kernel(view, dtype).moments(x=raw(x), mean=others[0], variance=others[1])
    assert same([mean, variance], others[:2])
    assert (count == square_count).all()
    assert count.sum() * view.parameters == view.size

    kernel(view, dtype).gradient_sums_at(threads=2, **at(x=x, dy=dy, mean=mean, dy_sum=first, dy_centered_sum=second))
    kernel(view, dtype).gradient_sums(x=raw(x), dy=raw(dy), mean=mean, dy_sum=others[0], dy_centered_sum=others[1])
    assert same([first, second], others[:2])

    dx, expected = like(x), like(x)
    kernel(view, dtype).gradient_combine_at(
        threads=2, **at(x=x, dy=dy, dx=dx, mean=mean, a=variance, b=first, c=second)
    )
    kernel(view, dtype).gradient_combine(
        x=raw(x), dy=raw(dy), dx=raw(expected), mean=mean, a=variance, b=first, c=second
    )
    assert same([dx], [expected])


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("renorm", [False, True])
def test_a_forward_pass_takes_moments_that_were_measured_elsewhere(
    view: View, dtype: np.dtype[Any], renorm: bool
) -> None:
    kind, x = kind_of(dtype), drawn(view, dtype, 0)
    o = drawn_options(view, kind, renorm)
    y, mean, variance, r, d = forward(view, drawn(view, dtype, 1), kind, o)  # those of another batch
    wide = [mean.astype(np.float64) + 0.5, variance.astype(np.float64) * 2]
    given, counts = [value.copy() for value in wide], np.full((2, view.virtual_batches), 5, kind)
    running = np.ones((2, view.parameters), kind)
    found = [None if value is None else value.copy() for value in o.renorm or (None, None)]
    arrays = at(
        x=x, y=y, mean=wide[0], variance=wide[1], factor=o.factor, offset=o.offset, renorm_mean=found[0],
        renorm_stddev=found[1], r=r, d=d, running_mean=running[0], running_variance=running[1], count=counts[0],
        square_count=counts[1],
    )  # fmt: skip
    kernel(view, dtype).forward_at(
        threads=2, measured=True, momentum=1.0, unbiased=True, rmin=0.5, rmax=2.0, dmax=1.0, **arrays
    )
    assert same(wide, given)
    assert (counts == 5).all()
    m, v = given
    assert o.factor is not None
    assert o.offset is not None
    scale, offset = along(o.factor, view), along(o.offset, view)
    if o.renorm is not None:
        assert r is not None
        assert d is not None
        scale, offset = scale * along(r, view), offset + along(d, view) * scale
        s = np.maximum(o.renorm[1].astype(np.float64), np.sqrt(EPSILON))
        shared = by_parameter(v.reshape(view.statistics), view).reshape(-1) / view.virtual_batches
        check(r, np.clip(np.sqrt(shared + EPSILON) / s, 0.5, 2.0), NEAR["float32"])
    expected = (apart(x, view) - along(m, view)) / np.sqrt(along(v, view) + EPSILON) * scale + offset
    check(y, expected, NEAR[dtype.name], np.abs(expected).max())
    check(running[0], by_parameter(m.reshape(view.statistics), view) / view.virtual_batches, NEAR["float32"], 1.0)
    if not renorm:
        average = by_parameter(v.reshape(view.statistics), view) / view.virtual_batches
        check(running[1], average * 5 / 4, NEAR["float32"])


VIEW = View(12, 2, 3, 4, 2)
FORWARD = ["x", "y", "mean", "variance", "factor", "offset", "renorm_mean", "renorm_stddev", "r", "d"]
BACKWARD = ["x", "dy", "dx", "mean", "variance", "factor", "r", "d", "dfactor", "doffset"]
PASSES = {
    "moments_at": ["x", "mean", "variance", "count", "square_count"],
    "gradient_sums_at": ["x", "dy", "mean", "dy_sum", "dy_centered_sum"],
    "gradient_combine_at": ["x", "dy", "dx", "mean", "a", "b", "c"],
}
NEEDED = {
    "forward_at": ["x", "y", "mean", "variance", "renorm_mean", "renorm_stddev", "r", "d"],
    "backward_at": ["x", "dy", "dx", "mean", "variance", "r", "d"],
    **PASSES,
}


def arguments(method: str) -> tuple[dict[str, Any], dict[str, Array]]:
    names = {"forward_at": FORWARD, "backward_at": BACKWARD, **PASSES}[method]
    doubles = ("mean", "variance", "count", "square_count", "dy_sum", "dy_centered_sum", "a", "b", "c")
    arrays = {name: np.full(VIEW.size, 7.0, np.float64 if name in doubles else np.float32) for name in names}
    return {"threads": 2, **at(**arrays)}, arrays


def refuses(error: type[Exception], method: str, match: str | None = None, **changed: Any) -> None:
    given, arrays = arguments(method)
    with pytest.raises(error, match=match):
        getattr(kernel(VIEW, TYPES[0]), method)(**{**given, **changed})
    assert all((array == 7).all() for array in arrays.values())


@pytest.mark.parametrize("method", NEEDED)
def test_what_the_tests_of_refusals_change_is_accepted_as_it_is(method: str) -> None:
    given, arrays = arguments(method)
    getattr(kernel(VIEW, TYPES[0]), method)(**given)
    assert any((array != 7).any() for array in arrays.values())


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in NEEDED for name in NEEDED[method]])
def test_an_address_of_no_memory_is_a_value_error_that_names_it(method: str, name: str) -> None:
    refuses(ValueError, method, f"^{name} has no memory", **{name: 0})


@pytest.mark.parametrize("method", NEEDED)
def test_arrays_without_elements_need_no_memory(method: str) -> None:
    given, arrays = arguments(method)
    given.update(dict.fromkeys(["x", "y", "dy", "dx"] & given.keys(), 0))
    getattr(kernel(VIEW._replace(rows=0), TYPES[0]), method)(**given)
    assert (arrays["mean"][:8] == 0).all() == (method in ("forward_at", "moments_at"))


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize("threads", [0, -1, -(2**40)])
def test_fewer_than_one_thread_are_a_value_error(method: str, threads: int) -> None:
    refuses(ValueError, method, "threads must be at least 1", threads=threads)


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize("name", ["x", "mean", "threads"])
@pytest.mark.parametrize("value", [None, "3", 2.5, 2**64, [1]])
def test_an_address_that_is_no_integer_of_64_bits_is_a_type_error(method: str, name: str, value: Any) -> None:
    refuses(TypeError, method, **{name: value})


@pytest.mark.parametrize("method", NEEDED)
def test_arguments_come_by_keyword_only_and_by_no_other_name(method: str) -> None:
    given, _ = arguments(method)
    with pytest.raises(TypeError):
        getattr(kernel(VIEW, TYPES[0]), method)(*given.values())
    refuses(TypeError, method, gamma=1)
    for name in ("threads", "x", "mean"):
        with pytest.raises(TypeError):
            getattr(kernel(VIEW, TYPES[0]), method)(**{key: value for key, value in given.items() if key != name})
