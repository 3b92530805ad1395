"""First and second derivatives, forwards and backwards: finite differences, plain formulas, and torch.func."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from batchnorm.torch import BatchNorm, BatchNorm2d, BatchNorm3d, batch_norm

pytestmark = [
    pytest.mark.usefixtures("force_cpu"),
    # PyTorch says this of itself where forward-mode differentiation is used first.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

FIXED = {"rmin": 1.5, "rmax": 1.5, "dmax": 0.0}
"""Limits that make renorm's r and d the constants that they are to the gradient."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, the shape of its input, and what is differentiated by."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (4, 2, 3)
    axis: int | tuple[int, ...] = 1
    training: bool = True
    frozen: tuple[str, ...] = ()
    adjusted: tuple[tuple[int, ...], ...] = ()
    channels_last: bool = False

    def function(self, fused: bool | None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The layer as a function of all that it can be differentiated by, and values for these."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        adjustment: list[Tensor] = []
        options = {**self.options, "adjustment": (lambda shape: tuple(adjustment)) if self.adjusted else None}
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        sizes = tuple(self.shape[one] for one in axes)
        layer: Any = BatchNorm(sizes, axes, dtype=torch.float64, fused=fused, **options).train(self.training)
        names = [name for name, _ in layer.named_parameters()]
        x = random(*self.shape)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        inputs = [x, *(random(*sizes) for _ in names), *(random(*shape) for shape in self.adjusted)]
        # Averages that no batch has made yet would hide mistakes.
        state = {name: value.clone() for name, value in layer.named_buffers()}
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = torch.rand(value.shape, dtype=value.dtype, generator=generator) + 0.5
        for name, value in zip(["input", *names], inputs, strict=False):
            value.requires_grad_(name not in self.frozen)
        for value in inputs[1 + len(names) :]:
            value.requires_grad_()

        def function(x: Tensor, *rest: Tensor) -> Tensor:
            adjustment[:] = rest[len(names) :]
            fresh = {name: value.clone() for name, value in state.items()}
            y: Tensor = functional_call(layer, fresh | dict(zip(names, rest, strict=False)), (x,))
            return y

        return function, tuple(inputs)


CASES = {
    "training": Case(),
    "two axes": Case(shape=(5, 3)),
    "channels last": Case(shape=(3, 2, 2, 2), channels_last=True),
    "five axes": Case(shape=(2, 2, 2, 1, 2)),
    "evaluation": Case(training=False),
    "evaluation, last axis": Case(axis=-1, training=False),
    "evaluation, channels last": Case(shape=(3, 2, 2, 2), channels_last=True, training=False),
    "not affine": Case({"affine": False}),
    "no bias": Case({"bias": False}),
    "no tracking, evaluation": Case({"track_running_stats": False}, training=False),
    "frozen weight": Case(frozen=("weight",)),
    "frozen bias": Case(frozen=("bias",)),
    "frozen parameters": Case(frozen=("weight", "bias")),
    "frozen input": Case(frozen=("input",)),
    "last axis": Case(axis=-1),
    "the samples' axis": Case(axis=0),
    "axes side by side": Case(shape=(4, 2, 2, 2), axis=(1, 2)),
    "axes apart": Case(shape=(3, 2, 2, 2), axis=(1, 3)),
    "renorm": Case({"renorm": True, "renorm_clipping": FIXED}),
    "renorm, evaluation": Case({"renorm": True}, training=False),
    "renorm, channels last, frozen": Case(
        {"renorm": True, "renorm_clipping": FIXED}, (3, 2, 2, 2), frozen=("weight", "bias"), channels_last=True
    ),
    "virtual batches": Case({"virtual_batch_size": 2}),
    "virtual batches, channels last": Case({"virtual_batch_size": 2}, (4, 2, 2, 2), channels_last=True),
    "virtual batches, renorm, last axis": Case(
        {"virtual_batch_size": 2, "renorm": True, "renorm_clipping": FIXED}, axis=-1
    ),
    "virtual batches, axes side by side": Case({"virtual_batch_size": 2}, (4, 2, 2, 2), axis=(1, 2)),
    "adjusted by feature": Case(adjusted=((1, 2, 1), (2, 1))),
    "adjusted by sample": Case(adjusted=((4, 2, 3), (4, 1, 1))),
    "adjusted, renorm, channels last": Case(
        {"renorm": True, "renorm_clipping": FIXED},
        (3, 2, 2, 2),
        adjusted=((1, 2, 1, 1), (1, 1, 1, 1)),
        channels_last=True,
    ),
    "adjusted, axes apart, not affine": Case(
        {"affine": False}, (3, 2, 2, 2), axis=(1, 3), adjusted=((1, 2, 1, 2), (1, 1, 1, 2))
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
either_path = pytest.mark.parametrize("fused", [None, False], ids=["cpu", "composed"])


@either_path
@every_case
def test_first_derivatives_are_those_of_finite_differences_backwards_and_forwards(
    case: Case, fused: bool | None
) -> None:
    assert gradcheck(*case.function(fused), check_forward_ad=True, fast_mode=True)


@either_path
@every_case
def test_second_derivatives_are_those_of_finite_differences(case: Case, fused: bool | None) -> None:
    function, inputs = case.function(fused)
    assert gradgradcheck(function, inputs, fast_mode=True)


@either_path
@pytest.mark.parametrize("size", [None, 2])
def test_renorm_s_correction_is_a_constant_to_first_and_second_derivatives(
    size: int | None, fused: bool | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, dy, again = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 3, 5), (3,), (3,), (4, 3, 5), (4, 3, 5))
    )
    inputs = [one.requires_grad_() for one in (x, weight, bias, dy)]
    mean, stddev = torch.tensor([0.5, -2.0, 0.0]).double(), torch.tensor([0.25, 1.0, 3.0]).double()
    view = x if size is None else x.reshape(size, -1, *x.shape[1:])
    axes = (0, 2) if size is None else (0, 3)
    variance, m = torch.var_mean(view, axes, correction=0, keepdim=True)
    average = (m, variance) if size is None else (m.mean(1), variance.mean(1))
    shape = (1, 3, 1)
    r = ((average[1] + 1e-5).sqrt() / stddev.view(shape)).detach().clamp(0.5, 2.0)
    d = ((average[0] - mean.view(shape)) / stddev.view(shape)).detach().clamp(-1.0, 1.0)
    assert ((r > 0.5) & (r < 2)).any()
    assert ((d.abs() > 0) & (d.abs() < 1)).any()
    normal = ((view - m) / (variance + 1e-5).sqrt()).reshape(x.shape)
    expected = (normal * r + d) * weight.view(shape) + bias.view(shape)
    actual = batch_norm(
        x,
        torch.zeros(3).double(),
        torch.ones(3).double(),
        weight,
        bias,
        True,
        renorm_mean=mean,
        renorm_stddev=stddev,
        renorm_clipping={"rmin": 0.5, "rmax": 2.0, "dmax": 1.0},
        virtual_batch_size=size,
        fused=fused,
    )
    seen = []
    for y in (expected, actual):
        first = torch.autograd.grad(y, inputs[:3], dy, create_graph=True)
        second = torch.autograd.grad((first[0] * again).sum() + first[1].exp().sum(), inputs, allow_unused=True)
        seen.append([y, *first, *(torch.zeros(3) if one is None else one for one in second)])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-10, check_dtype=False)


