"""Cases of the NumPy layer that Hypothesis draws, and how near a result must be to the oracle's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from batchnorm.numpy import BatchNormalization
from tests.oracle import Oracle

Array = npt.NDArray[Any]
DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
ROUNDING = {"float64": 1e-11, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""What a comparison allows, relative to the largest value: what is stored in the type, and a few steps of it."""
NAMES = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
INITIALIZED = ("beta", "gamma", "moving_mean", "moving_variance")
"""The variables that have an initializer of their own."""


class Adjust:
    """An adjustment of a drawn form: each of scale and bias keeps some of the input's axes and drops leading ones."""

    def __init__(self, seed: int, forms: tuple[tuple[tuple[bool, ...], int], ...]) -> None:
        self.seed = seed
        self.forms = forms
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        self.shapes.append(shape)
        rng = np.random.default_rng(self.seed)
        sizes = [
            tuple(size if keep else 1 for size, keep in zip(shape, kept, strict=True))[drop:]
            for kept, drop in self.forms
        ]
        return rng.uniform(0.5, 1.5, sizes[0]), rng.uniform(-0.5, 0.5, sizes[1])

    def __repr__(self) -> str:
        return f"Adjust({self.seed}, {self.forms})"


@dataclasses.dataclass
class Case:
    """A layer, the shapes of its batches, and where it starts."""

    shapes: list[tuple[int, ...]]
    options: dict[str, Any]
    center: bool
    scale: bool
    clipping: dict[str, Any] | None
    dtype: str
    seed: int
    mean: float
    spread: float
    fused: bool | None

    @property
    def kept(self) -> str:
        """The type of the variables."""
        return "float64" if self.dtype == "float64" else "float32"

    def x(self, shape: tuple[int, ...], seed: int) -> Array:
        rng = np.random.default_rng([self.seed, seed])
        return (self.mean + self.spread * rng.normal(size=shape)).astype(DTYPES[self.dtype])

    def initial(self) -> dict[str, Array]:
        oracle = Oracle.build(self.shapes[0], **self._oracle_options())
        rng = np.random.default_rng(self.seed)
        initial = {
            "gamma": rng.uniform(-2, 2, oracle.sizes),
            "beta": rng.uniform(-2, 2, oracle.sizes),
            "moving_mean": rng.uniform(-1, 1, oracle.sizes),
            "moving_variance": rng.uniform(0.0, 2.0, oracle.sizes),
        }
        return {name: value.astype(self.kept).astype(np.float64) for name, value in initial.items()}

    def oracle(self) -> Oracle:
        return Oracle.build(self.shapes[0], **self._oracle_options(), initial=self.initial())

    def layer(self) -> BatchNormalization:
        shape = self.oracle().parameter_shape(len(self.shapes[0]))
        initializers: dict[str, Any] = {
            f"{name}_initializer": value.reshape(shape) for name, value in self.initial().items()
        }
        return BatchNormalization(
            center=self.center,
            scale=self.scale,
            renorm_clipping=self.clipping,
            fused=self.fused,
            **initializers,
            **self.options,
        )

    def _oracle_options(self) -> dict[str, Any]:
        limits = {key: value for key, value in (self.clipping or {}).items() if value is not None}
        return {**self.options, **limits, "center": self.center, "scale": self.scale}


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    sizes: tuple[int, ...] = (0, 1, 2, 3, 5, 7),
    most: int = 300,
    steps: int = 6,
    dtypes: tuple[str, ...] = tuple(DTYPES),
) -> Case:
    """Any legal combination of options, and the shapes of `steps` batches."""
    rank = draw(st.integers(2, 5))
    size = draw(st.sampled_from([None, None, 1, 2, 3]))
    first = 0 if size is None else 1
    axes = draw(st.lists(st.integers(first, rank - 1), min_size=1, max_size=rank, unique=True))
    axis = tuple(each - rank * draw(st.booleans()) for each in axes)
    whole = [draw(st.sampled_from(sizes)) for _ in range(rank)]
    while math.prod(whole) > most:
        widest = max(whole)
        whole[whole.index(widest)] = 2 if widest > 2 else 1
    shapes = []
    for _ in range(steps):
        samples = whole[0]
        if size is not None:
            samples = size * draw(st.integers(min(sizes), 3))
        elif 0 not in axes:
            samples = draw(st.sampled_from(sorted({min(sizes), 1, samples})))
        shapes.append((samples, *whole[1:]))
    clipping = draw(
        st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {},
                optional={
                    "rmin": st.sampled_from([None, 0.0, 0.5, 0.99]),
                    "rmax": st.sampled_from([None, 1.01, 3.0, math.inf]),
                    "dmax": st.sampled_from([None, 0.0, 0.5, math.inf]),
                },
            ),
        )
    )
    form = st.tuples(st.tuples(*[st.booleans()] * rank), st.integers(0, rank))
    adjustment = None
    if size is None and draw(st.booleans()):
        adjustment = Adjust(draw(st.integers(0, 9)), (draw(form), draw(form)))
    options = {
        "axis": axis[0] if len(axis) == 1 and draw(st.booleans()) else axis,
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])),
        "epsilon": draw(st.sampled_from([1e-3, 1e-2, 0.5])),
        "renorm": draw(st.booleans()),
        "renorm_momentum": draw(st.sampled_from([0.0, 0.7, 0.99, 1.0])),
        "virtual_batch_size": size,
        "adjustment": adjustment,
    }
    return Case(
        shapes,
        options,
        draw(st.booleans()),
        draw(st.booleans()),
        clipping,
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from([0.0, -3.0, 3.0])),
        draw(st.sampled_from([0.0, 0.5, 2.0])),
        draw(st.sampled_from([None, False])),
    )


def near(actual: Array, expected: Array, dtype: str) -> None:
    wide = np.asarray(actual, np.float64)
    allowed = ROUNDING[dtype] * max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(wide, expected, rtol=0, atol=allowed)


def same_state(layer: BatchNormalization, oracle: Oracle, rank: int, dtype: str) -> None:
    assert list(layer.variables) == [name for name in NAMES if name in oracle.variables]
    for name, value in layer.variables.items():
        assert value.dtype == dtype
        near(value, oracle.variables[name].reshape(oracle.parameter_shape(rank)), dtype)
