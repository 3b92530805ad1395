"""Every option and every legal pair of options, against the NumPy layer, which the oracle of loops vouches for."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from batchnorm.core.options import Clipping
from batchnorm.numpy import BatchNormalization
from batchnorm.torch import BatchNorm, BatchNorm2d, ClippingSchedule, batch_norm

Array = npt.NDArray[Any]

SHAPE = (6, 5, 4, 3)
LARGE = (6, 7, 60, 61)
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS = 1e-3


def varying(batches: Any) -> dict[str, Any]:
    """A schedule that is no ClippingSchedule; its limits are exact in every type."""
    return {"rmin": 0.875 - 0.125 * batches, "rmax": 1.125 + 0.125 * batches, "dmax": 0.125 * batches}


@dataclasses.dataclass
class Adjust:
    """An adjustment that keeps some of the input's axes; its tensors need gradients."""

    axes: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    last: tuple[Tensor, Tensor] | None = None

    def __call__(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        self.shapes.append(tuple(shape))
        generator = torch.Generator().manual_seed(len(self.shapes))
        sizes = [size if axis in self.axes else 1 for axis, size in enumerate(shape)]
        # Eighths, which every type can hold.
        scale, bias = (
            torch.randint(1, 9, sizes, generator=generator).to(self.device, self.dtype) / 8 for _ in range(2)
        )
        self.last = scale.add(0.5).requires_grad_(), bias.requires_grad_()
        return self.last[0], self.last[1]


PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "renorm": {
        "renorm": {"renorm": True, "renorm_momentum": 0.3},
        "renorm clipped": {"renorm": True, "renorm_clipping": {"rmin": 0.8, "rmax": 1.2, "dmax": 0.3}},
        "renorm clipped by one": {"renorm": True, "renorm_clipping": {"dmax": 0.0}},
        "renorm clipped by tensors": {
            "renorm": True,
            "renorm_clipping": {name: torch.tensor(limit) for name, limit in {"rmax": 1.25, "dmax": 0.5}.items()},
        },
        "renorm scheduled": {"renorm": True, "renorm_clipping": varying},
    },
    "groups": {"virtual batches": {"virtual_batch_size": 2}, "virtual batches of 3": {"virtual_batch_size": 3}},
    "adjustment": {"adjusted by feature": {"adjustment": (1,)}, "adjusted by sample": {"adjustment": (0, 1, 2, 3)}},
    "axis": {
        "axes apart": {"axis": (1, 3)},
        "axes side by side": {"axis": (1, 2)},
        "last axis": {"axis": -1},
        "axis 2": {"axis": (2,)},
    },
    "affine": {"not affine": {"affine": False}, "no bias": {"bias": False}},
    "momentum": {"simple average": {"momentum": None}, "momentum 1": {"momentum": 1.0}},
    "layout": {"channels last": {"layout": torch.channels_last}},
}
SINGLES = {name: part for parts in PARTS.values() for name, part in parts.items()}
EXCLUSIVE = {"groups", "adjustment"}


def combinations(size: int) -> dict[str, dict[str, Any]]:
    """All legal combinations of so many options."""
    found = {}
    for kinds in itertools.combinations(PARTS, size):
        if not set(kinds) >= EXCLUSIVE:
            for names in itertools.product(*(PARTS[kind] for kind in kinds)):
                found[", ".join(names)] = {key: value for name in names for key, value in SINGLES[name].items()}
    return found


NONE: dict[str, dict[str, Any]] = {"none": {}}
MANY = {
    names: {key: value for name in names.split(", ") for key, value in SINGLES[name].items()}
    for names in (
        "renorm clipped, virtual batches, axes apart, simple average",
        "renorm clipped, virtual batches, channels last, no bias",
        "renorm scheduled, adjusted by feature, channels last, not affine",
        "renorm, adjusted by sample, axes side by side, momentum 1",
    )
}
FEW = NONE | combinations(1) | MANY
ALL = FEW | combinations(2)
Seen = dict[str, Array]


