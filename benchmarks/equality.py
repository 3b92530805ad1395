"""``python -m benchmarks.equality OLD.whl NEW.whl``: does a change of this package leave its results as they were?

Random layers of every dialect take three training steps and an inference in both wheels. Results may differ by
rounding; where they differ by more, the formulas in long doubles decide, and the new ones must be at least as near as
the old. Each step is judged from the state that the layer was in before it, so that errors do not add up.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich import box
from rich.progress import Progress
from rich.table import Table

from .terminal import terminal
from .wheels import Worker, answer, install

DIALECTS = ("numpy", "pytorch", "tensorflow")
STEPS = 3
DECAY, EPSILON = 0.875, 2.0**-10  # exact in every type
ROUNDING = 16.0
"""What counts as rounding, in units of the type's epsilon times the size of the summands."""
AS_NEAR = 2.0
"""How much further from the reference still counts as near: two ways to round differ by that, either way."""

INITIALIZED = ("gamma", "beta", "moving_mean", "moving_variance")

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A layer and its inputs; `view` asks for an odd layout of memory, and for a graph where there are graphs."""

    dialect: str
    seed: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str
    mean: float
    renorm: bool
    clipping: tuple[tuple[str, float], ...]
    virtual_batch_size: int | None
    adjustment: str | None
    fused: bool | None
    center: bool
    scale: bool
    view: bool

    def parameter_shape(self) -> tuple[int, ...]:
        """The shape in which parameters broadcast to the input."""
        return tuple(size if axis in self.axes else 1 for axis, size in enumerate(self.shape))

    def batch(self, step: int) -> tuple[Array, Array]:
        """Draw x and the gradient of y, in the type of the input."""
        random = np.random.default_rng([*self.seed, step])
        x, dy = random.normal(self.mean, 1.0, self.shape), random.normal(0.0, 1.0, self.shape)
        return x.astype(_type(self.dtype)), dy.astype(_type(self.dtype))

    def adjusted(self) -> tuple[Array, Array] | None:
        """Draw what the adjustment returns."""
        if self.adjustment is None:
            return None
        shape = self.parameter_shape() if self.adjustment == "by feature" else self.shape
        random = np.random.default_rng([*self.seed, 100])
        return _exact(random.uniform(0.5, 1.5, shape)), _exact(random.uniform(-1, 1, shape))

    def state(self) -> Arrays:
        """Draw the variables to begin with, in the shape that broadcasts."""
        random, shape = np.random.default_rng([*self.seed, 101]), self.parameter_shape()
        state = {"gamma": _exact(random.uniform(0.5, 1.5, shape)), "beta": _exact(random.uniform(-1, 1, shape))}
        state["moving_mean"] = _exact(random.normal(self.mean, 0.5, shape))
        state["moving_variance"] = _exact(random.uniform(0.5, 1.5, shape))
        if not self.scale:
            del state["gamma"]
        if not self.center:
            del state["beta"]
        if self.renorm:
            stddev = np.sqrt(state["moving_variance"])
            state |= {"renorm_mean": state["moving_mean"], "renorm_stddev": stddev}
            if self.dialect != "pytorch":
                state["moving_stddev"] = stddev
        return state


def _type(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def _exact(values: Array) -> Array:
    """Round to what every type holds (but for large means, which 16 bits do not get)."""
    return np.round(values * 64) / 64


def draw(dialect: str, seed: int, number: int) -> Drawn:
    """Draw a layer; every 25th is so large that results do not stay in the caches."""
    seeds = (seed, DIALECTS.index(dialect), number)
    random = np.random.default_rng(seeds)
    pick: Callable[..., Any] = lambda *values: values[random.integers(len(values))]  # noqa: E731
    large = number % 25 == 24
    if large:
        shape = pick((16, 56, 56, 64), (16, 64, 56, 56), (16384, 200), (2, 32, 16, 56, 56))
        dtype = pick("float32", "bfloat16")
        options: list[tuple[int, ...]] = [(1,), (len(shape) - 1,), (1, 2) if len(shape) > 2 else (1,)]
        axes = options[random.integers(3)]
    else:
        rank = int(random.integers(2, 6))
        shape = (10**9,)
        while math.prod(shape) > 60_000:
            shape = tuple(int(pick(1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 64, 96)) for _ in range(rank))
            shape = (int(pick(1, 2, 4, 6, 7, 8, 12, 16, 30, 64)), *shape[1:])
        dtype = pick("float64", "float32", "float32", "float16", "bfloat16")
        if random.random() < 0.75:
            axes = (pick(1, rank - 1),)
        else:
            count = int(random.integers(1, rank))
            axes = tuple(sorted(int(axis) for axis in random.permutation(rank)[:count]))
    renorm = bool(random.random() < 0.4)
    clipping = {"rmin": 0.75, "rmax": 1.25, "dmax": 0.25}
    extra = pick(None, "virtual", "by feature", "within a feature")
    virtual = None
    if extra == "virtual" and 0 not in axes:
        virtual = pick(*(size for size in range(1, shape[0] + 1) if shape[0] % size == 0))
    return Drawn(
        dialect,
        seeds,
        shape,
        axes,
        dtype,
        pick(0.0, 1e4 if dtype in ("float32", "float64") else 4.0),
        renorm,
        tuple((name, limit) for name, limit in clipping.items() if renorm and random.random() < 0.6),
        virtual,
        extra if extra in ("by feature", "within a feature") else None,
        pick(None, None, False),
        bool(random.random() < 0.8),
        bool(random.random() < 0.8),
        bool(random.random() < 0.5),
    )


# In the process of one wheel.


def with_numpy(drawn: Drawn) -> Arrays:
    """Run a layer of the NumPy dialect."""
    from batchnorm.numpy import BatchNormalization

    found: Arrays = {}
    initial, kept = drawn.state(), np.float64 if drawn.dtype == "float64" else np.float32
    adjusted = drawn.adjusted()
    pair: Any = None if adjusted is None else tuple(value.astype(kept) for value in adjusted)
    initializers: dict[str, Any] = {
        f"{name}_initializer": lambda shape, dtype, name=name: initial[name].reshape(shape).astype(dtype)
        for name in INITIALIZED
        if name in initial
    }
    adjustment = pair and (lambda shape: pair)
    layer = BatchNormalization(**_arguments(drawn), axis=list(drawn.axes), adjustment=adjustment, **initializers)
    for step in range(STEPS + 1):
        x, dy = drawn.batch(step)
        if drawn.view:
            x = np.ascontiguousarray(x.T).T
        if step == STEPS:
            found[f"{step}.y"] = layer(x)
            break
        y, gradient = layer.vjp(x, training=True)
        dx, dgamma, dbeta, dadjustment = gradient(dy)
        found |= _named(step, y=y, dx=dx, dgamma=dgamma, dbeta=dbeta)
        if dadjustment is not None:
            found |= _named(step, da=dadjustment[0], db=dadjustment[1])
        found |= _named(step, **layer.variables)
    return found


def with_pytorch(drawn: Drawn) -> Arrays:
    """Run a layer of the PyTorch dialect."""
    import torch

    from batchnorm import torch as dialect

    found: Arrays = {}
    kept = torch.float64 if drawn.dtype == "float64" else torch.float32
    adjusted = drawn.adjusted()
    pair = (
        None if adjusted is None else tuple(torch.tensor(value, dtype=kept, requires_grad=True) for value in adjusted)
    )
    arguments = _arguments(drawn) | {"eps": EPSILON, "momentum": 1 - DECAY, "renorm_momentum": 1 - DECAY}
    del arguments["epsilon"], arguments["center"], arguments["scale"]
    rank, sizes = len(drawn.shape), tuple(drawn.shape[axis] for axis in drawn.axes)
    if drawn.axes == (1,):
        make: Any = getattr(dialect, f"BatchNorm{max(rank - 2, 1)}d")
    else:
        make, arguments["axis"] = dialect.BatchNorm, drawn.axes
    layer = make(
        sizes if len(sizes) > 1 else sizes[0],
        affine=drawn.scale, bias=drawn.center, dtype=kept, adjustment=pair and (lambda shape: pair), **arguments,
    )  # fmt: skip
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    initial = drawn.state()
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if names.get(name, name) in initial:
                value.copy_(torch.tensor(initial[names.get(name, name)]).reshape(value.shape))
    for step in range(STEPS + 1):
        x, dy = (_tensor(torch, value) for value in drawn.batch(step))
        if drawn.view:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            x = x.contiguous(memory_format=formats[rank]) if rank in formats else x.mT.contiguous().mT
        if step == STEPS:
            found |= _named(step, y=layer.eval()(x))
            break
        x.requires_grad_()
        y = layer(x)
        inputs = {"x": x, **dict(layer.named_parameters()), **dict(zip(("a", "b"), pair or (), strict=False))}
        gradients = torch.autograd.grad(y, [*inputs.values()], dy)
        found |= _named(step, y=y)
        found |= _named(step, **{f"d{names.get(n, n)}": value for n, value in zip(inputs, gradients, strict=True)})
        found |= _named(step, **{names.get(name, name): value for name, value in layer.state_dict().items()})
    return found


def _tensor(torch: Any, value: Array) -> Any:
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(value)


def with_tensorflow(drawn: Drawn) -> Arrays:
    """Run a layer of the TensorFlow dialect."""
    import tensorflow as tf

    from batchnorm.tensorflow import BatchNormalization

    found: Arrays = {}
    initial, kept = drawn.state(), "float64" if drawn.dtype == "float64" else "float32"
    adjusted = drawn.adjusted()
    pair: Any = None if adjusted is None else tuple(tf.constant(value, kept) for value in adjusted)
    layer = BatchNormalization(
        **_arguments(drawn), axis=list(drawn.axes), adjustment=pair and (lambda shape: pair),
        **{f"{name}_initializer": tf.constant_initializer(initial[name].ravel().tolist())
           for name in INITIALIZED if name in initial},
    )  # fmt: skip

    def train(x: Any, dy: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch([x, *(pair or ())])
            y = layer(x, training=True)
        return y, tape.gradient(y, [x, *(pair or ()), *layer.trainable_variables], output_gradients=dy)

    if drawn.view:
        train = tf.function(train)
    for step in range(STEPS + 1):
        x, dy = (tf.constant(value) for value in drawn.batch(step))
        if step == STEPS:
            found |= _named(step, y=layer(x))
            break
        y, gradients = train(x, dy)
        variables = [variable.name.split("/")[-1].removesuffix(":0") for variable in layer.trainable_variables]
        inputs = ["x", *(("a", "b") if pair else ()), *variables]
        found |= _named(step, y=y, **{f"d{name}": value for name, value in zip(inputs, gradients, strict=True)})
        found |= _named(step, **{v.name.split("/")[-1].removesuffix(":0"): v for v in layer.variables})
    return found


def _arguments(drawn: Drawn) -> dict[str, Any]:
    return {
        "epsilon": EPSILON, "momentum": DECAY, "center": drawn.center, "scale": drawn.scale, "renorm": drawn.renorm,
        "renorm_clipping": dict(drawn.clipping) or None, "renorm_momentum": DECAY, "fused": drawn.fused,
        "virtual_batch_size": drawn.virtual_batch_size,
    }  # fmt: skip


def _named(step: int, **values: Any) -> Arrays:
    found = {}
    for name, value in values.items():
        if hasattr(value, "detach"):
            value = value.detach()
            value = (
                value.float().numpy().astype(ml_dtypes.bfloat16) if "bfloat16" in str(value.dtype) else value.numpy()
            )
        if value is not None:
            found[f"{step}.{name}"] = np.array(value)
    return found


def work(folder: str, dialect: str, seed: str) -> None:
    """Be the process of one wheel: asked for a number, run that layer and save its results."""
    run = {"numpy": with_numpy, "pytorch": with_pytorch, "tensorflow": with_tensorflow}[dialect]

    def respond(question: list[Any]) -> dict[str, str] | str:
        number, path = question
        try:
            found = run(draw(dialect, int(seed), number))
        except (TypeError, ValueError) as error:  # what it refuses
            return type(error).__name__
        wide: dict[str, Any] = {
            name: value.astype(np.float32) if value.dtype.itemsize < 4 else value for name, value in found.items()
        }
        np.savez(path, **wide)
        return {name: value.dtype.name for name, value in found.items()}

    answer(respond, folder)


# The reference.


class Expected(NamedTuple):
    """A result, and the size of the summands that it is the sum of, where rounding happens."""

    value: Array
    size: Array


def train(drawn: Drawn, state: Mapping[str, Array], x: Array, dy: Array) -> dict[str, Expected]:
    """Compute one training step by the formulas, in long doubles; the variance that is stored is the biased one."""
    size = drawn.virtual_batch_size or x.shape[0]

    def split(value: Array) -> Array:  # sample i is in virtual batch i mod (N / size)
        whole = value.shape[0] == x.shape[0] and x.shape[0] > 1
        return value.reshape(size, -1, *value.shape[1:]) if whole else np.expand_dims(value, 1)

    x, dy = split(x), split(dy)
    features = tuple(axis + (axis > 0) for axis in drawn.axes)
    axes = tuple(axis for axis in range(x.ndim) if axis not in features and axis != 1)
    everything = (*axes, 1)
    one: dict[str, Any] = {"axis": axes, "keepdims": True}
    gamma, beta = (split(state[name]) if name in state else np.full((1,) * x.ndim, default)
                   for name, default in (("gamma", 1.0), ("beta", 0.0)))  # fmt: skip
    a, b = map(split, drawn.adjusted() or (np.ones((1,) * (x.ndim - 1)), np.zeros((1,) * (x.ndim - 1))))
    m = np.mean(x, **one)
    v = np.mean(np.square(x - m), **one)
    sigma = np.sqrt(v + EPSILON)
    mean, variance = np.mean(m, axis=1, keepdims=True), np.mean(v, axis=1, keepdims=True)
    r, d = np.ones_like(mean), np.zeros_like(mean)
    if drawn.renorm:
        limits = dict(drawn.clipping)
        s = np.maximum(split(state["renorm_stddev"]), math.sqrt(EPSILON))
        r = np.clip(np.sqrt(variance + EPSILON) / s, limits.get("rmin", -np.inf), limits.get("rmax", np.inf))
        d = (mean - split(state["renorm_mean"])) / s
        d = np.clip(d, -limits.get("dmax", np.inf), limits.get("dmax", np.inf))
    normalized = (x - m) / sigma
    largest = np.max(np.abs(normalized), **one)
    corrected = normalized * r + d
    inner = dy * a
    weight = gamma * r / sigma
    product = np.mean(inner * normalized, **one)
    found = {
        "y": Expected((corrected * a + b) * gamma + beta,
                      (largest * r + np.abs(d)) * np.abs(a * gamma) + np.abs(b * gamma) + np.abs(beta)),
        "dx": Expected(weight * (inner - np.mean(inner, **one) - normalized * product),
                       np.abs(weight) * (np.max(np.abs(inner), **one)
                                         + largest * np.mean(np.abs(inner * normalized), **one))),
    }  # fmt: skip
    found = {name: Expected(*(np.broadcast_to(part, x.shape).reshape(drawn.shape) for part in pair))
             for name, pair in found.items()}  # fmt: skip

    def total(value: Array, size: Array, shape: tuple[int, ...]) -> Expected:
        """Sum to a shape that the value was broadcast from."""
        axes = everything if shape == drawn.parameter_shape() else (1,) if drawn.virtual_batch_size is None else ()
        return Expected(*(np.sum(np.broadcast_to(part, x.shape), axis=axes).reshape(shape) for part in (value, size)))

    shape = drawn.parameter_shape()
    rough = np.abs(normalized * r) + np.abs(d)
    found["dgamma"] = total(dy * (corrected * a + b), np.abs(dy) * (rough * np.abs(a) + np.abs(b)), shape)
    found["dbeta"] = total(dy, np.abs(dy), shape)
    if drawn.adjustment is not None:
        own = shape if drawn.adjustment == "by feature" else drawn.shape
        found["da"] = total(dy * gamma * corrected, np.abs(dy * gamma) * (largest * r + np.abs(d)), own)
        found["db"] = total(dy * gamma, np.abs(dy * gamma), own)
    mean, variance = mean.reshape(shape), variance.reshape(shape)
    found["variance"] = Expected(variance, variance)
    stddev = np.sqrt(variance + EPSILON)
    for name, new in (
        ("gamma", None), ("beta", None), ("moving_mean", mean), ("moving_variance", variance),
        ("renorm_mean", mean), ("renorm_stddev", stddev), ("moving_stddev", stddev),
    ):  # fmt: skip
        if name in state:
            old = state[name]
            value = old if new is None else DECAY * old + (1 - DECAY) * new
            found[name] = Expected(value, np.abs(old) + (0 if new is None else np.abs(new)))
    if drawn.renorm:  # the variance follows from the standard deviation; PyTorch's dialect keeps only the former
        before = state.get("moving_stddev", np.sqrt(state["moving_variance"] + EPSILON))
        moved = DECAY * before + (1 - DECAY) * stddev
        found["moving_variance"] = Expected(np.maximum(moved**2 - EPSILON, 0), moved**2)
    return found


def infer(state: Mapping[str, Array], x: Array) -> Expected:
    """Compute inference by the formula."""
    weight = state.get("gamma", np.longdouble(1)) / np.sqrt(state["moving_variance"] + EPSILON)
    beta, centered = state.get("beta", np.longdouble(0)), x - state["moving_mean"]
    size = np.abs(weight * centered) + np.abs(beta)
    return Expected(weight * centered + beta, np.maximum(size, np.mean(size)))


# The judgement.


class Difference(NamedTuple):
    """A result that differs: how far the wheels are from each other and from the reference, in units of rounding."""

    name: str
    apart: float
    old: float
    new: float

    @property
    def fails(self) -> bool:
        """Whether the new result is further from the reference than the old one."""
        return not self.new <= max(AS_NEAR * self.old, ROUNDING)


def judge(drawn: Drawn, old: Arrays, new: Arrays, types: Mapping[str, str]) -> list[Difference]:
    """List the results that differ by more than rounding."""
    found = []
    states = [drawn.state(), drawn.state()]
    for step in range(STEPS + 1):
        names = [name for name in new if name.startswith(f"{step}.")]
        sides = (old, new)
        if not all(np.array_equal(old[name], new[name], equal_nan=True) for name in names):
            x, dy = (value.astype(np.longdouble) for value in drawn.batch(step))
            with np.errstate(all="ignore"):
                expected = [train(drawn, state, x, dy) if step < STEPS else {"y": infer(state, x)} for state in states]
            for name in names:
                found += _compare(drawn, name, [side[name] for side in sides], expected, types[name])
        states = [
            {name: side[f"{step}.{name}"].astype(np.longdouble).reshape(drawn.parameter_shape())
             for name in state if f"{step}.{name}" in side}
            for side, state in zip(sides, states, strict=True)
        ]  # fmt: skip
    return found


def _compare(
    drawn: Drawn, name: str, values: list[Array], expected: list[dict[str, Expected]], dtype: str
) -> list[Difference]:
    short = name.split(".")[1]
    if short not in expected[0]:  # a count
        same = np.array_equal(values[0], values[1])
        return [] if same else [Difference(name, math.inf, 0, math.inf)]
    wanted = [one[short] for one in expected]
    limits: Any = ml_dtypes.finfo(_type(dtype))  # type: ignore[no-untyped-call]
    epsilon, tiny = float(limits.eps), float(limits.tiny)
    flat = [value.astype(np.longdouble).reshape(wanted[0].value.shape) for value in values]

    def units(first: Array, second: Array) -> float:
        difference = np.abs(first - second) / (np.maximum(wanted[1].size, tiny) * epsilon)
        difference[(first == second) | (np.isnan(first) & np.isnan(second))] = 0
        return float(np.max(difference, initial=0.0))

    apart = units(flat[0], flat[1])
    if apart <= ROUNDING:
        return []
    if short == "moving_variance" and not drawn.renorm:
        wanted = _as_stored(drawn, wanted, [one["variance"] for one in expected], flat[0])
    return [Difference(name, apart, *(units(value, one.value) for value, one in zip(flat, wanted, strict=True)))]


def _as_stored(drawn: Drawn, wanted: list[Expected], variances: list[Expected], old: Array) -> list[Expected]:
    """Take the biased or an unbiased variance for the right one, by what the old wheel stores."""
    count = math.prod(drawn.shape) // math.prod(drawn.parameter_shape())
    batch = count // drawn.shape[0] * (drawn.virtual_batch_size or 0)
    best = wanted
    for n in (count, batch):
        if n > 1:
            moved = [
                Expected(one.value + (1 - DECAY) * variance.value / (n - 1), one.size)
                for one, variance in zip(wanted, variances, strict=True)
            ]
            if np.sum(np.abs(moved[0].value - old)) < np.sum(np.abs(best[0].value - old)):
                best = moved
    return best


def main() -> int:
    """Do what the command line says, and return the exit status: 1 if any new result is further off than the old."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equality", description=__doc__)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=300, help="of all dialects together")
    parser.add_argument("--dialects", nargs="+", choices=DIALECTS, default=DIALECTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case, to look into")
    options = parser.parse_args()
    console = terminal()
    table = Table("dialect", "cases", "equal", "nearer", "failing", "refused by both", box=box.SIMPLE)
    failures = Table("case", "result", "apart", "old off by", "new off by", box=box.SIMPLE)
    failed: list[Drawn] = []
    with tempfile.TemporaryDirectory() as place, Progress(console=console) as progress:
        folders = [install(getattr(options, name), pathlib.Path(place, name)) for name in ("old", "new")]
        for dialect in options.dialects:
            numbers = range(-(-options.cases // len(options.dialects))) if options.only is None else [options.only]
            counts: collections.Counter[str] = collections.Counter()
            arguments = ("benchmarks.equality", dialect, str(options.seed))
            pair = [Worker(folder, *arguments, environment=dict(os.environ)) for folder in folders]
            for number in progress.track(numbers, description=dialect):
                drawn = draw(dialect, options.seed, number)
                verdict, differences = _both(drawn, number, pair, pathlib.Path(place))
                counts[verdict] += 1
                for one in differences if verdict == "failing" or options.only is not None else ():
                    units = (f"{value:.3g}" for value in one[1:])
                    failures.add_row(f"{dialect} {number}", one.name, *units, style="red" if one.fails else None)
                if verdict == "failing":
                    failed.append(drawn)
            for worker in pair:
                worker.close()
            columns = ("equal", "nearer", "failing", "refused")
            table.add_row(dialect, str(counts.total()), *(str(counts[name]) for name in columns))
    console.print(table)
    if failures.row_count:
        console.print("in units of rounding, epsilon times the summands:", failures, *failed)
    return 1 if failed else 0


def _both(drawn: Drawn, number: int, pair: list[Worker], place: pathlib.Path) -> tuple[str, list[Difference]]:
    """Run a layer with both wheels, and say how the results compare."""
    paths = [place / f"{side}.npz" for side in ("old.results", "new.results")]
    for worker, path in zip(pair, paths, strict=True):
        worker.ask([number, str(path)])
    before, after = (worker.answer() for worker in pair)
    if isinstance(before, str) or isinstance(after, str):
        same = before == after
        return "refused" if same else "failing", [] if same else [Difference(f"{before} {after}", 0, 0, math.inf)]
    if before != after:  # other results, or of other types
        changed = sorted(set(before.items()) ^ set(after.items()))
        return "failing", [Difference(str(changed), 0, 0, math.inf)]
    with np.load(paths[0]) as old, np.load(paths[1]) as new:
        differences = judge(drawn, dict(old), dict(new), after)
    if any(one.fails for one in differences):
        return "failing", differences
    return "nearer" if differences else "equal", differences


if __name__ == "__main__":
    if len(sys.argv) > 1 and pathlib.Path(sys.argv[1]).is_dir():  # the process of a wheel
        work(*sys.argv[1:])
    else:
        sys.exit(main())
