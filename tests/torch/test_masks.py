"""What counts: masks, weights, uneven virtual batches and non-finite batches, beside loops in float64."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    ClippingSchedule,
    batch_norm,
    hold,
    recalibrate,
    sequence_mask,
)
from tests.oracle import Oracle

EPS = 1e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "composed": {"fused": False},
    "renorm": {"renorm": True, "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}},
    "virtual batches": {"virtual_batch_size": 3},
    "virtual batches, renorm": {"virtual_batch_size": 4, "renorm": True},
    "adjustment": {"adjustment": (0.5, 0.25)},
    "not affine": {"affine": False},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An input, its feature axes and its layout."""

    sizes: tuple[int, ...]
    axis: int | tuple[int, ...] = 1
    channels_last: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(sorted(axis % len(self.sizes) for axis in axes))

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(1 if axis in self.axes else size for axis, size in enumerate(self.sizes))


SHAPES = {
    "tabular": Shape((7, 3)),
    "sequences": Shape((7, 3, 5)),
    "images": Shape((6, 3, 4, 2)),
    "channels last": Shape((6, 3, 4, 2), channels_last=True),
    "last axis": Shape((7, 5, 3), axis=-1),
    "axes apart": Shape((6, 2, 4, 3), axis=(1, 3)),
}


def kept(shape: Shape, kind: str) -> np.ndarray[Any, Any] | None:
    """A mask of a kind, as it broadcasts to inputs."""
    generator = np.random.default_rng(0)
    sizes = shape.positions
    masks: dict[str, Callable[[], Any]] = {
        "everything": lambda: np.ones(sizes, bool),
        "some": lambda: generator.random(sizes) < 0.6,
        "one": lambda: np.arange(np.prod(sizes)).reshape(sizes) == 4,
        "nothing": lambda: np.zeros(sizes, bool),
        "no first sample's group": lambda: np.broadcast_to(
            (np.arange(sizes[0]) % 3 > 0).reshape(-1, *[1] * (len(sizes) - 1)), sizes
        ),
        "weights": lambda: generator.random(sizes) * (generator.random(sizes) < 0.7),
        "no mask": lambda: None,
    }
    return masks[kind]()  # type: ignore[no-any-return]


MASKS = ["everything", "some", "one", "nothing", "no first sample's group", "weights", "no mask"]
CASES = [(shape, options, mask) for shape in SHAPES for options in OPTIONS for mask in MASKS]


class Adjust:
    """A pair of arrays by feature, in whatever form is asked for."""

    def __init__(self, shape: Shape, pair: tuple[float, float]) -> None:
        sizes = [size if axis in shape.axes else 1 for axis, size in enumerate(shape.sizes)]
        ramp = np.arange(np.prod(sizes)).reshape(sizes)
        self.pair = pair[0] + ramp, pair[1] - ramp

    def __call__(self, _: Any) -> Any:
        return self.pair

    def tensors(self, dtype: torch.dtype) -> Any:
        return lambda _: tuple(torch.from_numpy(value).to(dtype) for value in self.pair)


