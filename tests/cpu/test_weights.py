"""Weights and uneven virtual batches in the kernels: against NumPy in float64, the oracle of loops, and `core`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm import cpu
from batchnorm.core import geometry, normalize
from batchnorm.core.normalize import Renorm
from batchnorm.core.options import Clipping
from batchnorm.numpy import namespace as xp
from tests.oracle import Oracle, differences

from .cases import (
    EPSILON,
    NEAR,
    TYPES,
    Array,
    Backward,
    Forward,
    Options,
    View,
    along,
    backward,
    by_parameter,
    check,
    drawn,
    forward,
    kernel,
    kinds,
    like,
    options,
    raw,
    same,
    seeds,
    types,
    views,
)  # fmt: skip

# ---- Weights, and the same in float64.


def positions(view: View) -> int:
    rows = view.rows // view.groups if view.grouped_parameters else view.rows
    return rows * view.inner


def virtual_batches(view: View) -> int:
    return 1 if view.grouped_parameters else view.groups


def group_of_row(view: View) -> Array:
    rows: Array = np.arange(view.rows) // view.span % view.groups
    return rows


def spread(weights: Array, view: View) -> Array:
    """Weights for each row, feature and place, to go with values of that shape."""
    given = weights.astype(np.float64).reshape(-1, view.inner)
    rows = np.arange(view.rows)
    if view.grouped_parameters:
        rows = rows // (view.groups * view.span) * view.span + rows % view.span
    return np.broadcast_to(given[rows][:, None, :], (view.rows, view.features, view.inner))


MASKS = ["all", "none", "one", "alternating", "stretches", "blocks", "a group", "drawn"]


def masked(view: View, name: str, seed: int) -> Array:
    """A mask of every kind that a kernel may treat in a way of its own."""
    random, n = np.random.default_rng(seed), positions(view)
    mask = np.zeros(n, bool)
    if name == "all":
        mask[:] = True
    elif name == "one" and n:
        mask[random.integers(n)] = True
    elif name == "alternating":
        mask[seed % 2 :: 2] = True
    elif name in ("stretches", "blocks"):
        length = int(random.integers(1, 40)) if name == "stretches" else 64 * int(random.integers(1, 4))
        mask[:] = np.repeat(random.random(n // length + 1) < 0.5, length)[:n]
    elif name == "a group":
        mask[:] = random.random(n) < 0.7
        if not view.grouped_parameters:
            mask.reshape(view.rows, view.inner)[group_of_row(view) == random.integers(view.groups)] = False
    elif name == "drawn":
        mask[:] = random.random(n) < random.random()
    return mask


class Weighing(NamedTuple):
    """What a call is given."""

    array: Array
    zeroed: bool

    @property
    def given(self) -> dict[str, Any]:
        name = "weights" if self.array.dtype.kind == "f" else "mask"
        return {name: self.array, "zeroed": self.zeroed}


@st.composite
def weighings(draw: st.DrawFn, view: View) -> Weighing:
    name, seed, kind = draw(st.sampled_from(MASKS)), draw(seeds), draw(st.sampled_from("b1fd"))
    mask = masked(view, name, seed)
    if kind in "fd":
        random = np.random.default_rng(seed)
        values = draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.25, 0.5, 0.75)]))
        mask = (mask * random.choice(values, mask.shape)).astype(kind)
    return Weighing(mask if kind == "b" else mask.astype(np.uint8) * 3 if kind == "1" else mask, draw(st.booleans()))


def uneven(view: View, more: int) -> View:
    """With more samples than the groups divide, fewer than there are groups."""
    if view.grouped_parameters:
        return view
    return view._replace(rows=view.rows + more % view.groups * view.span)


class Exact(NamedTuple):
    """Moments and their counts by group and feature, in float64."""

    mean: Array
    variance: Array
    total: Array
    squares: Array


def measured(x: Array, weights: Array, view: View) -> Exact:
    values, found = x.astype(np.float64).reshape(view.rows, view.features, view.inner), []
    for group in range(view.groups):
        rows = group_of_row(view) == group
        w, own = weights[rows], values[rows]
        count = w.sum(axis=(0, 2))
        number = np.where(count > 0, count, 1)
        own = np.where(w > 0, own, 0)
        mean = (w * own).sum(axis=(0, 2)) / number
        variance = (w * (own - mean[:, None]) ** 2).sum(axis=(0, 2)) / number
        found.append((mean, variance, count, (w * w).sum(axis=(0, 2))))
    return Exact(*(np.array(each) for each in zip(*found, strict=True)))


def by_row(statistics: Array, view: View) -> Array:
    """Statistics, or parameters, for each row."""
    given = np.asarray(statistics, np.float64).reshape(-1, view.features)
    return (given[group_of_row(view)] if len(given) == view.groups else given[[0] * view.rows])[:, :, None]


def weighted_forward(view: View, x: Array, weighing: Weighing | None, kind: Any, o: Options) -> tuple[Forward, Pair]:
    y, mean, variance = like(x), np.empty(view.statistics), np.empty(view.statistics)
    count, square_count = np.empty(virtual_batches(view), kind), np.empty(virtual_batches(view), kind)
    r, d = (None, None) if o.renorm is None else (np.empty(view.parameters, kind), np.empty(view.parameters, kind))
    average, stddev = o.renorm or (None, None)
    rmin, rmax, dmax = o.limits
    kernel(view, x.dtype).forward(
        x=raw(x), y=raw(y), factor=o.factor, offset=o.offset, renorm_mean=average, renorm_stddev=stddev, rmin=rmin,
        rmax=rmax, dmax=dmax, mean=mean, variance=variance, r=r, d=d, count=count, square_count=square_count,
        **({} if weighing is None else weighing.given),
    )  # fmt: skip
    return Forward(y, mean, variance, r, d), (count, square_count)


Pair = tuple[Array, Array]


def weighted_backward(
    view: View, x: Array, dy: Array, result: Forward, weighing: Weighing, count: Array, o: Options
) -> Backward:
    kind = count.dtype
    dx, dfactor, doffset = like(x), np.empty(view.parameters, kind), np.empty(view.parameters, kind)
    kernel(view, x.dtype).backward(
        x=raw(x), dy=raw(dy), dx=raw(dx), mean=result.mean, variance=result.variance, factor=o.factor, r=result.r,
        d=result.d, dfactor=dfactor, doffset=doffset, count=count, **weighing.given,
    )  # fmt: skip
    return Backward(dx, dfactor, doffset)


def spoilt(x: Array, dead: Array) -> Array:
    """With NaN and infinity where nothing counts."""
    found = x.copy()
    found[dead.reshape(-1)] = np.nan
    found[np.flatnonzero(dead)[::3]] = np.inf
    return found


# ---- Forward and backward.


@settings(max_examples=150)
@given(st.data(), views(), st.integers(0, 12), types, kinds, seeds)
def test_a_step_with_weights_is_the_formula_with_every_option(
    data: st.DataObject, view: View, more: int, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    view = uneven(view, more)
    o, weighing = data.draw(options(view.parameters, kind)), data.draw(weighings(view))
    w = spread(weighing.array > 0 if weighing.array.dtype.kind != "f" else weighing.array, view)
    live = w > 0
    x = spoilt(drawn(view, dtype, seed), ~live)
    found, (count, square_count) = weighted_forward(view, x, weighing, kind, o)
    exact = dtype == kind == np.float64
    near = 1e-11 if exact else 4e-6
    true = measured(x, w, view)
    check(found.mean, true.mean, near, 1.0)
    check(found.variance, true.variance, near, 1.0)
    check(count, true.total[: len(count), 0], 1e-6)
    check(square_count, true.squares[: len(count), 0], 1e-6)

    values = np.where(live, x.astype(np.float64).reshape(live.shape), 0.0)
    sigma = np.sqrt(true.variance + EPSILON)
    r, d = np.ones(view.parameters), np.zeros(view.parameters)
    if o.renorm is not None:
        assert found.r is not None
        assert found.d is not None
        floor = np.maximum(o.renorm[1].astype(np.float64), np.sqrt(EPSILON))
        average = [moment.ravel() for moment in true[:2]]
        if not view.grouped_parameters:
            total = true.total.sum(axis=0)
            share = true.total / np.where(total > 0, total, 1)
            average = [(moment * share).sum(axis=0) for moment in true[:2]]
        r = np.clip(np.sqrt(average[1] + EPSILON) / floor, *o.limits[:2])
        d = np.clip((average[0] - o.renorm[0]) / floor, -o.limits[2], o.limits[2])
        check(found.r, r, 1e-11 if exact else 2e-5, 1.0)
        check(found.d, d, 1e-11 if exact else 2e-5, 1.0)
    factor = np.ones(view.parameters) if o.factor is None else o.factor.astype(np.float64)
    offset = np.zeros(view.parameters) if o.offset is None else o.offset
    centered = np.where(live, values - by_row(true.mean, view), 0)
    normal = centered / by_row(sigma, view)
    y = (normal * by_row(r, view) + by_row(d, view)) * by_row(factor, view) + by_row(offset, view)
    result = found.y.astype(np.float64).reshape(live.shape)
    tolerance = NEAR[dtype.name] if exact else max(NEAR[dtype.name], 5e-5)
    check(result[live], y[live], tolerance, 8.0)
    assert (result[~live] == 0).all() if weighing.zeroed else not np.isfinite(result[~live]).any()

    dy = drawn(view, dtype, seed + 1, 0.2, 1.0)
    if weighing.zeroed:
        dy = spoilt(dy, ~live)
    statistics = Forward(x, true.mean.astype(kind), true.variance.astype(kind), *(
        (None, None) if o.renorm is None else (r.astype(kind), d.astype(kind))
    ))  # fmt: skip
    gradients = weighted_backward(view, x, dy, statistics, weighing, count, o)
    up = dy.astype(np.float64).reshape(live.shape)
    if weighing.zeroed:
        up = np.where(live, up, 0)
    sums, products, size = (np.zeros(view.statistics) for _ in range(3))
    np.add.at(sums, group_of_row(view), up.sum(axis=2))
    np.add.at(products, group_of_row(view), (up * normal).sum(axis=2))
    np.add.at(size, group_of_row(view), (np.abs(up) * (1 + np.abs(normal))).sum(axis=2))
    number = np.where(true.total > 0, true.total, 1)
    k = by_row(factor, view) * by_row(r, view) / by_row(sigma, view)
    dx = k * (up - w * (by_row(sums / number, view) + normal * by_row(products / number, view)))
    bound = np.abs(k) * (np.abs(up) + w * by_row(size / number, view) * (1 + np.abs(normal)) + np.abs(normal))
    check(gradients.dx, dx, max(NEAR[dtype.name], 1e-11 if exact else 5e-5), bound)
    by_r, by_d = r.reshape(-1, view.features), d.reshape(-1, view.features)
    size = by_parameter(size * (np.abs(by_r) + np.abs(by_d)), view) * 4 + 1
    check(gradients.dfactor, by_parameter(products * by_r + sums * by_d, view), 1e-10 if exact else 2e-5, size)
    check(gradients.doffset, by_parameter(sums, view), 1e-10 if exact else 2e-5, size)


@settings(max_examples=60)
@given(st.data(), views(), st.integers(0, 12), types, kinds, seeds)
def test_the_four_passes_are_those_of_the_step(
    data: st.DataObject, view: View, more: int, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    view = uneven(view, more)
    weighing = data.draw(weighings(view))
    live = spread(weighing.array > 0, view) > 0
    w = spread(weighing.array, view) if weighing.array.dtype.kind == "f" else live
    x = spoilt(drawn(view, dtype, seed), ~live)
    dy = drawn(view, dtype, seed + 1)
    if weighing.zeroed:
        dy = spoilt(dy, ~live)
    of = kernel(view, dtype)
    plain, centered = (np.empty(view.statistics, kind) for _ in range(2))
    mean, variance = (np.empty(view.statistics) for _ in range(2))
    named = {name: value for name, value in weighing.given.items() if name != "zeroed"}
    of.moments(x=raw(x), mean=mean, variance=variance, **named)
    step, _ = weighted_forward(view, x, weighing, kind, Options())
    assert same([mean, variance], step[1:3])
    random = np.random.default_rng(seed)
    m, a, b, c = (random.normal(size=view.statistics).astype(kind) for _ in range(4))
    y, dx = like(x), like(x)
    of.normalize(x=raw(x), y=raw(y), mean=m, scale=a, offset=b, **weighing.given)
    clean = np.where(live, x.astype(np.float64).reshape(live.shape), 0)
    distance = np.where(live, clean - by_row(m, view), 0)
    expected = distance * by_row(a, view) + by_row(b, view)
    size = np.abs(distance * by_row(a, view)) + np.abs(by_row(b, view)) + np.zeros(live.shape)
    check(y.reshape(live.shape)[live], expected[live], NEAR[dtype.name], size[live])
    assert not weighing.zeroed or (y.reshape(live.shape)[~live] == 0).all()
    of.gradient_sums(x=raw(x), dy=raw(dy), mean=m, dy_sum=plain, dy_centered_sum=centered, **weighing.given)
    up = dy.astype(np.float64).reshape(live.shape)
    up = np.where(live, up, 0) if weighing.zeroed else up
    sums = np.zeros((4, *view.statistics))
    for total, terms in zip(sums, (up, np.abs(up), up * distance, np.abs(up) * (1 + np.abs(distance))), strict=True):
        np.add.at(total, group_of_row(view), terms.sum(axis=2))
    near = 1e-11 if dtype == kind == np.float64 else 2e-6
    check(plain, sums[0], near, sums[1] + 1)
    check(centered, sums[2], near, sums[3] + 1)
    of.gradient_combine(x=raw(x), dy=raw(dy), dx=raw(dx), mean=m, a=a, b=b, c=c, **weighing.given)
    terms = up * by_row(a, view), w * distance * by_row(b, view), w * by_row(c, view)
    check(dx, sum(terms), NEAR[dtype.name], sum(np.abs(term) for term in terms) + 1e-4)  # type: ignore[arg-type]


@settings(max_examples=40)
@given(st.data(), views(), types, st.booleans())
def test_a_mask_of_ones_changes_nothing_but_rounding(
    data: st.DataObject, view: View, dtype: np.dtype[Any], zeroed: bool
) -> None:
    o = data.draw(options(view.parameters, np.dtype(np.float32)))
    x, dy = drawn(view, dtype, 0), drawn(view, dtype, 1)
    plain = forward(view, x, np.float64, o)
    ones = Weighing(np.ones(positions(view), data.draw(st.sampled_from([np.bool_, np.float32]))), zeroed)
    found, (count, _) = weighted_forward(view, x, ones, np.float64, o)
    gradients = backward(view, x, dy, plain, o), weighted_backward(view, x, dy, plain, ones, count, o)
    for one, other in [*zip(plain, found, strict=True), *zip(*gradients, strict=True)]:
        if one is not None and other is not None:
            scale = np.abs(one.astype(np.float64)).max(initial=0) + 1
            if one is gradients[0].dfactor or one is gradients[0].doffset:
                scale += view.rows * view.inner * 4
            check(other, one, max(NEAR[dtype.name], 1e-5), scale)


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize(
    "view", [View(63, 1, 1, 5, 1), View(63, 3, 1, 5, 1), View(12, 2, 3, 3, 70), View(66, 3, 2, 5, 1, True)]
)
def test_weights_may_be_scaled_without_changing_anything(view: View, factor: float) -> None:
    random = np.random.default_rng(0)
    x, dy = drawn(view, TYPES[1], 0), drawn(view, TYPES[1], 1)
    weights = random.choice([0.0, 1.0, 0.5, 2.0], positions(view))
    results = []
    for scale in (1.0, factor):
        weighing = Weighing(weights * scale, True)
        found, (count, square_count) = weighted_forward(view, x, weighing, np.float64, Options())
        average = np.zeros(view.parameters), np.ones(view.parameters)
        kernel(view, x.dtype).move_averages(
            mean=found.mean, variance=found.variance, running_mean=average[0], running_variance=average[1],
            momentum=0.3, unbiased=True, count=count, square_count=square_count,
        )  # fmt: skip
        results.append([*found[:3], *weighted_backward(view, x, dy, found, weighing, count, Options()), *average])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("kind", [np.bool_, np.float64])
@pytest.mark.parametrize(
    "view",
    [View(12, 1, 1, 3, 1), View(10, 3, 1, 2, 1), View(14, 2, 2, 3, 1), View(4, 1, 1, 2, 5), View(5, 3, 1, 2, 3),
     View(12, 2, 3, 3, 1, True), View(12, 3, 2, 2, 3, True)],
)  # fmt: skip
def test_gradients_with_weights_are_those_of_finite_differences(view: View, kind: Any, zeroed: bool) -> None:
    random = np.random.default_rng(0)
    o = Options(random.uniform(0.5, 2, view.parameters), random.uniform(0.5, 2, view.parameters))
    x, dy = random.normal(3, 2, view.size), random.normal(size=view.size)
    weighing = Weighing(
        random.choice([0, 1] if kind is np.bool_ else [0, 1, 0.5], positions(view)).astype(kind), zeroed
    )
    live = np.ascontiguousarray(spread(weighing.array, view) > 0).reshape(-1)
    if not zeroed:  # outputs there depend on moments that they have no part in; gradients leave that out
        dy[~live] = 0

    def loss(x: Array, factor: Array, offset: Array) -> float:
        found, _ = weighted_forward(view, x, weighing, np.float64, Options(factor, offset))
        return float(np.dot(found.y, dy))

    assert o.factor is not None
    assert o.offset is not None
    found, (count, _) = weighted_forward(view, x, weighing, np.float64, o)
    gradients = weighted_backward(view, x, dy, found, weighing, count, o)
    factor, offset = o.factor, o.offset
    np.testing.assert_allclose(gradients.dx, differences(lambda x: loss(x, factor, offset), x), atol=1e-7)
    np.testing.assert_allclose(gradients.dfactor, differences(lambda v: loss(x, v, offset), factor), atol=1e-7)
    np.testing.assert_allclose(gradients.doffset, differences(lambda v: loss(x, factor, v), offset), atol=1e-7)


# ---- Against the oracle of loops, and `core`.

SHAPES: dict[str, tuple[tuple[int, ...], Any, int | None]] = {
    "features last": ((7, 5), -1, None),
    "sequences": ((5, 9, 4), -1, None),
    "features in the middle": ((3, 4, 5), 1, None),
    "images": ((3, 2, 5, 7), 1, None),
    "axes apart": ((3, 4, 2, 3), (1, 3), None),
    "axes together": ((3, 4, 2, 5), (1, 2), None),
    "virtual batches of 3, 2 and 2": ((7, 4), -1, 3),
    "wide virtual batches of 4, 3 and 3": ((10, 70), -1, 4),
    "virtual batches of sequences": ((5, 6, 3), -1, 2),
    "virtual batches of images": ((5, 3, 4, 3), 1, 2),
    "virtual batches of wide images": ((5, 2, 8, 9), 1, 3),
    "virtual batches of one": ((3, 4), -1, 1),
}


@pytest.mark.parametrize("masked", ["zero", "normalized"])
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("weights", ["none", "mask", "first empty", "nothing", "real"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_is_that_of_the_oracle_and_of_the_core(
    name: str, weights: str, renorm: bool, masked: normalize.Masked
) -> None:
    (shape, axis, size), random = SHAPES[name], np.random.default_rng(3)
    plan = geometry.plan(shape, axis, size)
    full = tuple(1 if a in plan.axes else n for a, n in enumerate(shape))
    given: Array | None = None
    if weights != "none":
        given = random.choice([0.0, 0.5, 1.0, 2.0] if weights == "real" else [0.0, 1.0], full)
        if weights == "first empty":
            given[:: plan.split(shape)[1] if size else 2] = 0
        elif weights == "nothing":
            given[:] = 0
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    oracle = Oracle.build(
        shape, axis, renorm=renorm, virtual_batch_size=size, bessel=not renorm, masked=masked, rmin=0.5, rmax=2.0,
        dmax=1.0, initial={n: random.uniform(0.5, 2, math.prod(plan.feature_sizes)) for n in names},
    )  # fmt: skip
    x, dy = random.normal(3, 2, shape), random.normal(size=shape)
    live = np.broadcast_to(True if given is None else given > 0, shape)
    x[~live] = 7
    variables = {n: np.ascontiguousarray(v.reshape(-1)) for n, v in oracle.variables.items()}
    groups = oracle.moments(x, given)
    corrections = oracle.corrections(oracle.averages(groups))
    expected = oracle.output(x, corrections, None, given)
    slopes = oracle.gradients(x, dy, corrections, None, given)

    view = plan.view(shape)
    assert view is not None
    of = cpu.kernel(view, "float64", oracle.epsilon)
    y, dx, mean, variance = np.empty(shape), np.empty(shape), *(np.empty((view.groups, view.features)) for _ in "mv")
    count, square_count = np.empty(view.virtual_batches), np.empty(view.virtual_batches)
    r, d, dfactor, doffset = (np.empty(view.parameters) for _ in range(4))
    weighing: dict[str, Any] = {} if given is None else {"zeroed": masked == "zero"}
    if given is not None:
        weighing |= {"weights": given} if weights == "real" else {"mask": given > 0}
    corrected = {"r": r, "d": d} if renorm else {}
    pair = {n: variables[n] for n in ("renorm_mean", "renorm_stddev") if renorm}
    assert given is None or given.size == of.positions
    spoiled = x.copy()
    if masked == "zero":
        spoiled[~live] = np.nan
    of.forward(
        x=spoiled, y=y, mean=mean, variance=variance, factor=variables["gamma"], offset=variables["beta"], count=count,
        square_count=square_count, rmin=0.5, rmax=2.0, dmax=1.0, **weighing, **pair, **corrected,
    )  # fmt: skip
    np.testing.assert_allclose(y, expected, atol=1e-11)
    of.backward(
        x=spoiled, dy=dy, dx=dx, mean=mean, variance=variance, factor=variables["gamma"], dfactor=dfactor,
        doffset=doffset, **corrected, **weighing, **({} if given is None else {"count": count}),
    )  # fmt: skip
    np.testing.assert_allclose(dx, slopes.x, atol=1e-11)
    np.testing.assert_allclose(dfactor, slopes.gamma.reshape(-1), atol=1e-11)
    np.testing.assert_allclose(doffset, slopes.beta.reshape(-1), atol=1e-11)

    given_core: dict[str, Any] = {"gamma": variables["gamma"], "beta": variables["beta"]}
    if given is not None:
        given_core |= {"weights": given, "masked": masked}
    trained = normalize.train(
        xp, x, plan, oracle.epsilon, **given_core,
        renorm=Renorm(pair["renorm_mean"], pair["renorm_stddev"], Clipping(0.5, 2.0, 1.0)) if renorm else None,
    )  # fmt: skip
    composed = normalize.train_gradient(xp, dy, trained, plan, oracle.epsilon, **given_core)
    np.testing.assert_allclose(y, trained.y, atol=1e-11)
    np.testing.assert_allclose(dx, composed.x, atol=1e-11)

    averages = {"running_mean": "moving_mean", "running_variance": "moving_variance", "running_stddev": "moving_stddev"}
    moved = {
        n: variables[averages.get(n, n)].copy()
        for n in (*averages, "renorm_mean", "renorm_stddev")
        if averages.get(n, n) in variables
    }
    of.move_averages(
        mean=mean, variance=variance, **moved, momentum=1 - oracle.momentum, unbiased=True,
        renorm_momentum=1 - oracle.renorm_momentum,
        **({} if given is None else {"count": count, "square_count": square_count}),
    )  # fmt: skip
    oracle.train(x, given)
    for n, value in moved.items():
        np.testing.assert_allclose(value, oracle.variables[averages.get(n, n)].reshape(-1), atol=1e-11, err_msg=n)
        if not live.any():
            assert value.tobytes() == variables[averages.get(n, n)].tobytes()


# ---- Uneven virtual batches.


@settings(max_examples=60)
@given(st.data(), views(), st.integers(1, 12), types, kinds, seeds)
def test_uneven_groups_are_each_as_a_batch_of_its_own(
    data: st.DataObject, view: View, more: int, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    view = uneven(view._replace(grouped_parameters=False), more)
    o = data.draw(options(view.parameters, kind))._replace(renorm=None)
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1)
    found = forward(view, x, kind, o)
    slopes = backward(view, x, dy, found, o)
    shape = (view.rows, -1)
    totals = np.zeros((4, view.features))
    near = max(NEAR[dtype.name], 1e-11 if dtype == kind == np.float64 else 5e-5)
    for group in range(view.groups):
        rows = group_of_row(view) == group
        own = View(int(rows.sum()), 1, 1, view.features, view.inner)
        alone, up = np.ascontiguousarray(x.reshape(shape)[rows]).reshape(-1), dy.reshape(shape)[rows].reshape(-1)
        single = forward(own, alone, kind, o)
        check(found.mean[group], single.mean, 4e-6 if near > 1e-10 else 1e-11, 1.0)
        check(found.variance[group], single.variance, 4e-6 if near > 1e-10 else 1e-11, 1.0)
        check(found.y.reshape(shape)[rows].reshape(-1), single.y, near, 8.0)
        statistics = single._replace(mean=found.mean[group : group + 1], variance=found.variance[group : group + 1])
        slope = backward(own, alone, up, statistics, o)
        bound = 8 / np.sqrt(along(single.variance, own) + EPSILON)
        check(slopes.dx.reshape(shape)[rows].reshape(-1), slope.dx, near, float(bound.max()) * 8)
        totals += [
            slope.dfactor,
            slope.doffset,
            *(np.abs(up.astype(np.float64).reshape(-1, view.features, view.inner)).sum(axis=(0, 2)),) * 2,
        ]
    check(slopes.dfactor, totals[0], 5e-5, totals[2] * 16 + 1)
    check(slopes.doffset, totals[1], 5e-5, totals[3] * 16 + 1)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_averages_weigh_uneven_groups_by_their_counts(renorm: bool, unbiased: bool) -> None:
    view = View(10, 4, 1, 3, 1)
    random = np.random.default_rng(0)
    mean, variance = random.normal(size=view.statistics), random.uniform(0.5, 2, view.statistics)
    running, pair = [random.uniform(0.5, 2, 3) for _ in "mv"], [random.uniform(0.5, 2, 3) for _ in "mv"]
    before = [value.copy() for value in running]
    names = {"renorm_mean": pair[0], "renorm_stddev": pair[1]} if renorm else {}
    kernel(view, TYPES[1]).move_averages(
        mean=mean, variance=variance, running_mean=running[0], running_variance=running[1], momentum=0.3,
        renorm_momentum=0.1, unbiased=unbiased, **names,
    )  # fmt: skip
    counts = np.array([[3], [3], [2], [2]])
    m = (mean * counts).sum(axis=0) / 10
    v = (variance * counts * (counts / (counts - 1) if unbiased and not renorm else 1)).sum(axis=0) / 10
    np.testing.assert_allclose(running[0], before[0] + (m - before[0]) * 0.3, rtol=1e-13)
    if renorm:
        stddev = np.sqrt(before[1] + EPSILON)
        stddev += (np.sqrt(v + EPSILON) - stddev) * 0.3
        v = stddev**2 - EPSILON
        np.testing.assert_allclose(running[1], v, rtol=1e-12)
    else:
        np.testing.assert_allclose(running[1], before[1] + (v - before[1]) * 0.3, rtol=1e-13)


# ---- Threads, addresses, and the boundary.

LARGE = [
    View(5_003, 1, 1, 17, 1), View(40_009, 1, 1, 3, 1), View(60, 1, 1, 37, 97), View(6_001, 5, 1, 13, 1),
    View(6_004, 5, 2, 130, 1), View(61, 5, 1, 37, 31), View(6_000, 5, 2, 13, 1, True), View(60, 1, 1, 97, 13),
    View(3_001, 1, 1, 1_031, 1), View(5, 1, 1, 11, 200_003),
]  # fmt: skip


@pytest.mark.parametrize("view", LARGE, ids=str)
@pytest.mark.parametrize("name", ["drawn", "blocks"])
def test_addresses_and_threads_give_the_same_and_dx_may_lie_where_dy_does(view: View, name: str) -> None:
    x, dy = drawn(view, TYPES[0], 0), drawn(view, TYPES[0], 1)
    weighing = Weighing(masked(view, name, 0), True)
    found, (count, square_count) = weighted_forward(view, x, weighing, np.float32, Options())
    slopes = weighted_backward(view, x, dy, found, weighing, count, Options())
    for threads in (1, 2, 3):
        again = Forward(like(x), np.empty_like(found.mean), np.empty_like(found.variance))
        counts, dx = (np.empty_like(count), np.empty_like(count)), dy.copy()
        at = {name: value.ctypes.data for name, value in again._asdict().items() if value is not None}
        of = kernel(view, x.dtype)
        of.forward_at(
            threads=threads, x=x.ctypes.data, **at, mask=weighing.array.ctypes.data, zeroed=True,
            count=counts[0].ctypes.data, square_count=counts[1].ctypes.data,
        )  # fmt: skip
        del at["y"]
        of.backward_at(
            threads=threads, x=x.ctypes.data, dy=dx.ctypes.data, dx=dx.ctypes.data, **at, zeroed=True,
            mask=weighing.array.ctypes.data, count=count.ctypes.data,
        )  # fmt: skip
        assert same(counts, (count, square_count))
        check(again.y, found.y, 1e-5, 8.0)
        check(dx, slopes.dx, 1e-5, 8.0)


VIEW = View(12, 2, 3, 4, 2)
OPERATIONS = {
    "forward": ["x", "y", "mean", "variance"],
    "backward": ["x", "dy", "dx", "mean", "variance"],
    "moments": ["x", "mean", "variance"],
    "normalize": ["x", "y", "mean", "scale", "offset"],
    "gradient_sums": ["x", "dy", "mean", "dy_sum", "dy_centered_sum"],
    "gradient_combine": ["x", "dy", "dx", "mean", "a", "b", "c"],
}


def arguments(operation: str) -> dict[str, Any]:
    sizes = dict.fromkeys(["x", "y", "dy", "dx"], VIEW.size)
    found = {name: np.ones(sizes.get(name, 8), np.float32) for name in OPERATIONS[operation]}
    return found | ({"count": np.ones(2)} if operation == "backward" else {})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_masks_and_weights_are_checked_at_the_boundary(operation: str) -> None:
    call, given = getattr(kernel(VIEW, TYPES[0]), operation), arguments(operation)
    call(**given, mask=np.ones(24, bool))
    call(**given, weights=np.ones((12, 2), np.float32))
    for size in (23, 25, 0):
        with pytest.raises(ValueError, match=f"mask must have 24 elements; received {size}"):
            call(**given, mask=np.ones(size, bool))
        with pytest.raises(ValueError, match=f"weights must have 24 elements; received {size}"):
            call(**given, weights=np.ones(size, np.float32))
    for kind in ("int8", "int32", "float32"):
        with pytest.raises(TypeError, match="mask must be bool or uint8"):
            call(**given, mask=np.ones(24, kind))
    for kind in ("bool", "float16", "int32"):
        with pytest.raises(TypeError, match="weights must be float32 or float64"):
            call(**given, weights=np.ones(24, kind))
    with pytest.raises(ValueError, match="exclude"):
        call(**given, mask=np.ones(24, bool), weights=np.ones(24))
    with pytest.raises(TypeError):
        call(**given, mask=np.ones(48, bool)[::2])


def test_what_goes_with_weights_is_refused_without_them() -> None:
    of = kernel(VIEW, TYPES[0])
    given = arguments("backward")
    with pytest.raises(ValueError, match="count goes with mask or weights"):
        of.backward(**given)
    del given["count"]
    with pytest.raises(ValueError, match="count goes with mask or weights"):
        of.backward(**given, mask=np.ones(24, bool))
    with pytest.raises(ValueError, match="zeroed goes with mask or weights"):
        of.backward(**given, zeroed=True)
    with pytest.raises(ValueError, match="count and square_count go together"):
        of.move_averages(mean=np.ones(8), variance=np.ones(8), momentum=0.1, count=np.ones(2))
    with pytest.raises(ValueError, match="count must have 2 elements"):
        of.forward(**arguments("forward"), mask=np.ones(24, bool), count=np.ones(3))
    shared = np.ones(24, np.float32)
    with pytest.raises(ValueError, match="overlap"):
        of.forward(**{**arguments("forward"), "mean": shared[:8]}, weights=shared)


def test_addresses_of_weights_are_checked_for_what_they_can_tell() -> None:
    of, values = kernel(VIEW, TYPES[0]), np.ones(VIEW.size, np.float32)
    arrays = dict.fromkeys(("x", "y", "mean", "variance"), values.ctypes.data)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"mask": 1, "weights": 1, "count": 1, "square_count": 1}, "exclude"),
        ({"zeroed": True}, "zeroed goes with"),
        ({"mask": 1}, "count has no memory"),
        ({"mask": 1, "count": 1}, "square_count has no memory"),
    ]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            of.forward_at(threads=1, **arrays, **wrong)
    arrays = dict.fromkeys(("x", "dy", "dx", "mean", "variance"), values.ctypes.data)
    with pytest.raises(ValueError, match="count has no memory"):
        of.backward_at(threads=1, **arrays, weights=1)
    assert (values == 1).all()


def test_a_view_has_whole_samples_and_at_least_one_for_each_group() -> None:
    assert kernel(View(10, 3, 2, 4, 2), TYPES[0]).positions == 20
    assert kernel(View(12, 3, 2, 4, 2, True), TYPES[0]).positions == 8
    for view, message in [
        (View(11, 3, 2, 4, 2), "multiple of span"),
        (View(4, 3, 2, 4, 2), "at least groups"),
        (View(10, 3, 2, 4, 2, True), "multiple of groups"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel(view, TYPES[0])
