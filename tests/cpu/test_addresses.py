"""The methods by address: what arrays give, and what is refused there."""

from __future__ import annotations

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
    check,
    drawn,
    forward,
    kernel,
    like,
    over,
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


WHOLE = [view for view in VIEWS if view.virtual_batches == 1]


@pytest.mark.parametrize("view", WHOLE, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("renorm", [False, True])
def test_two_replicas_train_as_the_formulas_say(view: View, dtype: np.dtype[Any], renorm: bool) -> None:
    """Both with half of each parameter's values, the second one with options of its own."""
    kind, near = kind_of(dtype), NEAR[dtype.name]
    xs, dys = ([drawn(view, dtype, seed + i, mean=30.0) for i in range(2)] for seed in (0, 2))
    options = [drawn_options(view, kind, renorm) for _ in range(2)]
    first = options[1]
    assert first.factor is not None
    assert first.offset is not None
    options[1] = first._replace(factor=first.factor / kind(2), offset=first.offset - kind(1))
    totals = [np.empty(2 + 2 * view.parameters) for _ in range(2)]
    for x, own in zip(xs, totals, strict=True):
        kernel(view, dtype).totals_at(threads=2, **at(x=x, totals=own))
    total = np.add(*totals)
    n, both = 2 * view.size // view.parameters, [apart(x, view) for x in xs]
    assert (total[:2] == n).all()
    m = np.sum([over(x) for x in both], axis=0).reshape(-1) / n
    v = np.sum([over((x - along(m, view)) ** 2) for x in both], axis=0).reshape(-1) / n
    sigma = np.sqrt(v + EPSILON)

    results, gradients = [], []
    kept: list[Any] = []
    for x, dy, o in zip(xs, dys, options, strict=True):
        averages = [None, None] if o.renorm is None else [value.copy() for value in o.renorm]
        y, moments, counts = like(x), np.empty((2, view.parameters)), np.empty((2, 1), kind)
        running = np.ones((2, view.parameters), kind)
        r, d = np.empty((2, view.parameters), kind) if renorm else (None, None)
        kernel(view, dtype).forward_at(
            threads=2, momentum=1.0, unbiased=True, rmin=0.5, rmax=2.0, dmax=1.0,
            **at(x=x, y=y, mean=moments[0], variance=moments[1], factor=o.factor, offset=o.offset,
                 renorm_mean=averages[0], renorm_stddev=averages[1], r=r, d=d, running_mean=running[0],
                 running_variance=running[1], count=counts[0], square_count=counts[1], totals=total),
        )  # fmt: skip
        check(moments[0], m, 1e-7)
        check(moments[1], v, 1e-5)
        assert (counts == n).all()
        assert o.factor is not None
        assert o.offset is not None
        scale, offset = along(o.factor, view), along(o.offset, view)
        if o.renorm is not None:
            assert r is not None
            assert d is not None
            s = np.maximum(o.renorm[1].astype(np.float64), np.sqrt(EPSILON))
            check(r, np.clip(sigma / s, 0.5, 2.0), 1e-5)
            check(d, np.clip((m - o.renorm[0]) / s, -1, 1), 1e-5)
            scale, offset = scale * along(r, view), offset + along(d, view) * scale
        expected = (apart(x, view) - along(m, view)) / along(sigma, view) * scale + offset
        check(y, expected, near, np.abs(expected).max())
        check(running[0], m, 1e-6)
        check(running[1], v if renorm else v * n / (n - 1), 1e-5, 1e-3)

        own, (dfactor, doffset) = np.empty_like(total), np.empty((2, view.parameters), kind)
        given = at(x=x, dy=dy, mean=moments[0], variance=moments[1], count=counts[0], factor=o.factor, r=r, d=d)
        kernel(view, dtype).totals_gradient_at(threads=2, **given, **at(totals=own, dfactor=dfactor, doffset=doffset))
        wide, xhat = apart(dy, view), (apart(x, view) - along(m, view)) / along(sigma, view)
        corrected = xhat if r is None or d is None else xhat * along(r, view) + along(d, view)
        largest = np.abs(over(np.abs(wide))).max()
        check(dfactor, over(wide * corrected), 1e-5, largest)
        check(doffset, over(wide), 1e-5, largest)
        gradients.append(own)
        kept.append((moments, counts, o, r, d))  # whose addresses are used once more
        results.append((given, wide * scale, xhat))
    gradient = np.add(*gradients)
    assert (gradient[:2] == 0).all()
    mean = np.sum([over(dy) for _, dy, _ in results], axis=0) / n
    slope = np.sum([over(dy * xhat) for _, dy, xhat in results], axis=0) / n
    for x, (given, dy, xhat) in zip(xs, results, strict=True):
        dx = like(x)
        kernel(view, dtype).totals_combine_at(threads=2, **given, **at(dx=dx, totals=gradient))
        expected = (dy - along(mean, view) - xhat * along(slope, view)) / along(sigma, view)
        check(dx, expected, near, np.abs(expected).max())


def test_totals_are_of_whole_batches() -> None:
    view = View(12, 2, 3, 4, 2)
    x, totals = np.full(view.size, 7, np.float32), np.full(18, 7.0)
    with pytest.raises(ValueError, match="totals must be of a whole batch"):
        kernel(view, TYPES[0]).totals_at(threads=1, **at(x=x, totals=totals))
    assert (totals == 7).all()


VIEW = View(12, 2, 3, 4, 2)
FORWARD = ["x", "y", "mean", "variance", "factor", "offset", "renorm_mean", "renorm_stddev", "r", "d"]
BACKWARD = ["x", "dy", "dx", "mean", "variance", "factor", "r", "d", "dfactor", "doffset"]
REPLICAS = {
    "totals_at": ["x", "totals"],
    "totals_gradient_at": ["x", "dy", "mean", "variance", "count", "r", "d", "totals"],
    "totals_combine_at": ["x", "dy", "dx", "mean", "variance", "count", "r", "d", "totals"],
}
NEEDED = {
    "forward_at": ["x", "y", "mean", "variance", "renorm_mean", "renorm_stddev", "r", "d"],
    "backward_at": ["x", "dy", "dx", "mean", "variance", "r", "d"],
    **REPLICAS,
}


def view_of(method: str) -> View:
    return VIEW._replace(groups=1, span=1) if method in REPLICAS else VIEW


def arguments(method: str) -> tuple[dict[str, Any], dict[str, Array]]:
    names = {"forward_at": FORWARD, "backward_at": BACKWARD, **REPLICAS}[method]
    doubles = ("mean", "variance", "totals")
    arrays = {name: np.full(VIEW.size, 7.0, np.float64 if name in doubles else np.float32) for name in names}
    return {"threads": 2, **at(**arrays)}, arrays


def refuses(error: type[Exception], method: str, match: str | None = None, **changed: Any) -> None:
    given, arrays = arguments(method)
    with pytest.raises(error, match=match):
        getattr(kernel(view_of(method), TYPES[0]), method)(**{**given, **changed})
    assert all((array == 7).all() for array in arrays.values())


@pytest.mark.parametrize("method", NEEDED)
def test_what_the_tests_of_refusals_change_is_accepted_as_it_is(method: str) -> None:
    given, arrays = arguments(method)
    getattr(kernel(view_of(method), TYPES[0]), method)(**given)
    assert any((array != 7).any() for array in arrays.values())


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in NEEDED for name in NEEDED[method]])
def test_an_address_of_no_memory_is_a_value_error_that_names_it(method: str, name: str) -> None:
    refuses(ValueError, method, f"^{name} has no memory", **{name: 0})