class Theirs:
    """The NumPy layer, made to keep its averages as PyTorch's layers do."""

    def __init__(self, options: Mapping[str, Any], sizes: tuple[int, ...], parameters: Mapping[str, Array]) -> None:
        self.momentum = options.get("momentum", 0.1)
        self.clipping = options.get("renorm_clipping")
        self.batches = 0
        self.layer = BatchNormalization(
            axis=options.get("axis", 1),
            epsilon=EPS,
            scale="weight" in parameters,
            center="bias" in parameters,
            renorm=options.get("renorm", False),
            renorm_momentum=1 - options.get("renorm_momentum", 0.01),
            virtual_batch_size=options.get("virtual_batch_size"),
            adjustment=options.get("adjustment"),
            dtype=np.float64,
            fused=False,
        )
        self.layer.build(SHAPE, np.float64)
        self.kept = self.layer.variables["moving_mean"].shape
        values = {"gamma": parameters.get("weight"), "beta": parameters.get("bias")}
        for name, value in values.items():
            if value is not None:
                self.layer.variables[name] = value.reshape(self.kept)
        if (
            self.layer.options.renorm
        ):  # the one place where PyTorch's layer, which has no such average, starts elsewhere
            self.layer.variables["moving_stddev"] = np.full(self.kept, np.sqrt(1 + EPS))
        self.sizes = sizes

    def train(self, x: Array, dy: Array) -> Seen:
        self.batches += 1
        momentum = 1 / self.batches if self.momentum is None else self.momentum
        clipping = self.clipping(self.batches - 1) if callable(self.clipping) else self.clipping
        limits = Clipping(**{name: float(limit) for name, limit in (clipping or {}).items()})
        layer = self.layer
        layer.options = dataclasses.replace(layer.options, decay=1 - momentum, renorm_clipping=limits)
        before = layer.moving_variance
        y, gradient = layer.vjp(x, training=True)
        if not layer.options.renorm:
            count = x.size // layer.moving_variance.size
            if layer.options.virtual_batch_size is not None:
                count = count // x.shape[0] * layer.options.virtual_batch_size
            kept = before * (1 - momentum)
            layer.variables["moving_variance"] = kept + (layer.moving_variance - kept) * count / (count - 1)
        return self._seen(y, gradient(dy))

    def evaluate(self, x: Array, dy: Array) -> Seen:
        y, gradient = self.layer.vjp(x)
        return self._seen(y, gradient(dy))

    def _seen(self, y: Array, gradients: Any) -> Seen:
        adjustment = gradients.adjustment or (None, None)
        names = ("input", "weight", "bias", "adjustment's scale", "adjustment's bias")
        parts = (gradients.inputs, gradients.gamma, gradients.beta, *adjustment)
        seen = {f"gradient of {name}": part for name, part in zip(names, parts, strict=True) if part is not None}
        for ours, theirs in (("mean", "moving_mean"), ("var", "moving_variance")):
            seen[f"running_{ours}"] = self.layer.variables[theirs]
        for name in ("renorm_mean", "renorm_stddev"):
            if self.layer.options.renorm:
                seen[name] = self.layer.variables[name]
        for name in ("gradient of weight", "gradient of bias", *(one for one in seen if "gradient" not in one)):
            if name in seen:
                seen[name] = seen[name].reshape(self.sizes)
        return {"output": y} | seen


def make(
    options: Mapping[str, Any], dtype: torch.dtype, fused: bool | None, shape: tuple[int, ...] = SHAPE
) -> tuple[Any, Adjust | None]:
    """Our layer for a combination of options, and its adjustment."""
    options = {key: value for key, value in options.items() if key != "layout"}
    axis = options.get("axis", 1)
    sizes = tuple(shape[one] for one in (axis if isinstance(axis, tuple) else (axis,)))
    adjust = None
    if "adjustment" in options:
        axes = tuple(one % 4 for one in (axis if isinstance(axis, tuple) else (axis,)))
        adjust = Adjust(axes if options["adjustment"] == (1,) else (0, 1, 2, 3), dtype)
        options["adjustment"] = adjust
    features = sizes if isinstance(axis, tuple) else sizes[0]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    layer = BatchNorm(features, eps=EPS, dtype=kept, fused=fused, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, dtype=torch.float64, generator=generator) + 0.5)
    return layer, adjust


