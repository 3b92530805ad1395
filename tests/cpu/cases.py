"""The extension module as the tests call it, and what they compare it with: NumPy in float64."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

library: Any = importlib.import_module("batchnorm._cpu")
"""Not there is a failure: the rest of the package can do without it, these tests cannot."""

Array = npt.NDArray[Any]
Pair = tuple[Array, Array]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
NEAR = {"float64": 1e-11, "float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""Of results stored in a type, relative to the largest of them."""
THREADED = 1 << 15
"""Values from which a call uses several threads."""
EPSILON = 1e-3


class View(NamedTuple):
    """x[rows][features][inner]; row r is in group (r / span) % groups, which has parameters of its own or not."""

    rows: int
    groups: int
    span: int
    features: int
    inner: int
    grouped_parameters: bool = False

    @property
    def size(self) -> int:
        return self.rows * self.features * self.inner

    @property
    def statistics(self) -> tuple[int, int]:
        return self.groups, self.features

    @property
    def parameters(self) -> int:
        return self.groups * self.features if self.grouped_parameters else self.features

    @property
    def virtual_batches(self) -> int:
        return 1 if self.grouped_parameters else self.groups


def kernel(view: View, dtype: np.dtype[Any], epsilon: float = EPSILON) -> Any:
    return library.Kernel(**view._asdict(), dtype=dtype.name, epsilon=epsilon)


# ---- Data.


@st.composite
def views(draw: st.DrawFn) -> View:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 13]))
    span = draw(st.sampled_from([1, 1, 2, 3, 7]))
    features = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 31, 64, 67, 129, 257, 515, 1031, 4099]))
    inner = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 7, 16, 31, 67, 131, 4099]))
    least = groups * span * features * inner
    if least > 200_000:
        inner, least = 1, groups * span * features
    if least > 200_000:
        span, least = 1, groups * features
    above = -(-THREADED // least)  # the first that uses threads
    times = draw(
        st.sampled_from([1, 2, 3, 7, 8, 9, 63, 64, 65, 129, above, above, above + 1, 2 * above + 1, 5 * above])
    )
    rows = min(times, max(1, 300_000 // least)) * groups * span
    return View(rows, groups, span, features, inner, draw(st.booleans()))


types = st.sampled_from(TYPES)
kinds = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64)])
seeds = st.integers(0, 2**16)


def drawn(view: View, dtype: np.dtype[Any], seed: int, mean: float = 3.0, spread: float = 2.0) -> Array:
    return np.random.default_rng(seed).normal(mean, spread, view.size).astype(np.float32).astype(dtype)


def raw(x: Array) -> Array:
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x


def like(x: Array) -> Array:
    return np.full(x.shape, 77, x.dtype)


# ---- In float64.


def apart(values: Array, view: View) -> Array:
    """Values in float64 by (repeat, group, place in its span, feature, place in the inner run)."""
    return values.astype(np.float64).reshape(-1, view.groups, view.span, view.features, view.inner)


def along(statistics: Array, view: View) -> Array:
    """Statistics, or parameters, to go with `apart`."""
    return statistics.astype(np.float64).reshape(1, -1, 1, view.features, 1)


def over(values: Array) -> Array:
    summed: Array = values.sum(axis=(0, 2, 4))
    return summed


def by_parameter(statistics: Array, view: View) -> Array:
    """Sum over the groups that share a parameter."""
    return statistics if view.grouped_parameters else statistics.sum(axis=0)


def measured(x: Array, view: View) -> Pair:
    values = apart(x, view)
    return values.mean(axis=(0, 2, 4)), values.var(axis=(0, 2, 4))


def check(found: Array, expected: Array, near: float, scale: Array | float = 0.0) -> None:
    expected = expected.reshape(found.shape)
    scale = np.broadcast_to(scale, found.shape) if np.ndim(scale) == 0 else np.reshape(scale, found.shape)
    with np.errstate(invalid="ignore"):
        off = np.abs(found.astype(np.float64) - expected)
    allowed = near * np.maximum(np.abs(expected), scale)
    bad = ~(off <= allowed + 1e-300)
    assert not bad.any(), f"{bad.sum()} of {bad.size}, by {np.max(off[bad] / np.maximum(allowed[bad], 1e-300))} times"


def check_near(found: list[Array], expected: list[Array], near: float) -> None:
    for result, value in zip(found, expected, strict=True):
        exact = value.astype(np.float64)
        largest = np.abs(exact[np.isfinite(exact)]).max(initial=0)  # a short type may overflow
        np.testing.assert_allclose(result.astype(np.float64), exact, rtol=near, atol=near * largest)


