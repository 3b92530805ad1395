"""On a GPU, where options are composed: results of the CPU, in graphs and groups, and never a wait for the device."""

from __future__ import annotations

import contextlib
import copy
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from batchnorm.torch import BatchNorm, BatchNorm2d, ClippingSchedule, convert, hold, recalibrate, synchronized

from .replicas import Process, buffers
from .replicas import run as run_processes
from .test_options import FEW, MANY, ROUNDING, SHAPE, batch, make, run, same

if not torch.cuda.is_available():
    pytest.skip("there is no GPU that CUDA knows", allow_module_level=True)

RENORM: dict[str, Any] = {"renorm": True, "renorm_clipping": {"rmin": 0.8, "rmax": 1.2, "dmax": 0.3}}
UNEVEN: dict[str, Any] = {"virtual_batch_size": 4} | RENORM


def on_gpu(layer: Any, adjust: Any) -> Any:
    if adjust is not None:
        adjust.device = "cuda"
    return layer.cuda()


def on_cpu(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    assert all(one.is_cuda for one in seen.values())
    return {name: one.cpu() for name, one in seen.items()}


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Raise where the CPU would wait for the GPU."""
    try:
        with warnings.catch_warnings(action="ignore"):  # it tells that it does not see every wait
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("names", FEW)
def test_training_and_then_evaluation_are_those_of_the_cpu(names: str, dtype: torch.dtype) -> None:
    options = FEW[names]
    layer, adjust = make(options, dtype, None)
    exact, exact_adjust = make(options, torch.float64, False)
    exact.load_state_dict(layer.state_dict())
    on_gpu(layer, adjust)
    for step in range(4):
        form = options.get("layout", torch.contiguous_format)
        x, dy = (one.contiguous(memory_format=form) for one in batch(step, SHAPE, dtype, form))
        seen = on_cpu(run(layer, adjust, x.cuda(), dy.cuda()))
        same(seen, run(exact, exact_adjust, x.double(), dy.double()), ROUNDING[dtype])
        assert layer.kernel in ("composed", "torch")
    y = layer.eval()(x.cuda())
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    torch.testing.assert_close(y.cpu().double(), exact.eval()(x.double()), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # within PyTorch's compiler
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # of its own first one
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("names", ["none", "renorm clipped", "virtual batches", "axes apart", *MANY])
def test_compiled_training_is_that_of_the_cpu(names: str, mode: str | None) -> None:
    options = FEW[names]
    layer, adjust = make(options, torch.float32, None)
    exact, exact_adjust = make(options, torch.float64, False)
    exact.load_state_dict(layer.state_dict())
    on_gpu(layer, adjust)
    if adjust is not None:  # what it draws would be constants of the graph
        pair, exact_pair = adjust(SHAPE), exact_adjust(SHAPE)  # type: ignore[misc]
        layer.adjustment, exact.adjustment = (lambda _: pair), (lambda _: exact_pair)
    compiled: Any = torch.compile(layer, fullgraph=True, mode=mode)
    for step in range(4):
        x, dy = batch(step, SHAPE, torch.float32, options.get("layout", torch.contiguous_format))
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        leaves = x.cuda().requires_grad_(), x.double().requires_grad_()
        results = compiled(leaves[0]), exact(leaves[1])
        gradients = [torch.autograd.grad(y, leaf, dy.to(y)) for y, leaf in zip(results, leaves, strict=True)]
        torch.testing.assert_close(results[0].cpu().double(), results[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients[0][0].cpu().double(), gradients[1][0], rtol=1e-3, atol=1e-3)
        same(on_cpu(buffers(layer)), buffers(exact), 1e-4)


@pytest.mark.parametrize("options", [{}, RENORM, UNEVEN, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("kind", ["booleans", "weights", None])
def test_masks_and_uneven_virtual_batches_are_those_of_the_cpu(kind: str | None, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    exact = BatchNorm(3, dtype=torch.float64, **options)
    layer = copy.deepcopy(exact).cuda()
    for step in range(3):
        x, dy = torch.randn(2, 7, 3, 5, dtype=torch.float64)
        mask = None
        if kind is not None:
            mask = torch.rand(7, 1, 5) < 0.6
            x = x.where(mask, torch.nan)
            mask = mask if kind == "booleans" else mask * torch.rand(7, 1, 5, dtype=torch.float64)
        if step == 1 and "skip_nonfinite" in options:
            x[0, 1], mask = torch.inf, None
        seen = []
        for one, device in ((layer, "cuda"), (exact, "cpu")):
            leaf = x.to(device, copy=True).requires_grad_()
            y = one(leaf, None if mask is None else mask.to(device))
            seen.append({"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy.to(device))[0]} | buffers(one))
        found, expected = on_cpu(seen[0]), seen[1]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_a_mask_elsewhere_is_refused_before_anything_moves() -> None:
    layer = BatchNorm(3).cuda()
    before = buffers(layer)
    with pytest.raises(ValueError, match=r"mask .*cuda.*cpu"):
        layer(torch.randn(4, 3, 5, device="cuda"), torch.ones(4, 5, dtype=torch.bool))
    assert all(torch.equal(before[name], value) for name, value in buffers(layer).items())


def test_far_from_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8, 6, 6) + 1e4
    for options in (RENORM, UNEVEN, {"fused": False}):
        expected = BatchNorm(8, dtype=torch.float64, **options)(x.double())
        found = BatchNorm(8, **options).cuda()(x.cuda())
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": RENORM,
    "schedule": {"renorm": True, "renorm_clipping": ClippingSchedule(2, rmax_end=4, dmax_end=4)},
    "uneven virtual batches": UNEVEN,
    "skip_nonfinite": RENORM | {"skip_nonfinite": True},
    "simple average": RENORM | {"momentum": None},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_step_never_waits_for_the_device(options: dict[str, Any], masked: bool) -> None:
    layer = BatchNorm2d(8, **options).cuda()
    x = torch.randn(6, 8, 5, 5, device="cuda", requires_grad=True)
    mask = (torch.rand(6, 5, 5, device="cuda") < 0.7)[:, None] if masked else None
    for autocast in (False, True):
        layer(x, mask).sum().backward()
        torch.cuda.synchronize()
        with no_wait(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            layer(x, mask).sum().backward()
            with hold(layer):
                layer(x, mask)
            layer.eval()(x)
        layer.train()


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_recorded_step_moves_the_averages_each_time(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = BatchNorm2d(8, **options).cuda()
    other = copy.deepcopy(layer)
    batches = [torch.randn(6, 8, 5, 5, device="cuda") + step for step in range(4)]
    static = batches[0].clone()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(static)
    torch.cuda.current_stream().wait_stream(stream)
    layer.load_state_dict(other.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(static)
    layer.load_state_dict(other.state_dict())
    for x in batches:
        static.copy_(x)
        graph.replay()
        torch.testing.assert_close(y, other(x), rtol=1e-5, atol=1e-5)
        for name, value in buffers(other).items():
            torch.testing.assert_close(layer.get_buffer(name), value, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    for options in ({"fused": False}, RENORM, UNEVEN):
        exact = BatchNorm(3, dtype=torch.float64, **options)
        layer = copy.deepcopy(exact).cuda()
        x, dy, direction = torch.randn(3, 9, 3, dtype=torch.float64)
        seen = []
        for one, device in ((layer, "cuda"), (exact, "cpu")):
            leaves = [value.to(device, copy=True).requires_grad_() for value in (x, dy)]
            first = torch.autograd.grad(one(leaves[0]), leaves[0], leaves[1], create_graph=True)[0]
            seen.append(torch.autograd.grad(first, leaves, direction.to(device)))
        for found, expected in zip(*seen, strict=True):
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


def test_converted_and_recalibrated_networks_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().cuda()
    ours = convert(stock, renorm=True)
    assert all(one.is_cuda for one in (*ours.parameters(), *ours.buffers()))
    other = copy.deepcopy(ours).cpu()
    batches = [torch.randn(size, 3, 8, 8, dtype=torch.float64) for size in (4, 2, 3)]
    recalibrate(ours, [x.cuda() for x in batches])
    recalibrate(other, batches)
    same(on_cpu(buffers(ours)), buffers(other), 1e-9)


# ---- Process groups: of NCCL, which takes one process for each GPU, and of gloo, which takes two.


def grouped(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    return {"y": y.detach(), "dx": leaf.grad} | buffers(layer)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["eager", "compiled", "DDP", "FSDP2"])
def test_a_group_of_one_process_is_local(how: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would not be asked, as there is nothing to be merged."""
    if how == "compiled" and not synchronized.COMPILES:
        pytest.skip("refused by this version of PyTorch")
    monkeypatch.setattr(
        synchronized, "replicas", lambda x, wanted, group: synchronized.Replicas(group) if wanted else None
    )
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for options in ({}, RENORM, {"dtype": torch.float64}):
            torch.manual_seed(0)
            local = BatchNorm2d(4, **options).cuda()
            layer = BatchNorm2d(4, synchronized=True, **options).cuda()
            layer.load_state_dict(local.state_dict())
            wrapped: Any = layer
            if how == "compiled":
                wrapped = torch.compile(layer, fullgraph=True)
            elif how == "DDP":
                wrapped = nn.parallel.DistributedDataParallel(layer, device_ids=[0])
            elif how == "FSDP2":
                wrapped = fully_shard(layer, mesh=init_device_mesh("cuda", (1,)))
            for _ in range(2):
                x, dy = torch.randn(2, 6, 4, 5, 5, device="cuda", dtype=options.get("dtype"))
                expected = grouped(local, x, dy)
                leaf = x.clone().requires_grad_()
                y = wrapped(leaf)
                y.backward(dy)
                found = {"y": y.detach(), "dx": leaf.grad} | buffers(layer)
                for name, value in expected.items():
                    torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)
    finally:
        distributed.destroy_process_group()


def parts(process: Process) -> None:
    for options in ({}, RENORM):
        torch.manual_seed(0)
        whole = BatchNorm(4, dtype=torch.float64, **options)
        part = BatchNorm(4, synchronized=True, **options).cuda()
        for sizes in ((3, 5), (0, 4), (1, 1)):
            x, dy = torch.randn(2, sum(sizes), 4, 3, dtype=torch.float64)
            expected = grouped(whole, x, dy)
            found = grouped(part, process.part(x, sizes).float().cuda(), process.part(dy, sizes).float().cuda())
            for name, value in expected.items():
                value = process.part(value, sizes) if name in ("y", "dx") else value
                process.near(f"{sizes}: {name}", found[name].cpu(), value, 2e-5)


def test_parts_of_a_batch_train_as_the_whole(tmp_path: pathlib.Path) -> None:
    run_processes(2, tmp_path, {"parts": parts}, 120)