def batch(step: int, shape: tuple[int, ...], dtype: torch.dtype, layout: Any) -> tuple[Tensor, Tensor]:
    """A batch whose moments leave renorm's limits for some features and steps, and a gradient for the output."""
    generator = torch.Generator().manual_seed(step)
    noise, spread, mean, dy = (
        torch.randn(size, dtype=torch.float64, generator=generator)
        for size in (shape, (1, *shape[1:-1], 1), (1, *shape[1:-1], 1), shape)
    )
    x = noise * (0.3 * spread).exp() + 0.5 * mean
    return x.to(dtype).contiguous(memory_format=layout), dy.to(dtype)


def run(layer: Any, adjust: Adjust | None, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output, all gradients and all averages, by name."""
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = {"input": x, **dict(layer.named_parameters())}
    if layer.training and adjust is not None and adjust.last is not None:
        leaves |= {"adjustment's scale": adjust.last[0], "adjustment's bias": adjust.last[1]}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    for one in (y, gradients[0]):
        assert (one.shape, one.dtype, one.stride()) == (x.shape, x.dtype, x.stride())
    seen = {f"gradient of {name}": one for name, one in zip(leaves, gradients, strict=True)}
    averages = {name: one.clone() for name, one in layer.named_buffers() if name != "num_batches_tracked"}
    return {"output": y.detach()} | seen | averages


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Any], allowed: float) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        wide = torch.as_tensor(value).double()
        assert (name, actual[name].shape) == (name, wide.shape)
        largest = max(1.0, float(wide.abs().max()))
        prefix = f"{name}: {{}}"
        torch.testing.assert_close(actual[name].double(), wide, rtol=0, atol=allowed * largest, msg=prefix.format)


def served(options: Mapping[str, Any], fused: bool | None) -> str:
    """What serves in training: the CPU kernels where there is one map for each feature, and axes lie so."""
    apart = options.get("axis") == (1, 3) and "virtual_batch_size" in options
    return "composed" if fused is False or options.get("adjustment") == (0, 1, 2, 3) or apart else "cpu"


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("names", ALL)
def test_training_and_then_evaluation_are_those_of_the_numpy_layer(
    names: str, fused: bool | None, force_cpu: None
) -> None:
    options = ALL[names]
    layer, adjust = make(options, torch.float64, fused)
    parameters = {name: one.detach().numpy().copy() for name, one in layer.named_parameters()}
    reference = Adjust(adjust.axes) if adjust is not None else None

    def pair(shape: tuple[int, ...]) -> tuple[Array, ...]:
        assert reference is not None
        return tuple(one.detach().numpy() for one in reference(shape))

    theirs = Theirs(
        {**options, "adjustment": None if adjust is None else pair}, tuple(layer.running_mean.shape), parameters
    )
    for step in range(4):
        x, dy = batch(step, SHAPE, torch.float64, options.get("layout", torch.contiguous_format))
        seen = run(layer, adjust, x, dy)
        same(seen, theirs.train(x.numpy(), dy.numpy()), ROUNDING[torch.float64])
        assert layer.kernel == served(options, fused)
    assert int(layer.num_batches_tracked) == 4
    layer.eval()
    x, dy = batch(4, (5, *SHAPE[1:]), torch.float64, options.get("layout", torch.contiguous_format))
    same(run(layer, adjust, x, dy), theirs.evaluate(x.numpy(), dy.numpy()), ROUNDING[torch.float64])
    if adjust is not None:
        assert adjust.shapes == [SHAPE] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("names", FEW)
def test_narrow_types_by_the_cpu_kernels_are_near_float64_composed(
    names: str, shape: tuple[int, ...], dtype: torch.dtype, force_cpu: None
) -> None:
    options = FEW[names]
    layer, adjust = make(options, dtype, None, shape)
    exact, exact_adjust = make(options, torch.float64, False, shape)
    exact.load_state_dict(layer.state_dict())
    for step, training in enumerate((True, True, True, False)):
        x, dy = batch(step, shape, dtype, options.get("layout", torch.contiguous_format))
        seen = run(layer.train(training), adjust, x, dy)
        expected = run(exact.train(training), exact_adjust, x.double(), dy.double())
        same(seen, expected, ROUNDING[dtype])
        assert not training or layer.kernel == served(options, None)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 2, 3, 2), (32, 9, 5, 5, 5)], ids=["small", "large"])
def test_renorm_by_virtual_batches_of_any_rank_and_layout_is_that_of_the_composed_path_on_rows(
    shape: tuple[int, ...], channels_last: bool, rank: int, fused: bool | None
) -> None:
    shape = shape[:rank]
    options: dict[str, Any] = {
        "renorm": True,
        "renorm_clipping": {"rmin": 0.9, "rmax": 1.1, "dmax": 0.1},
        "virtual_batch_size": 2,
        "eps": EPS,
    }
    ours: Any = BatchNorm(shape[1], fused=fused, **options)
    rows: Any = BatchNorm(shape[1], axis=-1, fused=False, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    for training in (True, True, False):
        x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        leaf, turned = x.detach().requires_grad_(), x.double().movedim(1, -1).contiguous().requires_grad_()
        y, expected = ours.train(training)(leaf), rows.train(training)(turned)
        sources = torch.autograd.grad(y, [leaf, *ours.parameters()], dy)
        targets = torch.autograd.grad(expected, [turned, *rows.parameters()], dy.double().movedim(1, -1))
        if rank > 3:
            assert y.stride() == sources[0].stride() == x.stride()
        same(
            dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *sources), strict=True))
            | dict(ours.named_buffers()),
            dict(zip(("y", "dx"), (one.detach().movedim(-1, 1) for one in (expected, targets[0])), strict=True))
            | dict(zip(("dweight", "dbias"), targets[1:], strict=True))
            | dict(rows.named_buffers()),
            ROUNDING[torch.float32],
        )


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("names", FEW)
def test_an_empty_batch_moves_no_average_and_has_no_gradient(names: str, fused: bool | None) -> None:
    options = FEW[names]
    layer, adjust = make(options, torch.float32, fused)
    run(layer, adjust, *batch(0, SHAPE, torch.float32, torch.contiguous_format))
    before = {name: one.clone() for name, one in layer.named_buffers()}
    for training in (True, False):
        x = torch.zeros(0, *SHAPE[1:], requires_grad=True)
        y = layer.train(training)(x)
        assert y.shape == x.shape
        gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True)
        assert not any(one.any() for one in gradients if one is not None)
    before["num_batches_tracked"] += 1
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    "names", ["none", "virtual batches", "adjusted by feature", "adjusted by sample", "axes apart", "not affine"]
)
def test_without_statistics_a_batch_is_evaluated_by_itself_as_a_whole(names: str, fused: bool | None) -> None:
    options = FEW[names]
    layer, adjust = make({**options, "track_running_stats": False}, torch.float64, fused)
    tracking, tracking_adjust = make(options, torch.float64, fused)
    plain, _ = make({key: options[key] for key in options if key in ("axis", "affine")}, torch.float64, False)
    x, dy = batch(0, SHAPE, torch.float64, torch.contiguous_format)
    assert not dict(layer.named_buffers())

    def without_averages(seen: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: one for name, one in seen.items() if "running" not in name}

    expected = without_averages(run(tracking, tracking_adjust, x, dy))
    same(run(layer, adjust, x, dy), expected, ROUNDING[torch.float64])
    same(run(layer.eval(), None, x, dy), without_averages(run(plain, None, x, dy)), ROUNDING[torch.float64])


@pytest.mark.parametrize(
    ("options", "shape", "kernels"),
    [
        ({}, SHAPE, ("torch", "torch")),
        ({}, LARGE, ("cpu", "torch")),
        ({"fused": True}, LARGE, ("cpu", "torch")),
        ({"fused": False}, SHAPE, ("composed", "composed")),
        ({"fused": False}, LARGE, ("composed", "composed")),
        ({"renorm": True}, SHAPE, ("cpu", "torch")),
        ({"renorm": True, "virtual_batch_size": 2}, SHAPE, ("cpu", "torch")),
        ({"axis": 2}, SHAPE, ("cpu", "composed")),
        ({"dtype": torch.float64}, LARGE, ("cpu", "torch")),
    ],
    ids=lambda part: str(part).replace(" ", ""),
)
def test_the_layer_says_who_served(options: dict[str, Any], shape: tuple[int, ...], kernels: tuple[str, str]) -> None:
    layer: Any = BatchNorm(shape[options.get("axis", 1)], **options)
    assert layer.kernel is None
    for training, kernel in zip((True, False), kernels, strict=True):
        layer.train(training)(torch.zeros(shape, dtype=options.get("dtype", torch.float32)))
        assert layer.kernel == kernel


@pytest.mark.parametrize("pair", [(2.0, 0.5), (torch.tensor(2.0), torch.tensor(0.5)), [np.float32(2), 0.5]])
def test_an_adjustment_may_be_of_numbers(pair: Any) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    layer = BatchNorm(3, adjustment=lambda shape: pair)
    torch.testing.assert_close(layer(x), BatchNorm(3)(x) * 2 + 0.5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("names", FEW)
def test_the_function_does_what_the_layer_does(names: str, training: bool) -> None:
    options = FEW[names]
    layer, adjust = make(options, torch.float64, None)
    x, dy = batch(0, SHAPE, torch.float64, options.get("layout", torch.contiguous_format))
    layer.train(training)
    state = {name: one.clone() for name, one in layer.named_buffers()}
    expected = run(layer, adjust, x, dy)
    x.requires_grad_()
    momentum, clipping = layer.momentum, options.get("renorm_clipping")
    y = batch_norm(
        x,
        state["running_mean"],
        state["running_var"],
        layer.weight,
        layer.bias,
        training,
        1.0 if momentum is None else momentum,
        EPS,
        axis=options.get("axis", 1),
        renorm_mean=state.get("renorm_mean"),
        renorm_stddev=state.get("renorm_stddev"),
        renorm_clipping=clipping(0) if callable(clipping) else clipping,
        renorm_momentum=options.get("renorm_momentum", 0.01),
        virtual_batch_size=options.get("virtual_batch_size"),
        adjustment=None if adjust is None else adjust.last,
    )
    leaves = {"input": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    seen = {"output": y.detach()} | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    del state["num_batches_tracked"]
    same(seen | state, {name: one for name, one in expected.items() if "adjustment" not in name}, 1e-12)


# Schedules of renorm's limits


@pytest.mark.parametrize("of", [int, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("batches", "rmax", "dmax"),
    [
        (0, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (22_500, 2.0, 4.375),
        (25_000, 1 + 2 * 20 / 35, 5.0),
        (40_000, 3.0, 5.0),
        (40_001, 3.0, 5.0),
        (10**9, 3.0, 5.0),
    ],
)
def test_the_schedule_has_the_values_of_the_paper(
    batches: int, rmax: float, dmax: float, of: Callable[[int], Any]
) -> None:
    limits = ClippingSchedule()(of(batches))
    assert set(limits) == {"rmin", "rmax", "dmax"}
    for name, expected in {"rmin": 1 / rmax, "rmax": rmax, "dmax": dmax}.items():
        assert isinstance(limits[name], float if of is int else Tensor)
        assert float(limits[name]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fused", [None, False])
def test_limits_follow_the_schedule_past_its_end_and_wait_during_evaluation(fused: bool | None) -> None:
    schedule = ClippingSchedule(start=2, rmax=1.5, rmax_end=6, dmax=0.4, dmax_end=4)
    asked: list[int] = []

    def recorded(batches: Any) -> Mapping[str, Any]:
        asked.append(int(batches))
        return schedule(batches)

    layer = BatchNorm2d(
        5, eps=EPS, renorm=True, renorm_clipping=recorded, renorm_momentum=0.0, dtype=torch.float64, fused=fused
    )
    steps = 14
    for step in range(steps):
        rmax, dmax = (np.interp(step, *points) for points in (([2, 6], [1, 1.5]), ([2, 4], [0, 0.4])))
        x, _ = batch(step, SHAPE, torch.float64, torch.contiguous_format)
        x = (x * torch.tensor([0.1, 0.9, 1.0, 1.2, 9.0])[:, None, None]).requires_grad_()  # beyond both limits of r
        y = layer(x)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        sigma = (variance + EPS).sqrt()
        r, d = sigma.clamp(1 / rmax, rmax), mean.clamp(-dmax, dmax)  # the averages stay at 1 and 0
        expected = (x - mean) / sigma * r.detach() + d.detach()
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        torch.testing.assert_close(*(torch.autograd.grad((one * weights).sum(), x)[0] for one in (y, expected)))
        layer.eval()(x)
        layer.train()
    assert asked == list(range(steps))


SEVERAL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((1, 2), {}),
    "first": ((0, 1), {}),
    "neighbours where they lie": ((1, 3), {"renorm": True, "renorm_momentum": 0.3}),
    "without the channels": ((2, 3), {"renorm": True, "virtual_batch_size": 2}),
    "all": ((1, 2, 3), {"virtual_batch_size": 2}),
    "virtual batches, apart where they lie": ((1, 2), {"virtual_batch_size": 2}),
    "adjustment": ((1, 2), {"adjustment": Adjust((1, 2))}),
    "adjustment by one axis": ((1, 2), {"adjustment": Adjust((2,))}),
    "mask": ((1, 2), {"mask": True}),
    "skip_nonfinite": ((1, 2), {"skip_nonfinite": True}),
}


def several(name: str, form: torch.memory_format, fused: bool | None) -> tuple[BatchNorm, Tensor, Tensor | None]:
    """A layer with several feature axes, an input in a memory format, and a mask."""
    axes, options = SEVERAL[name]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((6, 5, 4, 3), generator=generator, dtype=torch.float64).contiguous(memory_format=form)
    shape = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    mask = torch.rand(shape, generator=generator) > 0.3 if "mask" in options else None
    options = {option: copy.deepcopy(value) for option, value in options.items() if option != "mask"}
    sizes = tuple(x.shape[axis] for axis in axes)
    layer = BatchNorm(sizes, axis=axes, dtype=torch.float64, fused=fused, **options)
    with torch.no_grad():
        for value in (layer.weight, layer.bias, layer.running_mean):
            assert value is not None
            value.copy_(torch.rand(sizes, generator=generator) + 0.5)
    return layer, x.requires_grad_(), mask


@pytest.mark.parametrize("name", SEVERAL)
def test_several_axes_of_a_channels_last_tensor_are_those_of_a_contiguous_one(name: str) -> None:
    layer, x, mask = several(name, torch.channels_last, None)
    twin, z, _ = several(name, torch.contiguous_format, False)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for _ in range(2):
        y, expected = layer(x, mask), twin(z, mask)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.backward(dy.contiguous(memory_format=torch.channels_last))
        expected.backward(dy)
    assert (layer.kernel, twin.kernel) == ("cpu", "composed")
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-8, atol=1e-9)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)
    if isinstance(layer.adjustment, Adjust) and isinstance(twin.adjustment, Adjust):
        assert layer.adjustment.last is not None
        assert twin.adjustment.last is not None
        for value, other in zip(layer.adjustment.last, twin.adjustment.last, strict=True):
            torch.testing.assert_close(value.grad, other.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["plain", "neighbours where they lie", "all", "adjustment", "mask"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_array_of_the_size_of_the_input_is_copied(name: str, form: torch.memory_format) -> None:
    layer, x, mask = several(name, form, None)
    dy = torch.ones_like(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        layer(x, mask).backward(dy)
    assert layer.kernel == "cpu"
    copies = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert [shape for shape in copies if math.prod(shape) >= x.numel()] == []