@pytest.mark.parametrize("method", NEEDED)
def test_arrays_without_elements_need_no_memory(method: str) -> None:
    given, arrays = arguments(method)
    given.update(dict.fromkeys(["x", "y", "dy", "dx"] & given.keys(), 0))
    getattr(kernel(view_of(method)._replace(rows=0), TYPES[0]), method)(**given)
    zeros = {"forward_at": "mean", "totals_at": "totals"}.get(method)
    assert zeros is None or (arrays[zeros][:8] == 0).all()


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize("threads", [0, -1, -(2**40)])
def test_fewer_than_one_thread_are_a_value_error(method: str, threads: int) -> None:
    refuses(ValueError, method, "threads must be at least 1", threads=threads)


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize("name", ["x", "threads"])
@pytest.mark.parametrize("value", [None, "3", 2.5, 2**64, [1]])
def test_an_address_that_is_no_integer_of_64_bits_is_a_type_error(method: str, name: str, value: Any) -> None:
    refuses(TypeError, method, **{name: value})


@pytest.mark.parametrize("method", NEEDED)
def test_arguments_come_by_keyword_only_and_by_no_other_name(method: str) -> None:
    given, _ = arguments(method)
    with pytest.raises(TypeError):
        getattr(kernel(view_of(method), TYPES[0]), method)(*given.values())
    refuses(TypeError, method, gamma=1)
    for name in ("threads", "x", "mean" if "mean" in given else "totals"):
        with pytest.raises(TypeError):
            getattr(kernel(view_of(method), TYPES[0]), method)(
                **{key: value for key, value in given.items() if key != name}
            )