def layers(shape: Shape, options: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, Oracle]:
    """A layer and the loops of the same, with parameters and averages that are not those of the beginning."""
    given = dict(options)
    adjust = Adjust(shape, given["adjustment"]) if "adjustment" in given else None
    if adjust is not None:
        given["adjustment"] = adjust.tensors(dtype)
    sizes = tuple(shape.sizes[axis] for axis in shape.axes)
    layer: Any = BatchNorm(sizes, shape.axes, eps=EPS, momentum=0.3, dtype=dtype, **given)
    layer.renorm_momentum = 0.2
    rng = np.random.default_rng(1)
    first = {"moving_mean": rng.normal(size=sizes), "moving_variance": rng.random(sizes) + 0.5}
    if options.get("affine", True):
        first |= {"gamma": rng.random(sizes) + 0.5, "beta": rng.normal(size=sizes)}
    clipping = options.get("renorm_clipping", {})
    oracle = Oracle.build(
        shape.sizes, shape.axes, initial=first, momentum=0.7, epsilon=EPS, renorm=options.get("renorm", False),
        renorm_momentum=0.8, virtual_batch_size=options.get("virtual_batch_size"), bessel=not options.get("renorm"),
        adjustment=adjust, masked="zero", center="beta" in first, scale="gamma" in first, **clipping,
    )  # fmt: skip
    names = {"running_mean": "moving_mean", "running_var": "moving_variance", "weight": "gamma", "bias": "beta"}
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(torch.from_numpy(oracle.variables[names[name]]))
        for name in ("running_mean", "running_var"):
            getattr(layer, name).copy_(torch.from_numpy(oracle.variables[names[name]]))
        if layer.renorm:
            # The one standard deviation that PyTorch's layer keeps is sqrt(running_var + eps).
            for name in ("moving_stddev", "renorm_stddev"):
                oracle.variables[name] = np.sqrt(oracle.variables["moving_variance"] + EPS)
            layer.renorm_mean.copy_(torch.from_numpy(oracle.variables["renorm_mean"]))
            layer.renorm_stddev.copy_(torch.from_numpy(oracle.variables["renorm_stddev"]))
    return layer, oracle


def averages(oracle: Oracle) -> dict[str, Any]:
    names = {
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
        "renorm_mean": "renorm_mean",
        "renorm_stddev": "renorm_stddev",
    }
    return {name: oracle.variables[other].copy() for name, other in names.items() if other in oracle.variables}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("shape_name", "options_name", "mask_name"), CASES, ids=[", ".join(case) for case in CASES])
@pytest.mark.usefixtures("force_cpu")
def test_steps_gradients_and_evaluation_are_those_of_loops(
    shape_name: str, options_name: str, mask_name: str, dtype: torch.dtype
) -> None:
    shape, options = SHAPES[shape_name], OPTIONS[options_name]
    near: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    layer, oracle = layers(shape, options, dtype)
    rng = np.random.default_rng(2)
    array = kept(shape, mask_name)
    weights = None if array is None else array.astype(np.float64)
    mask = None if array is None else torch.from_numpy(array.copy())
    if mask is not None and shape_name in ("sequences", "axes apart"):
        mask = mask.squeeze(shape.axes)  # without the feature axes
    for _ in range(2):
        x, dy = rng.normal(size=shape.sizes) * 2 + 1, rng.normal(size=shape.sizes)
        if weights is not None:
            x = np.where(weights > 0, x, np.nan)
        leaf = torch.from_numpy(x).to(dtype)
        if shape.channels_last:
            leaf = leaf.contiguous(memory_format=torch.channels_last)
        leaf.requires_grad_()
        layer.zero_grad()
        before = averages(oracle)
        counted = int(layer.num_batches_tracked)
        y = layer(leaf, mask=mask)
        torch.autograd.backward(y, torch.from_numpy(dy).to(dtype))
        used = oracle.corrections(oracle.averages(oracle.moments(x, weights)))
        expected = oracle.gradients(x, dy, used, oracle.adjust(shape.sizes), weights)
        np.testing.assert_allclose(y.detach().numpy(), oracle.train(x, weights), **near)
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), expected.x, **near)
        for name, value in layer.named_parameters():
            np.testing.assert_allclose(
                value.grad.numpy(), {"weight": expected.gamma, "bias": expected.beta}[name], **near
            )
        for name, value in averages(oracle).items():
            np.testing.assert_allclose(getattr(layer, name).numpy(), value, **near)
            assert mask_name != "nothing" or (value == before[name]).all()
        assert layer.num_batches_tracked == counted + (mask_name != "nothing")
        assert y.stride() == leaf.stride()
        apart = shape_name == "axes apart" and "virtual_batch_size" in options  # too many groups for the kernels
        assert layer.kernel == ("composed" if apart or options_name == "composed" else "cpu")
    layer.eval()
    evaluated = layer(torch.from_numpy(x).to(dtype), mask=mask)
    np.testing.assert_allclose(evaluated.detach().numpy(), oracle.infer(x, weights), **near)


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 3}], ids=str)
def test_weights_may_be_scaled_and_booleans_are_ones(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 5, dtype=torch.float64, generator=generator)
    weights = torch.rand(7, 5, dtype=torch.float64, generator=generator) * (torch.rand(7, 5, generator=generator) < 0.7)
    kept = weights > 0
    for masks in ([weights, 0.1 * weights, 10 * weights], [kept, kept.double(), kept.int()]):
        found = []
        for mask in masks:
            layer = BatchNorm1d(3, dtype=torch.float64, **options)
            leaf = x.clone().requires_grad_()
            y = layer(leaf, mask)
            torch.autograd.backward(y.pow(3).sum())
            found.append([y.detach(), leaf.grad, *layer.buffers()])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"fused": False}], ids=str)
