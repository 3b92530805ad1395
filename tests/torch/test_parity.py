"""Without options: torch.nn's numbers, gradients, buffers, types and strides, over PyTorch's own kinds of cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm

OURS: dict[int, Any] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
THEIRS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""What a comparison allows, relative to the largest value: a few roundings of the type."""

Make = Callable[..., Tensor]
"""Makes a tensor with random values of the sizes that it is given."""


def transposed(make: Make, *shape: int) -> Tensor:
    return make(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def channels_last(make: Make, *shape: int) -> Tensor:
    return make(*shape).contiguous(memory_format=CHANNELS_LAST[len(shape)])


def cut_from_channels_last(make: Make, *shape: int) -> Tensor:
    return channels_last(make, *shape[:-1], shape[-1] + 3)[..., 1:-2]


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda make, *shape: make(*shape),
    "channels last": channels_last,
    "cut from channels last": cut_from_channels_last,
    "transposed": transposed,
    "channels first of all": lambda make, *shape: make(shape[1], shape[0], *shape[2:]).transpose(0, 1),
    "every other value": lambda make, *shape: make(*shape[:-1], 2 * shape[-1])[..., ::2],
    "every other channel": lambda make, *shape: make(shape[0], 2 * shape[1], *shape[2:])[:, ::2],
    "behind an offset": lambda make, *shape: make(math.prod(shape) + 1)[1:].view(shape),
    "one sample expanded": lambda make, *shape: make(1, *shape[1:]).expand(shape),
    "one pixel expanded": lambda make, *shape: make(*shape[:2], *[1] * len(shape[2:])).expand(shape),
    "one value expanded": lambda make, *shape: make(*[1] * len(shape)).expand(shape),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and its batches. `kept` is the type of parameters and buffers, by default that of the input."""

    shape: tuple[int, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    kept: torch.dtype | None = None
    layout: str = "contiguous"
    upstream: str = "contiguous"
    mean: float = 0.5

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """An input and the gradient for the output."""
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return (self.mean + torch.randn(*shape, dtype=torch.float64, generator=generator)).to(self.dtype)

        x = LAYOUTS[self.layout](make, *self.shape)
        dy = LAYOUTS[self.upstream](make, *self.shape)
        return x, dy.sub(self.mean)

    def layers(self, fused: bool | None) -> tuple[Any, Any]:
        """Our layer and theirs, with the same parameters, which are not those of a new layer."""
        kept = self.kept or self.dtype
        rank, features = len(self.shape), self.shape[1]
        theirs = THEIRS[rank](features, **self.options, dtype=kept)
        ours = OURS[rank](features, **self.options, dtype=kept, fused=fused)
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.uniform_(0.5, 1.5, generator=generator)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    x = x.detach().requires_grad_()
    y = layer(x)
    inputs = {"input": x} | {name: one for name, one in layer.named_parameters() if one.requires_grad}
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"output": y.detach()} | {f"gradient of {name}": one for name, one in zip(inputs, gradients, strict=True)}


def near(name: str, actual: Tensor, expected: Tensor, allowed: float, least: float = 1.0) -> None:
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    atol, prefix = allowed * max(least, largest), f"{name}: {{}}"
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol, msg=prefix.format)


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dy: Tensor | None = None) -> None:
    """Compare by name.

    What is a sum of `dy`'s values may differ by their rounding where they cancel, and as PyTorch rounds in between.
    """
    assert list(actual) == list(expected)
    terms = 0.0 if dy is None else float(dy.double().abs().sum()) / dy.shape[1]
    for name, value in expected.items():
        own = actual[name]
        least, allowed = 1.0, ROUNDING.get(value.dtype, 0.0)
        if dy is not None and name in ("gradient of weight", "gradient of bias"):
            least, allowed = max(1.0, 0.05 * terms), max(allowed, ROUNDING[dy.dtype])
        assert (name, own.dtype, own.shape, own.stride()) == (name, value.dtype, value.shape, value.stride())
        near(name, own, value, allowed, least)


def descend(layer: nn.Module, seen: Mapping[str, Tensor]) -> None:
    """Take one step of gradient descent."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.sub_(seen[f"gradient of {name}"], alpha=0.01)


def check_program(case: Case, fused: bool | None) -> None:
    """Train, evaluate, train again: everything is the same after every step."""
    ours, theirs = case.layers(fused)
    same(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    for step, training in enumerate((True, True, False, True)):
        x, dy = case.batch(step)
        before = x.clone()
        expected = run(theirs.train(training), x, dy)
        actual = run(ours.train(training), x, dy)
        same(actual, expected, dy)
        same(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        assert torch.equal(x, before)
        if training:
            descend(theirs, expected)
            descend(ours, actual)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "simple average": {"eps": 1e-3, "momentum": None},
    "momentum": {"eps": 1e-3, "momentum": 0.8},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "large epsilon": {"eps": 0.5},
    "not affine": {"eps": 1e-3, "momentum": 0.3, "affine": False},
    "no bias": {"bias": False},
    "no tracking": {"eps": 1e-3, "momentum": 0.3, "track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
}
SHAPES: dict[str, tuple[int, ...]] = {
    "2D": (4, 10),
    "3D": (4, 5, 3),
    "4D": (2, 3, 6, 6),
    "5D": (2, 3, 4, 4, 4),
    "one sample": (1, 3, 4, 5),
    "one channel": (3, 1, 4, 5),
    "one pixel": (6, 5, 1, 1),
    "no sample": (0, 5, 2, 2),
    "no pixel": (2, 5, 0, 2),
    "large 2D": (500, 67),
    "large 3D": (8, 17, 241),
    "large 4D": (4, 16, 17, 31),
    "large 5D": (2, 3, 17, 19, 17),
    "large one sample": (1, 3, 101, 127),
}
CASES = {
    f"{shape}, {options}": Case(SHAPES[shape], OPTIONS[options])
    for shape in ("2D", "3D", "4D", "5D", "no sample", "large 4D")
    for options in OPTIONS
    if "large" not in shape or options in ("simple average", "not affine", "no bias", "no tracking")
} | {shape: Case(SHAPES[shape]) for shape in SHAPES}
LAYOUT_CASES = {
    # What is the same everywhere has no variance; a large eps keeps the rounding of its mean from mattering.
    f"{shape}, {layout}": Case(SHAPES[shape], {"eps": 0.5 if "expanded" in layout else 1e-5}, layout=layout)
    for shape in ("2D", "3D", "4D", "5D", "large 4D", "large 5D")
    for layout in (LAYOUTS if shape != "large 5D" else ["channels last"])
    if layout != "contiguous" and ("channels last" not in layout or len(SHAPES[shape]) in CHANNELS_LAST)
} | {
    f"{shape}, {layout}, gradient {upstream}": Case(SHAPES[shape], layout=layout, upstream=upstream)
    for shape in ("4D", "5D", "one channel", "one pixel", "large 4D")
    for layout in ("contiguous", "channels last")
    for upstream in ("channels last", "transposed", "one value expanded")
}
TYPE_CASES = {
    f"{shape}, {name}, {layout}": Case(SHAPES[shape], dtype=dtype, kept=kept, layout=layout)
    for shape in ("2D", "4D", "no sample", "large 3D", "large 4D")
    for name, dtype, kept in (
        ("float64", torch.float64, None),
        ("float16", torch.float16, None),
        ("bfloat16", torch.bfloat16, None),
        ("float16 in float32", torch.float16, torch.float32),
        ("bfloat16 in float32", torch.bfloat16, torch.float32),
    )
    for layout in ("contiguous", "channels last")
    if layout == "contiguous" or len(SHAPES[shape]) in CHANNELS_LAST
}


@pytest.fixture(params=["cpu", "composed"])
def fused(request: pytest.FixtureRequest, force_cpu: None) -> bool | None:
    """The option, for CPU kernels that serve all that they can, and for the composed path."""
    return None if request.param == "cpu" else False


@pytest.mark.parametrize("case", (CASES | LAYOUT_CASES).values(), ids=CASES | LAYOUT_CASES)
def test_training_and_evaluation_are_those_of_torch(case: Case, fused: bool | None) -> None:
    check_program(case, fused)


@pytest.mark.parametrize("case", TYPE_CASES.values(), ids=TYPE_CASES)
def test_types_of_inputs_and_parameters_are_those_of_torch(case: Case, fused: bool | None) -> None:
    check_program(case, fused)


@pytest.mark.parametrize("name", ["large 4D", "4D", "2D"])
@pytest.mark.parametrize("mean", [1e4, -1e4])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_mean_large_beside_the_spread_costs_no_more_than_it_must(
    name: str, mean: float, layout: str, fused: bool | None
) -> None:
    case = Case(SHAPES[name], {"momentum": None}, mean=mean, layout=layout)
    ours, theirs = case.layers(fused)
    _, exact = dataclasses.replace(case, kept=torch.float64).layers(fused)
    exact.load_state_dict(theirs.state_dict())
    for step, training in enumerate((True, True, False)):
        x, dy = case.batch(step)
        dy = dy - dy.mean()
        expected, actual = run(exact.train(training), x.double(), dy.double()), run(ours.train(training), x, dy)
        for key, value in expected.items():
            near(key, actual[key], value, 3e-3)  # 1e4 in float32 is known to 5e-4
        near("running_mean", ours.running_mean, exact.running_mean, 2e-7)
        near("running_var", ours.running_var, exact.running_var, 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "frozen", [("weight",), ("bias",), ("weight", "bias"), ("weight", "bias", "input"), ("input",)]
)
@pytest.mark.parametrize("shape", ["4D", "large 4D"])
def test_what_needs_no_gradient_changes_nothing_else(
    shape: str, frozen: tuple[str, ...], training: bool, fused: bool | None
) -> None:
    case = Case(SHAPES[shape])
    x, dy = case.batch(0)
    seen = []
    for layer in case.layers(fused):
        inputs = {"input": x.clone().requires_grad_("input" not in frozen), **dict(layer.named_parameters())}
        for name in frozen:
            inputs[name].requires_grad_(False)
        y = layer.train(training)(inputs["input"])
        assert y.requires_grad == (len(frozen) < 3)
        if y.requires_grad:
            y.backward(dy)
        gradients = {name: one.grad for name, one in inputs.items() if one.grad is not None}
        assert set(gradients) == set(inputs) - set(frozen)
        seen.append({"output": y.detach(), **gradients, **dict(layer.named_buffers())})
    same(seen[0], seen[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", ["4D", "large 4D"])
def test_without_gradients_the_outputs_and_buffers_are_the_same(
    shape: str, mode: Any, training: bool, fused: bool | None
) -> None:
    case = Case(SHAPES[shape])
    ours, theirs = case.layers(fused)
    for step in range(2):
        x, _ = case.batch(step)
        with mode():
            same({"output": ours.train(training)(x)}, {"output": theirs.train(training)(x)})
        same(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert not ours(x.requires_grad_()).is_inference()


@pytest.mark.parametrize("shape", ["4D", "large 4D"])
def test_a_layer_used_twice_before_the_gradient_has_the_gradients_of_both_uses(shape: str, fused: bool | None) -> None:
    case = Case(SHAPES[shape])
    (first, dy), (second, _) = case.batch(0), case.batch(1)
    seen = []
    for layer in case.layers(fused):
        inputs = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        y = layer(inputs[0]) * layer(inputs[1]).exp()
        gradients = torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)
        seen.append(dict(zip("abcd", gradients, strict=True)) | dict(layer.named_buffers()))
    same(seen[0], seen[1])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_statistics_that_are_no_longer_tracked_stay(training: bool, momentum: float | None, fused: bool | None) -> None:
    case = Case(SHAPES["4D"], {"momentum": momentum})
    layers = case.layers(fused)
    x, dy = case.batch(0)
    for layer in layers:
        run(layer, x, dy)
        layer.track_running_stats = False
    x, dy = case.batch(1)
    seen = [run(layer.train(training), x, dy) | dict(layer.named_buffers()) for layer in layers]
    same(seen[0], seen[1])


# Any axis


AXES: dict[str, tuple[tuple[int, ...], int | tuple[int, ...]]] = {
    "the second of two": ((6, 5), 1),
    "the last of two": ((6, 5), -1),
    "the last of three": ((6, 4, 5), -1),
    "the last of four": ((4, 3, 5, 2), -1),
    "in a tuple": ((4, 3, 5, 2), (-1,)),
    "the second of six": ((2, 3, 2, 1, 2, 2), 1),
    "apart": ((4, 3, 5, 2), (1, 3)),
    "not in order": ((4, 3, 5, 2), (3, 1)),
    "one from each end": ((4, 3, 2, 2, 3), (1, -1)),
    "side by side": ((4, 3, 5, 2), (1, 2)),
    "all but the samples": ((4, 3, 5), (1, 2)),
    "the samples": ((4, 3, 5), 0),
    "the samples and more": ((4, 3, 5), (0, -1)),
    "all but the last": ((4, 3, 5), (0, 1)),
    "large, the last": ((40, 30, 41), -1),
    "large, the samples": ((40, 30, 41), 0),
    "large, apart": ((16, 7, 20, 21), (1, 3)),
    "large, side by side": ((16, 7, 20, 21), (1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("place", AXES)
def test_any_axes_are_the_channels_of_torch_on_inputs_turned_to_suit(
    place: str, dtype: torch.dtype, fused: bool | None
) -> None:
    shape, axis = AXES[place]
    axes = sorted(one % len(shape) for one in (axis if isinstance(axis, tuple) else (axis,)))
    order = [one for one in range(len(shape)) if one not in axes] + axes
    sizes = tuple(shape[one] for one in axes)
    ours: Any = BatchNorm(sizes if isinstance(axis, tuple) else sizes[0], axis, dtype=dtype, fused=fused)
    theirs: Any = nn.BatchNorm1d(math.prod(sizes), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
            getattr(ours, name).copy_(parameter.view(sizes))

    def turned(x: Tensor) -> Tensor:
        there = x.permute(order)
        y: Tensor = theirs(there.reshape(-1, math.prod(sizes))).view(there.shape)
        return y.permute([order.index(one) for one in range(len(shape))])

    def flat(layer: Any, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        dx, *gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        state = {name: one.clone().view(-1) for name, one in layer.named_buffers()}
        return (
            {"output": y.detach().contiguous(), "input": dx.contiguous()}
            | state
            | {name: one.view(-1) for (name, _), one in zip(layer.named_parameters(), gradients, strict=True)}
        )

    for training in (True, True, False):
        x, dy = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
        ours.train(training)
        theirs.train(training)
        same(flat(ours, ours), flat(theirs, turned))
    for name, value in ours.state_dict().items():
        assert value.shape == (() if name == "num_batches_tracked" else sizes)


# The function


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("shape", ["2D", "3D", "4D", "large 4D", "no sample"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "not tracked"])
def test_the_function_is_that_of_torch(
    shape: str, affine: str, training: bool, tracked: bool, fused: bool | None
) -> None:
    if not tracked and not training:
        training = True  # there is nothing to evaluate by
    x, dy = Case(SHAPES[shape]).batch(0)
    features = x.shape[1]
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.rand(features, generator=generator) + 0.5 for name in ("weight", "bias")}
    given = {name: one for name, one in parameters.items() if affine in (name, "both")}
    seen = []
    for function in (lambda *a, **k: batch_norm(*a, **k, fused=fused), functional.batch_norm):
        statistics = {"running_mean": torch.zeros(features), "running_var": torch.ones(features)} if tracked else {}
        leaves = {"input": x, **given}
        leaves = {name: one.clone().requires_grad_() for name, one in leaves.items()}
        y = function(
            leaves["input"],
            statistics.get("running_mean"),
            statistics.get("running_var"),
            leaves.get("weight"),
            leaves.get("bias"),
            training,
            0.3,
            1e-3,
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
        seen.append({"output": y.detach()} | dict(zip(leaves, gradients, strict=True)) | statistics)
    same(seen[0], seen[1])