@pytest.mark.parametrize("shape", [(4, 16, 17, 31), (500, 67)], ids=["large 4D", "large 2D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_second_derivatives_of_large_inputs_are_those_of_torch(
    shape: tuple[int, ...], dtype: torch.dtype, training: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy, by, scale = (torch.randn(size, dtype=dtype, generator=generator) for size in (*[shape] * 3, shape[1:2]))
    ours, theirs = BatchNorm(shape[1]), (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])
    seen = []
    for layer, kept in ((ours, dtype), (theirs, torch.float64)):
        layer.to(kept).train(training)
        leaves = [one.to(kept).requires_grad_() for one in (x, dy)]
        with torch.no_grad():
            layer.weight.copy_(scale)
        first = torch.autograd.grad(layer(leaves[0]), [leaves[0], *layer.parameters()], leaves[1], create_graph=True)
        score = (first[0] * by.to(kept)).sum() + first[1].square().mean() + first[2].square().mean()
        seen.append([*first, *torch.autograd.grad(score, [*leaves, layer.weight])])
    for actual, expected in zip(seen[0], seen[1], strict=True):
        allowed = (1e-11 if dtype == torch.float64 else 3e-5) * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=allowed)


@either_path
def test_third_derivatives_are_right(fused: bool | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, first, second, third = (torch.randn(6, 3, dtype=torch.float64, generator=generator) for _ in range(4))
    x.requires_grad_()
    variance, mean = torch.var_mean(x, 0, correction=0)
    seen = []
    for y in (batch_norm(x, None, None, training=True, fused=fused), (x - mean) / (variance + 1e-5).sqrt()):
        for weights in (first, second, third):
            (y,) = torch.autograd.grad((y.sin() * weights).sum(), x, create_graph=True)
        seen.append(y.detach())
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("what", "fused"), [("weight", None), ("weight", False), ("input", None)]
)  # the composed path keeps the centered input, and not the input
def test_what_was_changed_before_its_gradient_is_an_error_as_with_torch(what: str, fused: bool | None) -> None:
    for layer in (nn.BatchNorm2d(3), BatchNorm2d(3, fused=fused)):
        x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        moved = x * 1
        y = layer(moved)
        with torch.no_grad():
            (layer.weight if what == "weight" else moved).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# torch.func