def test_padded_sequences_give_what_unpadded_ones_give(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([5, 2, 4])
    mask = sequence_mask(lengths, 5)
    assert mask.tolist()[1] == [True, True, False, False, False]
    padded, whole = (BatchNorm1d(3, dtype=torch.float64, **options) for _ in range(2))
    for _ in range(2):
        x = torch.randn(3, 3, 5, dtype=torch.float64).masked_fill(~mask[:, None], float("nan")).requires_grad_()
        together = torch.cat([row[:, :length] for row, length in zip(x.detach(), lengths.tolist(), strict=True)], dim=1)
        together.requires_grad_()
        y, expected = padded(x, mask), whole(together.T)
        torch.autograd.backward(y.pow(3).sum())
        torch.autograd.backward(expected.pow(3).sum())
        torch.testing.assert_close(y.transpose(1, 2)[mask], expected)
        assert x.grad is not None
        torch.testing.assert_close(x.grad.transpose(1, 2)[mask], together.grad.T)  # type: ignore[union-attr]
        assert not x.grad.transpose(1, 2)[~mask].any()
    torch.testing.assert_close(padded.state_dict(), whole.state_dict())


def test_a_sequence_mask_is_of_lengths() -> None:
    assert sequence_mask(torch.tensor([[0, 3], [1, 2]]), 3).sum(-1).tolist() == [[0, 3], [1, 2]]
    with pytest.raises(TypeError, match=r"lengths must be a tensor of ints; received.*float32"):
        sequence_mask(torch.ones(2), 3)


# --- within the machinery of PyTorch ---


def masked(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(8, 6, generator=generator) < 0.7
    return x.masked_fill(~mask[:, None], float("nan")), mask


EVERY = pytest.mark.parametrize(
    "options",
    [{}, {"renorm": True}, {"virtual_batch_size": 3}, {"skip_nonfinite": True, "renorm": True}],
    ids=["plain", "renorm", "virtual batches", "skip_nonfinite"],
)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_masked_layers_compile_as_one_graph(options: dict[str, Any], training: bool) -> None:
    layer, twin = (BatchNorm1d(3, dtype=torch.float64, **options).train(training) for _ in range(2))
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, size in enumerate((8, 7, 5)):
        results = []
        for call in (compiled, twin):
            x, mask = masked(seed)
            leaf = x[:size].clone().requires_grad_()
            y = call(leaf, mask[:size])
            torch.autograd.backward(y.pow(3).sum())
            results.append([y.detach(), leaf.grad])
        torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_a_masked_layer_is_exported_in_evaluation() -> None:
    layer = BatchNorm1d(3, dtype=torch.float64)
    x, mask = masked()
    layer(x, mask)
    layer.eval()
    program = torch.export.export(layer, (x, mask), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2)
    torch.testing.assert_close(program.module()(x[:5], mask[:5]), layer(x[:5], mask[:5]))
    with pytest.raises(NotImplementedError, match="cannot be exported or recorded"):
        torch.export.export(layer.train(), (x, mask))


@EVERY
def test_masked_second_derivatives_and_many_gradients_at_once(options: dict[str, Any]) -> None:
    fixed = {"rmin": 1.5, "rmax": 1.5, "dmax": 0.0}  # for r and d are constants to the gradient
    layer = BatchNorm1d(3, dtype=torch.float64, renorm_clipping=fixed, **options)
    x, mask = masked()
    x = x[:4, :, :3].nan_to_num().requires_grad_()
    mask = mask[:4, :3]
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask), (x,))
    many = torch.randn(3, *x.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(layer(x, mask), x, many, is_grads_batched=True)
    expected = [torch.autograd.grad(layer(x, mask), x, dy)[0] for dy in many]
    torch.testing.assert_close(found, torch.stack(expected))


def test_masks_under_autocast_checkpointing_and_functional_calls() -> None:
    torch.manual_seed(0)
    x, mask = masked()
    model = nn.ModuleList([nn.Linear(6, 6), BatchNorm1d(3, renorm=True, renorm_momentum=0.0)])
    leaf = x.float().nan_to_num()

    def run(leaf: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = model[1](model[0](leaf), mask)
        return y

    with torch.autocast("cpu", torch.bfloat16):
        assert run(leaf, mask).dtype == torch.bfloat16
    gradients = []
    for call in (run, lambda *given: checkpoint(run, *given, use_reentrant=False)):
        given = leaf.clone().requires_grad_()
        torch.autograd.backward(call(given, mask).pow(3).sum())
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)
    state = {name: value.clone() for name, value in model[1].state_dict().items()}
    torch.testing.assert_close(functional_call(model[1], state, (leaf, mask)), model[1](leaf, mask))


def test_a_graph_of_fx_takes_a_mask_and_a_script_does_not() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm1d(3, dtype=torch.float64)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.norm(x, mask=mask)
            return y

    model = Masked()
    traced = torch.fx.symbolic_trace(model)
    x, mask = masked()
    torch.testing.assert_close(traced.eval()(x, mask), model.eval()(x, mask))
    file = io.BytesIO()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(model.norm), file)