def same(found: Any, expected: Any) -> bool:
    """Whether results are equal to the bit."""
    return all((a is None and b is None) or a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


# ---- Calls.


class Options(NamedTuple):
    factor: Array | None = None
    offset: Array | None = None
    renorm: Pair | None = None
    limits: tuple[float, float, float] = (-np.inf, np.inf, np.inf)


@st.composite
def options(draw: st.DrawFn, count: int, kind: np.dtype[Any]) -> Options:
    random = np.random.default_rng(draw(seeds))

    def values(low: float, high: float) -> Array:
        return random.uniform(low, high, count).astype(kind)

    factor = values(0.5, 2) if draw(st.booleans()) else None
    offset = values(-1, 1) if draw(st.booleans()) else None
    renorm = (values(2, 4), values(1, 3)) if draw(st.booleans()) else None
    limits = draw(st.sampled_from([(-np.inf, np.inf, np.inf), (0.9, 1.1, 0.1), (0.5, np.inf, 0.0)]))
    return Options(factor, offset, renorm, limits)


class Forward(NamedTuple):
    y: Array
    mean: Array
    variance: Array
    r: Array | None = None
    d: Array | None = None


def forward(view: View, x: Array, kind: Any = np.float32, given: Options | None = None) -> Forward:
    o = given or Options()
    y, mean, variance = like(x), np.empty(view.statistics), np.empty(view.statistics)
    r, d = (None, None) if o.renorm is None else (np.empty(view.parameters, kind), np.empty(view.parameters, kind))
    average, stddev = o.renorm or (None, None)
    rmin, rmax, dmax = o.limits
    kernel(view, x.dtype).forward(
        x=raw(x), y=raw(y), factor=o.factor, offset=o.offset, renorm_mean=average, renorm_stddev=stddev,
        rmin=rmin, rmax=rmax, dmax=dmax, mean=mean, variance=variance, r=r, d=d,
    )  # fmt: skip
    return Forward(y, mean, variance, r, d)


class Backward(NamedTuple):
    dx: Array
    dfactor: Array
    doffset: Array


def backward(view: View, x: Array, dy: Array, result: Forward, given: Options | None = None) -> Backward:
    o = given or Options()
    kind = np.dtype(np.float64 if x.dtype == np.float64 else np.float32) if o.factor is None else o.factor.dtype
    dx, dfactor, doffset = like(x), np.empty(view.parameters, kind), np.empty(view.parameters, kind)
    kernel(view, x.dtype).backward(
        x=raw(x), dy=raw(dy), dx=raw(dx), mean=result.mean, variance=result.variance, factor=o.factor, r=result.r,
        d=result.d, dfactor=dfactor, doffset=doffset,
    )  # fmt: skip
    return Backward(dx, dfactor, doffset)


def moments(view: View, x: Array, kind: Any = np.float32) -> Pair:
    mean, variance = np.empty(view.statistics, kind), np.empty(view.statistics, kind)
    kernel(view, x.dtype).moments(x=raw(x), mean=mean, variance=variance)
    return mean, variance


def normalize(view: View, x: Array, mean: Array, scale: Array, offset: Array) -> Array:
    y = like(x)
    kernel(view, x.dtype).normalize(x=raw(x), y=raw(y), mean=mean, scale=scale, offset=offset)
    return y


def gradient_sums(view: View, x: Array, dy: Array, mean: Array) -> Pair:
    plain, centered = np.empty_like(mean), np.empty_like(mean)
    kernel(view, x.dtype).gradient_sums(
        x=raw(x), dy=raw(dy), mean=mean, dy_sum=plain, dy_centered_sum=centered
    )  # fmt: skip
    return plain, centered


def gradient_combine(view: View, x: Array, dy: Array, mean: Array, a: Array, b: Array, c: Array) -> Array:
    dx = like(x)
    kernel(view, x.dtype).gradient_combine(x=raw(x), dy=raw(dy), dx=raw(dx), mean=mean, a=a, b=b, c=c)
    return dx


BUSY = [
    View(5_003, 1, 1, 17, 1), View(40_009, 1, 1, 3, 1), View(70, 1, 1, 1_031, 1), View(2, 1, 1, 40_000, 1),
    View(60, 1, 1, 37, 97), View(6_000, 5, 2, 13, 1), View(60, 5, 2, 37, 31), View(1, 1, 1, 1, 70_001),
    View(6_400, 100, 1, 13, 1), View(6_000, 5, 2, 13, 1, True), View(60, 1, 1, 97, 13),
]  # fmt: skip
"""Each goes another way through the kernels, and several threads have work."""


def everything(view: View, dtype: np.dtype[Any] = TYPES[0], seed: int = 0) -> list[Array]:
    """The results of all operations on a view."""
    random = np.random.default_rng(seed)
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1)
    values = [random.uniform(0.5, 2, view.parameters).astype(np.float32) for _ in range(4)]
    o = Options(values[0], values[1], (values[2], values[3]), (0.5, 2.0, 1.0))
    plain, full = forward(view, x), forward(view, x, given=o)
    given = [random.normal(size=view.statistics).astype(np.float32) for _ in range(4)]
    results = [
        *plain, *full, *backward(view, x, dy, plain), *backward(view, x, dy, full, o), *moments(view, x),
        normalize(view, x, *given[:3]), *gradient_sums(view, x, dy, given[0]), gradient_combine(view, x, dy, *given),
    ]  # fmt: skip
    return [result for result in results if result is not None]