def scored(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number from the output, by a function with derivatives of any order."""

    def score(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return (y.sin() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return score


@either_path
@every_case
def test_torch_func_agrees_with_plain_autograd(case: Case, fused: bool | None) -> None:
    function, inputs = case.function(fused)
    score, leaves = scored(function), tuple(one.detach() for one in inputs)
    tangents = tuple(torch.linspace(1, -2, one.numel(), dtype=one.dtype).view(one.shape) for one in inputs)
    places = tuple(range(len(inputs)))
    for one in inputs:
        one.requires_grad_()
    value = score(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    near = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-9)
    near(torch.func.grad(score, places)(*leaves), gradients)
    along = sum((one * by).sum() for one, by in zip(gradients, tangents, strict=True))
    near(torch.func.jvp(score, leaves, tangents), (value.detach(), along))
    pull: Any = torch.func.vjp
    y, vjp = pull(function, *leaves)
    near(vjp(torch.ones_like(y)), torch.autograd.grad(function(*inputs).sum(), inputs))


@either_path
@every_case
def test_hessians_agree_with_plain_autograd(case: Case, fused: bool | None) -> None:
    function, inputs = case.function(fused)
    score, leaves = scored(function), tuple(one.detach() for one in inputs)
    plain: Any = torch.autograd.functional.hessian
    transformed: Any = torch.func.hessian
    torch.testing.assert_close(transformed(score, tuple(range(len(leaves))))(*leaves), plain(score, leaves))


# --- views, many gradients at once, and what a tensor's memory does not show ---


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"fused": False}], ids=str)
@pytest.mark.parametrize("rank", [4, 5])
def test_gradients_of_views_with_axes_of_size_one_are_those_of_their_values(
    rank: int, options: dict[str, Any], training: bool, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr("batchnorm.torch.functional.SMALL", 1 << 17)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 50, 8, generator=generator)
    ones = [1] * (rank - 3)
    views = {
        "an odd stride": tokens.transpose(1, 2).reshape(4, 8, 50, *ones),
        "unsqueezed": tokens.transpose(1, 2)[(..., *[None] * (rank - 3))],
        "one sample": tokens[:1].transpose(1, 2)[(..., *[None] * (rank - 3))],
        "one channel": tokens[..., :1].transpose(1, 2)[(..., *[None] * (rank - 3))],
        "the axis in front": tokens.transpose(1, 2)[(slice(None), slice(None), *[None] * (rank - 3))],
    }
    kind: Any = BatchNorm2d if rank == 4 else BatchNorm3d
    for name, view in views.items():
        if len(view) == 1 and options.get("virtual_batch_size"):
            continue
        head = torch.randn(view.numel() // len(view), 3, generator=generator)
        found = []
        for x, dtype in ((view, torch.float32), (view.contiguous(), torch.float64)):
            layer = kind(view.shape[1], dtype=dtype, **options).train(training)
            leaf = x.detach().to(dtype).requires_grad_() if dtype == torch.float64 else x.detach().requires_grad_()
            torch.autograd.backward((layer(leaf).flatten(1) @ head.to(dtype)).square().sum())
            found.append([leaf.grad, layer.weight.grad, layer.bias.grad])
        for own, expected in zip(*found, strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-4 * max(scale, 1), msg=name)


BATCHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "composed": {"fused": False},
    "renorm": {"renorm": True, "renorm_clipping": FIXED},
    "virtual batches": {"virtual_batch_size": 4},
    "adjustment": {"adjustment": lambda shape: (torch.tensor(1.5), torch.tensor([0.5, 1.0, 2.0]).reshape(-1, 1, 1))},
    "not affine": {"affine": False},
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", BATCHED.values(), ids=list(BATCHED))
def test_many_gradients_at_once_are_those_one_by_one(options: dict[str, Any], form: Any, training: bool) -> None:
    layer = BatchNorm2d(3, **options).train(training)
    layer.momentum = layer.renorm_momentum = 0.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 3, 2, generator=generator).contiguous(memory_format=form).requires_grad_()
    many = torch.randn(5, *x.shape, generator=generator)
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x), inputs, many, is_grads_batched=True)
    expected = zip(*(torch.autograd.grad(layer(x), inputs, dy) for dy in many), strict=True)
    for own, rows in zip(found, expected, strict=True):
        torch.testing.assert_close(own, torch.stack(rows), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("options", BATCHED.values(), ids=list(BATCHED))
def test_vectorized_jacobians_and_hessians_are_those_row_by_row(options: dict[str, Any]) -> None:
    layer = BatchNorm2d(3, **options)
    layer.momentum = layer.renorm_momentum = 0.0
    x = torch.randn(4, 3, 2, 1, generator=torch.Generator().manual_seed(0))

    def rows(x: Tensor) -> Any:
        return layer(x).sum(0)

    def number(x: Tensor) -> Any:
        return layer(x).pow(3).sum()

    pairs: Any = (
        (torch.autograd.functional.jacobian, rows),
        (torch.autograd.functional.hessian, number),
    )
    for differentiate, function in pairs:
        found, expected = (differentiate(function, x, vectorize=vectorize) for vectorize in (True, False))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", BATCHED.values(), ids=list(BATCHED))
def test_functionalized_layers_give_the_same_and_move_the_same(options: dict[str, Any], training: bool) -> None:
    layer, twin = (BatchNorm2d(3, **options).train(training) for _ in range(2))
    x = torch.randn(8, 3, 3, 2, generator=torch.Generator().manual_seed(0)) + 1
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    y = torch.func.functionalize(functools.partial(functional_call, layer))((parameters, buffers), x)
    torch.testing.assert_close(y, twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"fused": False}], ids=str)
def test_views_that_negate_are_seen_as_they_are(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)

    def negated(*shape: int) -> Tensor:
        """A tensor whose memory holds the negatives of its values."""
        return torch.complex(*(torch.rand(shape, generator=generator) for _ in range(2))).conj().imag

    x, dy = negated(8, 3, 2, 2), negated(8, 3, 2, 2)
    values = {name: negated(3) for name in ("weight", "bias")}
    running = {"running_mean": negated(3), "running_var": 1 - negated(3)}
    results = []
    for resolve in (torch.clone, lambda value: value):
        leaf = resolve(x).detach().requires_grad_()
        given: dict[str, Any] = {name: resolve(value).detach().requires_grad_() for name, value in values.items()}
        moved: dict[str, Any] = {name: resolve(value) for name, value in running.items()}
        y = batch_norm(leaf, training=True, **given, **moved, **options)
        torch.autograd.backward(y, resolve(dy))
        results.append([y.detach(), leaf.grad, *(value.grad for value in given.values()), *moved.values()])
    torch.testing.assert_close(*results)