# --- uneven virtual batches ---


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("samples", "size"), [(10, 4), (7, 3), (5, 8), (9, 2), (4, 1)])
@pytest.mark.usefixtures("force_cpu")
def test_uneven_virtual_batches_are_those_of_a_loop(samples: int, size: int, fused: bool | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(samples, 3, 2, dtype=torch.float64)
    layer, plain = BatchNorm1d(3, dtype=torch.float64, virtual_batch_size=size, fused=fused), nn.BatchNorm1d(3).double()
    groups = -(-samples // size)
    y = layer(x)
    means, variances = [], []
    for group in range(groups):
        rows = slice(group, None, groups)
        torch.testing.assert_close(y[rows], plain(x[rows]))
        means.append(x[rows].mean((0, 2)) * len(x[rows]) / samples)
        variances.append(x[rows].var((0, 2)) * len(x[rows]) / samples)
    torch.testing.assert_close(layer.running_mean, 0.1 * sum(means))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * sum(variances))


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"fused": False}], ids=str)
def test_a_virtual_batch_of_one_value_is_refused(options: dict[str, Any]) -> None:
    layer = BatchNorm1d(3, virtual_batch_size=2, **options)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\[5, 3\].*virtual_batch_size=2"):
        layer(torch.randn(5, 3))
    assert layer.num_batches_tracked == 0
    layer(torch.randn(5, 3), torch.ones(5))  # under a mask single values are nothing to refuse


# --- batches that are not finite ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"fused": False}, {"renorm": True}, {"virtual_batch_size": 4}], ids=lambda value: str(value)
)
@pytest.mark.parametrize("shape", [(16, 3, 4), (16, 3, 4000)], ids=["small", "large"])
def test_features_that_are_not_finite_keep_their_averages_and_others_move(
    shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer, twin = (BatchNorm1d(3, skip_nonfinite=skip, **options) for skip in (True, False))
    x = (torch.randn(shape) + 3).to(dtype)
    layer(x)
    twin(x)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    bad = x.clone()
    bad[5, 1, 2] = float("inf")
    y = layer(bad)
    assert y[:, [0, 2]].isfinite().all()
    assert not y[:, 1].isfinite().all()
    twin(bad)
    for name in ("running_mean", "running_var", *(["renorm_mean", "renorm_stddev"] if layer.renorm else [])):
        now, spoilt = getattr(layer, name), getattr(twin, name)
        assert torch.equal(now[1], before[name][1])
        assert not spoilt[1].isfinite()
        torch.testing.assert_close(now[[0, 2]], spoilt[[0, 2]])
        assert (now[[0, 2]] != before[name][[0, 2]]).all()
    assert layer.num_batches_tracked == 2
    layer(torch.full_like(x, float("nan")))
    assert layer.num_batches_tracked == 2  # a call that moves nothing is none


def test_a_mixed_precision_loop_survives_an_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), BatchNorm1d(8, renorm=True, skip_nonfinite=True), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for step in range(40):
        x = torch.randn(32, 4)
        target = x.sum(1, keepdim=True)
        if step == 10:
            x = x * 1e38  # overflows in the first layer
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x).float() - target).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert not np.isfinite(losses[10])
    assert np.isfinite(losses[11:]).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert all(value.isfinite().all() for value in model.state_dict().values())


# --- statistics of what counts ---


def test_recalibration_counts_what_is_kept() -> None:
    layer = BatchNorm1d(3, dtype=torch.float64)
    data = [masked(seed) for seed in range(3)]
    recalibrate(layer, data, call=lambda model, batch: model(*batch))
    values = torch.cat([x.transpose(1, 2)[mask] for x, mask in data])
    torch.testing.assert_close(layer.running_mean, values.mean(0))
    torch.testing.assert_close(layer.running_var, values.var(0))
    with hold(layer):
        layer(*data[0])
    torch.testing.assert_close(layer.running_mean, values.mean(0))


# --- what is refused ---


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"renorm": True}], ids=str)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(8, 3), ValueError, r"mask must have shape \(8, 6\) or \(8, 1, 6\) for inputs of shape \(8, 3, 6\)"),
        (torch.ones(8, 3, 6), ValueError, r"mask must have shape .*; received shape \(8, 3, 6\)"),
        (torch.ones(6), ValueError, r"mask must have shape .*; received shape \(6,\)"),
        (torch.ones(1, 6), ValueError, r"mask must have shape .*; received shape \(1, 6\)"),
        (-torch.ones(8, 6), ValueError, "mask must hold finite numbers that are not negative"),
        (torch.full((8, 6), float("nan")), ValueError, "mask must hold finite numbers"),
        (torch.full((8, 6), float("inf")), ValueError, "mask must hold finite numbers"),
        (torch.ones(8, 6, requires_grad=True), ValueError, "mask must be a constant"),
        (torch.ones(8, 6, dtype=torch.complex64), TypeError, "mask must be a tensor of booleans or real numbers"),
        (torch.ones(8, 6, device="meta"), ValueError, "mask must be on the input's device, cpu"),
        ([[1.0]], TypeError, "mask must be a tensor of booleans or real numbers; received .* of type list"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_moves_nothing(
    mask: Any, error: type[Exception], message: str, options: dict[str, Any], training: bool
) -> None:
    layer = BatchNorm1d(3, **options).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error, match=message):
        layer(torch.randn(8, 3, 6), mask)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_the_function_takes_a_mask_and_skips_what_is_not_finite() -> None:
    x, mask = masked()
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    batch_norm(x, mean, variance, training=True, mask=mask, momentum=1.0)
    torch.testing.assert_close(mean, x.transpose(1, 2)[mask].mean(0))
    before = mean.clone()
    batch_norm(x, mean, variance, training=True, skip_nonfinite=True)
    assert torch.equal(mean, before)


def test_skipping_needs_a_momentum() -> None:
    with pytest.raises(ValueError, match="skip_nonfinite and momentum=None cannot be used together"):
        BatchNorm2d(3, skip_nonfinite=True, momentum=None)
    layer = BatchNorm2d(
        3, skip_nonfinite=True, renorm=True, renorm_clipping=ClippingSchedule(1, rmax_end=2, dmax_end=2)
    )
    with pytest.raises(ValueError, match="skip_nonfinite and momentum=None"):
        layer.momentum = None
