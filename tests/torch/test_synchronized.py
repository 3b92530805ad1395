"""Synchronized statistics: several processes, each with a part of a batch, against one with the whole batch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pathlib
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, ClippingSchedule, batch_norm, freeze, hold, recalibrate, synchronized

from .replicas import Process, buffers, run

FEATURES = 4
SPLITS = [(5, 0, 7), (4, 4, 4), (3, 6, 1), (0, 4, 4), (1, 1, 0), (2, 1, 9)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer by its options, and what it is given."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    axis: Any = 1
    shape: tuple[int, ...] = (FEATURES, 5)
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype | None = None
    mean: float = 0.0
    mask: str | None = None
    adjustment: str | None = None
    hold: bool = False
    kernel: str = "cpu"
    tolerance: float = 1e-5
    channels_last: bool = False

    def layer(self, **more: Any) -> Any:
        rank = len(self.shape) + 1
        axes = sorted(axis % rank for axis in (self.axis if isinstance(self.axis, tuple) else (self.axis,)))
        sizes = tuple(self.shape[axis - 1] for axis in axes)
        layer = BatchNorm(sizes if len(sizes) > 1 else sizes[0], self.axis, **(self.options | more))
        torch.manual_seed(1)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        return layer


RENORM: dict[str, Any] = {
    "renorm": True,
    "renorm_clipping": {"rmin": 0.7, "rmax": 1.5, "dmax": 0.4},
    "renorm_momentum": 0.2,
}
CASES = {
    "plain": Case(),
    "plain, composed": Case({"fused": False}, kernel="composed"),
    "float64": Case(dtype=torch.float64, tolerance=1e-10),
    "float64, composed": Case({"fused": False}, dtype=torch.float64, tolerance=1e-10, kernel="composed"),
    "far from zero": Case(mean=1e4),
    "far from zero, composed": Case({"fused": False}, mean=1e4, kernel="composed"),
    "renorm far from zero": Case(RENORM, mean=1e4, tolerance=2e-5),
    "channels last": Case(shape=(FEATURES, 5, 3), channels_last=True),
    "features last": Case(axis=-1, shape=(5, FEATURES)),
    "matrix": Case(shape=(FEATURES,)),
    "renorm": Case(RENORM),
    "renorm, composed": Case(RENORM | {"fused": False}, kernel="composed"),
    "schedule": Case({"renorm": True, "renorm_clipping": ClippingSchedule(1, rmax_end=4, dmax_end=4)}),
    "adjustment by feature": Case(adjustment="by feature"),
    "adjustment by value": Case(adjustment="by value", kernel="composed"),
    "renorm and adjustment": Case(RENORM, adjustment="by feature"),
    "two axes side by side": Case(axis=(1, 2), shape=(2, 3, 5)),
    "two axes apart": Case(axis=(1, 3), shape=(2, 5, 3)),
    "three axes apart": Case(axis=(1, 3, 5), shape=(2, 3, 3, 2, 2), kernel="composed"),
    "two axes apart, renorm, mask": Case(RENORM, axis=(1, 3), shape=(2, 5, 3), mask="booleans"),
    "mask": Case(mask="booleans"),
    "mask, composed": Case({"fused": False}, mask="booleans", kernel="composed"),
    "weights": Case(mask="weights"),
    "weights far from zero": Case(mask="weights", mean=1e4),
    "weights of features last": Case(mask="weights", axis=-1, shape=(5, FEATURES)),
    "weights, renorm, adjustment": Case(RENORM, mask="weights", adjustment="by feature"),
    "mask on one of them": Case(mask="one"),
    "cumulative": Case({"momentum": None}),
    "cumulative renorm": Case(RENORM | {"momentum": None}),
    "non-finite batches": Case({"skip_nonfinite": True}, mean=float("nan")),
    "non-finite batches, composed": Case(
        {"skip_nonfinite": True, "fused": False}, mean=float("nan"), kernel="composed"
    ),
    "not affine": Case({"affine": False}),
    "no bias": Case({"bias": False}),
    "untracked": Case({"track_running_stats": False}),
    "held": Case(RENORM, hold=True),
    "bfloat16 beside float32": Case(dtype=torch.bfloat16, parameters=torch.float32, tolerance=2e-2),
    "float16 beside float32": Case(dtype=torch.float16, parameters=torch.float32, tolerance=3e-3),
    "all of bfloat16": Case(dtype=torch.bfloat16, tolerance=4e-2),
}


def train(process: Process, case: Case) -> None:
    """Train over several batches, however they are divided, and compare everything after each."""
    parameters = case.parameters or case.dtype
    y: Any
    found, expected = case.layer(synchronized=True).to(parameters), case.layer(fused=False).double()
    with torch.no_grad():  # what a short type has made of them
        for to, of in zip(expected.parameters(), found.parameters(), strict=True):
            to.copy_(of)
    for step, sizes in enumerate(SPLITS):
        torch.manual_seed(step)
        shape = (sum(sizes), *case.shape)
        x, dy = torch.randn(shape), torch.randn(shape)
        x[: sizes[0]] += 0.5
        if case.mean == case.mean:
            x += case.mean
        elif step % 2 and len(x):
            x[-1, 1] = torch.inf
        x, dy = x.to(case.dtype), dy.to(case.dtype)
        mask = masked(case, shape, sizes)
        adjusted = adjustment(case, shape)
        results: list[list[Any]] = []
        sliced: Any
        for layer, sliced in ((expected, Tensor.clone), (found, functools.partial(process.part, sizes=sizes))):
            dtype = torch.float64 if layer is expected else x.dtype
            given = sliced(x).to(dtype)
            if case.channels_last and given.numel():
                given = given.contiguous(memory_format=torch.channels_last)
            given.requires_grad_()
            if case.adjustment is not None:
                parts = [value.clone() if value.shape[0] == 1 else sliced(value) for value in adjusted]
                leaves = [part.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for part in parts]
                layer.adjustment = lambda shape, leaves=leaves: leaves
            else:
                leaves = []
            some = None if mask is None else sliced(mask)
            if layer is found and case.mask == "one" and process.rank:
                some = None
            layer.zero_grad()
            y = call(process, case, layer, given, some, 1 if layer is found else 0)
            with process.collectives(f"backward of {'whole' if layer is expected else 'part'}", int(layer is found)):
                y.backward(sliced(dy).to(dtype))
            results.append([y, given.grad, [leaf.grad for leaf in leaves]])
            if layer is found:
                process.same("kernel", layer.kernel, case.kernel)
                process.same("type", (y.dtype, given.grad.dtype), (case.dtype, case.dtype))
        (y, dx, dadjusted), (own_y, own_dx, own_dadjusted) = results
        where, tolerance = f"step {step}, {sizes}", case.tolerance
        process.near(f"{where}: y", own_y, process.part(y, sizes), tolerance)
        process.near(f"{where}: dx", own_dx, process.part(dx, sizes), 4 * tolerance)
        for to, of in zip(own_dadjusted, dadjusted, strict=True):
            whole = process.summed(to) if of.shape[0] == 1 else to
            process.near(
                f"{where}: adjustment", whole, of if of.shape[0] == 1 else process.part(of, sizes), 4 * tolerance
            )
        for name, parameter in found.named_parameters():
            whole = process.summed(parameter.grad)
            process.near(f"{where}: {name}", whole, expected.get_parameter(name).grad, 20 * tolerance)
        for name, buffer in found.named_buffers():
            process.near(f"{where}: {name}", buffer, expected.get_buffer(name), tolerance)


def call(process: Process, case: Case, layer: Any, x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    with process.collectives("forward", count):
        if not case.hold:
            y: Tensor = layer(x, mask)
            return y
        before = buffers(layer)
        with hold(layer):
            y = layer(x, mask)
        process.same("held", {name: torch.equal(before[name], value) for name, value in buffers(layer).items()},
                     dict.fromkeys(before, True))  # fmt: skip
        return y


def masked(case: Case, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor | None:
    if case.mask is None:
        return None
    axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
    axes = tuple(axis % len(shape) for axis in axes)
    positions = [1 if axis in axes else size for axis, size in enumerate(shape)]
    if case.mask == "weights":
        return torch.randint(0, 3, positions) * 0.37
    mask = torch.rand(positions) < 0.6
    if case.mask == "one":  # only the first process has a mask
        mask[sizes[0] :] = True
    return mask


def adjustment(case: Case, shape: tuple[int, ...]) -> list[Tensor]:
    if case.adjustment is None:
        return []
    sizes = shape if case.adjustment == "by value" else (1, shape[1], *(1 for _ in shape[2:]))
    return [torch.rand(sizes) + 0.5, torch.randn(sizes)]


def single_value(process: Process) -> None:
    """One value in all is an error everywhere, and two of different processes are none."""
    layer = BatchNorm(FEATURES, synchronized=True)
    before = buffers(layer)
    own = torch.ones(1 if process.rank == 1 else 0, FEATURES)
    try:
        layer(own)
    except ValueError as error:
        process.same("message", "Expected more than 1 value per channel" in str(error), True)
    else:
        process.wrong.append("no error for a single value")
    process.same("buffers", all(torch.equal(before[name], value) for name, value in buffers(layer).items()), True)
    kept = torch.ones(len(own), dtype=torch.bool)
    process.near("masked", layer(own, kept), torch.zeros(len(own), FEATURES), 1e-6)
    layer.fused = False
    process.near("masked, composed", layer(own, kept), torch.zeros(len(own), FEATURES), 1e-6)


def nothing_at_all(process: Process) -> None:
    """Of no value in any process nothing moves, and nothing is counted."""
    for fused in (None, False):
        layer = BatchNorm(FEATURES, synchronized=True, fused=fused, **RENORM)
        before = buffers(layer)
        for mask in (None, torch.zeros(0, 5, dtype=torch.bool)):
            x = torch.ones(0, FEATURES, 5, requires_grad=True)
            layer(x, mask).sum().backward()
        some = torch.full((2, FEATURES, 5), torch.nan, requires_grad=True)
        y = layer(some, torch.zeros(2, 5, dtype=torch.bool))
        y.sum().backward()
        process.near("y", y, torch.zeros(2, FEATURES, 5), 0)
        process.near("dx", some.grad, torch.zeros(2, FEATURES, 5), 0)
        process.same(
            "buffers", [name for name, value in buffers(layer).items() if not torch.equal(before[name], value)], []
        )


class Training:
    """A case as a suite wants it."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, process: Process) -> None:
        train(process, self.case)


@pytest.mark.slow(seconds=30)
def test_parts_of_a_batch_train_as_the_whole_in_one_process(tmp_path: pathlib.Path) -> None:
    suite = {name: Training(case) for name, case in CASES.items()}
    run(3, tmp_path, suite | {"single value": single_value, "nothing at all": nothing_at_all}, 200)


# ---- Within PyTorch's machinery, in three processes.


SIZES = (5, 0, 4)


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, FEATURES, 3), BatchNorm(FEATURES, **options), nn.ReLU(), nn.Conv1d(FEATURES, 2, 3),
        BatchNorm(2, **options),
    )  # fmt: skip


def batches(count: int, length: int = 8) -> list[Any]:
    torch.manual_seed(3)
    return [torch.randn(sum(SIZES), 3, length) + 1 for _ in range(count)]


def wide(y: Tensor) -> Any:
    """A loss that is a sum over samples, of which some processes have none."""
    weights = torch.arange(1, y.shape[1] + 1, dtype=y.dtype)[:, None]
    return (y * weights).pow(3).sum()


def compare(
    process: Process, where: str, model: nn.Module, whole: nn.Module, scale: float, tolerance: float = 2e-5
) -> None:
    """Compare what a step has left with that of the whole batch; gradients are `scale` times as large there."""
    expected = [parameter.grad for parameter in whole.parameters() if parameter.grad is not None]
    largest = max(gradient.abs().max() for gradient in expected)  # beside which some are rounding
    for (name, parameter), other in zip(model.named_parameters(), expected, strict=True):
        gradient: Any = parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        process.near(f"{where}: {name}", full * scale / largest, other / largest, tolerance)
    for (name, buffer), other in zip(model.named_buffers(), whole.buffers(), strict=True):
        process.near(f"{where}: {name}", buffer, other, tolerance)


def in_ddp(process: Process) -> None:
    """Two forward passes before a backward, with buffers sent or not; gradients gathered over several steps."""
    for options in ({}, RENORM, {"fused": False}, {"momentum": None}):
        for broadcast in (True, False):
            model = network(synchronized=True, **options)
            whole = network(**(options | {"fused": False})).double()
            call = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
            for step, (first, second) in enumerate(zip(batches(4)[::2], batches(4)[1::2], strict=True)):
                model.zero_grad()
                whole.zero_grad()
                if step == 0:
                    (wide(call(process.part(first, SIZES))) + wide(call(process.part(second, SIZES)))).backward()
                else:
                    with call.no_sync():
                        wide(call(process.part(first, SIZES))).backward()
                    wide(call(process.part(second, SIZES))).backward()
                (wide(whole(first.double())) + wide(whole(second.double()))).backward()
                compare(process, f"{options} {broadcast} {step}", model, whole, process.size)


def masked_in_ddp(process: Process) -> None:
    """Replicas that are not synchronized, each with a mask of its own: gradients are the mean of theirs."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Conv1d(3, FEATURES, 1), BatchNorm(FEATURES, renorm=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.norm(self.first(x), mask)
            return y

    model, others = Masked(), [Masked() for _ in range(process.size)]
    call = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    for x in batches(2):
        mask = torch.rand(len(x), x.shape[2]) < 0.6
        sizes = (3, 2, 4)
        model.zero_grad()
        wide(call(process.part(x, sizes), process.part(mask, sizes))).backward()
        for other, part, some in zip(others, x.split(sizes), torch.split(mask, list(sizes)), strict=True):
            other.zero_grad()
            wide(other(part, some)).backward()
        for name, parameter in model.named_parameters():
            mean: Any = sum(other.get_parameter(name).grad for other in others) / process.size  # type: ignore[misc]
            own: Any = parameter.grad
            process.near(name, own / (1 + mean.abs().max()), mean / (1 + mean.abs().max()), 1e-5)
        for name, buffer in model.named_buffers():
            process.near(name, buffer, others[process.rank].get_buffer(name), 1e-6)


def checkpointed(process: Process) -> None:
    """A forward pass that is done again has its collective again; gradients are right, and averages move twice."""
    for fused in (None, False):
        for reentrant in (True, False):
            # Recomputation stops where nothing more is saved; what moves after that in a last layer would not move.
            model = nn.Sequential(network(synchronized=True, fused=fused), nn.Tanh())
            whole = nn.Sequential(network(fused=False), nn.Tanh()).double()
            (x,) = batches(1)
            own = process.part(x, SIZES).requires_grad_()
            with process.collectives("forward", 2):
                y = checkpoint(model, own, use_reentrant=reentrant)
            with process.collectives("backward", 4):
                wide(y).backward()
            wide(whole(x.double())).backward()
            whole(x.double())
            for parameter in model.parameters():
                parameter.grad = process.summed(parameter.grad).float()
            compare(process, f"fused={fused}, reentrant={reentrant}", model, whole, 1)


def sharded(process: Process) -> None:
    """FSDP2, whose parameters lie in parts."""
    mesh = init_device_mesh("cpu", (process.size,))
    for options in ({}, RENORM):
        model, whole = network(synchronized=True, **options), network(**options, fused=False).double()
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for step, x in enumerate(batches(2)):
            model.zero_grad()
            whole.zero_grad()
            wide(model(process.part(x, SIZES))).backward()
            wide(whole(x.double())).backward()
            compare(process, f"{options} {step}", model, whole, process.size)


def grouped(process: Process) -> None:
    """Groups of processes; a copy has the group, a pickle has not."""
    groups = [distributed.new_group([0, 2]), distributed.new_group([1])]
    group = groups[process.rank % 2]
    layer = BatchNorm(FEATURES, synchronized=True, process_group=group)
    (x,) = batches(1)
    x = x.repeat(1, 2, 1)[:, :FEATURES]
    sizes = (2, 4, 3)
    ours = torch.cat([x.split(sizes)[0], x.split(sizes)[2]]) if process.rank != 1 else x.split(sizes)[1]
    whole = BatchNorm(FEATURES)
    expected = whole(ours)
    expected = expected.split((2, 3))[process.rank // 2] if process.rank != 1 else expected
    copied: list[Any] = [layer, copy.deepcopy(layer), copy.copy(layer), copy.deepcopy(nn.Sequential(layer))[0]]
    for each in copied:
        process.same("group", each.process_group is group, True)
        each.reset_running_stats()
        process.near("y", each(process.part(x, sizes)), expected, 1e-5)
        process.near("running_mean", each.running_mean, whole.running_mean, 1e-5)
    function = batch_norm(process.part(x, sizes), None, None, training=True, synchronized=True, process_group=group)
    process.near("function", function, expected, 1e-5)
    with warnings.catch_warnings(record=True, action="always") as caught:
        pickled = pickle.loads(pickle.dumps(layer))
    process.same("warnings", ["process_group is not pickled" in str(each.message) for each in caught], [True])
    process.same("pickled", (pickled.process_group, pickled.synchronized, pickled.options), (None, True, layer.options))
    process.same("as it was", layer.process_group is group, True)
    process.same("without a group", pickle.loads(pickle.dumps(pickled)).synchronized, True)
    if process.rank == 0:
        with pytest.raises(TypeError, match="process_group must be None or a torch"):
            BatchNorm(FEATURES, synchronized=True, process_group=groups[1])
    with pytest.raises(ValueError, match="process_group must be None without synchronized=True"):
        BatchNorm(FEATURES, process_group=group)
    with pytest.raises(ValueError, match="process_group must be None without synchronized=True"):
        layer.synchronized = False


def differentiated_twice(process: Process) -> None:
    """The gradient of a penalty on gradients, on the kernels and composed; and of transformations."""
    scale = torch.full((3, 1), 1.5, requires_grad=True)
    for options in (
        {},
        RENORM,
        {"fused": False},
        {"adjustment": lambda shape: (scale, torch.ones(3, 1)), "affine": False},
    ):
        layer, whole = BatchNorm(3, synchronized=True, **options), BatchNorm(3, **(options | {"fused": False})).double()
        (x,) = batches(1)
        results: list[Any] = []
        for each, given in ((layer, process.part(x, SIZES)), (whole, x.double())):
            given.requires_grad_()
            y = each(given)
            (first,) = torch.autograd.grad(wide(y), given, create_graph=True)
            penalty = (first.square() * torch.linspace(0.5, 1, first.shape[2], dtype=first.dtype)).sum()
            (penalty + wide(y)).backward()
            results.append(given.grad)
        largest = results[1].abs().max()
        process.near(f"{options}: dx", results[0] / largest, process.part(results[1] / largest, SIZES), 1e-5)
        for name, parameter in layer.named_parameters():
            gradient: Any = whole.get_parameter(name).grad
            largest = 1 + gradient.abs().max()
            process.near(f"{options}: {name}", process.summed(parameter.grad) / largest, gradient / largest, 1e-5)


def transformed(process: Process) -> None:
    """`torch.func` and forward-mode derivatives."""
    warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # which PyTorch itself uses
    (x,) = batches(1)
    tangent = torch.cos(x)

    def norm(x: Tensor, synchronized: bool) -> Tensor:
        return batch_norm(x, None, None, training=True, synchronized=synchronized)

    gradient = torch.func.grad(lambda x: wide(norm(x, False)))(x.double())
    own = torch.func.grad(lambda x: wide(norm(x, True)))(process.part(x, SIZES))
    scale = gradient.abs().max()
    process.near("grad", own / scale, process.part(gradient, SIZES) / scale, 1e-5)
    moved = torch.func.jvp(lambda x: norm(x, False), (x.double(),), (tangent.double(),))[1]
    given = process.part(x, SIZES), process.part(tangent, SIZES)
    own_moved = torch.func.jvp(lambda x: norm(x, True), given[:1], given[1:])[1]
    process.near("jvp", own_moved, process.part(moved, SIZES), 1e-5)
    several = torch.stack([x, x.flip(0), tangent])
    mapped = torch.func.vmap(lambda x: norm(x, True))(torch.stack([process.part(each, SIZES) for each in several]))
    process.near("vmap", mapped, torch.stack([process.part(norm(each, False), SIZES) for each in several]), 1e-5)


def recalibrated(process: Process) -> None:
    """One pass over data that are spread over processes."""
    for options in ({}, RENORM):
        model, whole = network(synchronized=True, **options), network(**options)
        given = batches(2)
        recalibrate(model, [process.part(x, SIZES) for x in given], progress=False)
        recalibrate(whole, given, progress=False)
        for name, buffer in model.named_buffers():
            process.near(f"{options}: {name}", buffer, whole.get_buffer(name), 1e-5)
    for one in (freeze(network(synchronized=True)), network(synchronized=True).eval()):
        with process.collectives("in evaluation", 0):
            one(process.part(given[0], SIZES))


def without_gradients(process: Process) -> None:
    """Where no input wants a gradient there is nothing to send back."""
    layer = BatchNorm(3, synchronized=True)
    (x,) = batches(1)
    y = layer(process.part(x, SIZES))
    with process.collectives("backward", 0):
        wide(y).backward()
    with torch.no_grad(), process.collectives("forward", 1):
        layer(process.part(x, SIZES))
    whole = BatchNorm(3)
    wide(whole(x)).backward()
    whole(x)
    for name, parameter in layer.named_parameters():
        process.near(name, process.summed(parameter.grad), whole.get_parameter(name).grad, 2e-4)
    process.near("running_var", layer.running_var, whole.running_var, 1e-5)


def refused(process: Process) -> None:
    """A device that the group cannot send from is named, on all processes, before anything moves."""
    layer = BatchNorm(3, synchronized=True, device="meta")
    with process.collectives("on a device without one", 0), pytest.raises(ValueError, match="device, meta; received"):
        layer(torch.empty(2, 3, device="meta"))


MACHINERY = {
    case.__name__: case
    for case in (
        in_ddp, masked_in_ddp, checkpointed, sharded, grouped, differentiated_twice, transformed, recalibrated,
        without_gradients, refused,
    )
}  # fmt: skip


@pytest.mark.slow(seconds=30)
def test_parts_of_a_batch_train_as_the_whole_within_pytorch_s_machinery(tmp_path: pathlib.Path) -> None:
    run(3, tmp_path, MACHINERY, 200)


# ---- Compiled.


class Compiled:
    """A network in one graph, of batches that are empty, of one sample, and of several."""

    def __init__(self, backend: str, splits: list[tuple[int, int]], **options: Any) -> None:
        self.backend, self.splits, self.options = backend, splits, options

    def __call__(self, process: Process) -> None:
        warnings.simplefilter("ignore")  # of the compiler, about itself
        torch.compiler.reset()
        masked = self.options.pop("masked", False)
        layer = BatchNorm(FEATURES, synchronized=True, **self.options)
        whole = BatchNorm(FEATURES, **self.options, fused=False).double()
        call: Any = torch.compile(layer, fullgraph=True, backend=self.backend)
        for step, sizes in enumerate(self.splits):
            torch.manual_seed(step)
            x, dy = torch.randn(2, sum(sizes), FEATURES, 3)
            x += 1e3
            mask = torch.rand(len(x), 3) < 0.7 if masked else None
            own = process.part(x, sizes).requires_grad_()
            with process.collectives("forward", 1):
                y = call(own, None if mask is None else process.part(mask, sizes))
            layer.zero_grad()
            with process.collectives("backward", 1):
                y.backward(process.part(dy, sizes))
            whole.zero_grad()
            given = x.double().requires_grad_()
            expected = whole(given, mask)
            expected.backward(dy.double())
            where = f"{self.backend}, step {step}, {sizes}"
            process.near(f"{where}: y", y, process.part(expected, sizes), 1e-4)
            process.near(f"{where}: dx", own.grad, process.part(given.grad, sizes), 4e-4)
            for name, parameter in layer.named_parameters():
                gradient = process.summed(parameter.grad)
                process.near(f"{where}: {name}", gradient, whole.get_parameter(name).grad, 2e-3)
            for name, buffer in layer.named_buffers():
                process.near(f"{where}: {name}", buffer, whole.get_buffer(name), 1e-5)


COMPILED = {
    "inductor": Compiled("inductor", [(5, 7), (0, 4)], **RENORM),
    "traced": Compiled("aot_eager", [(5, 7), (0, 4), (3, 1), (6, 2)]),
    "traced with options": Compiled("aot_eager", [(5, 7), (0, 4)], masked=True, momentum=None, **RENORM),
}


@pytest.mark.slow(seconds=30)
def test_parts_of_a_batch_train_as_the_whole_in_compiled_graphs(tmp_path: pathlib.Path) -> None:
    run(2, tmp_path, COMPILED, 230)


# ---- Failing.


def dies(process: Process) -> None:
    """Of two processes one ends; the other one is told at its next call, and nothing of it has moved."""
    for fused in (None, False):
        layer = BatchNorm(FEATURES, synchronized=True, fused=fused, **RENORM)
        layer(torch.randn(4, FEATURES))
    if process.rank:
        os._exit(1)
    before = buffers(layer)
    for layer.fused in (None, False):
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, FEATURES))
        changed = [name for name, value in buffers(layer).items() if not torch.equal(before[name], value)]
        process.same("changed", changed, [])


@pytest.mark.slow
def test_a_process_that_dies_raises_in_the_others_and_nothing_has_moved(tmp_path: pathlib.Path) -> None:
    run(2, tmp_path, {"dies": dies}, 100, survivors=1)


# ---- In one process.


@pytest.mark.parametrize("options", [{}, RENORM], ids=["plain", "renorm"])
def test_without_a_process_group_a_layer_is_local(options: dict[str, Any]) -> None:
    layer, other = BatchNorm(FEATURES, synchronized=True, **options), BatchNorm(FEATURES, **options)
    x = torch.randn(6, FEATURES)
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert layer.kernel == other.kernel
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x[:1])


def test_a_compiler_that_differentiates_no_collective_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_backend_config": "cpu:gloo"}.items():
        monkeypatch.setattr(distributed, name, lambda group=None, value=value: value)
    x = torch.ones(3, FEATURES)
    assert synchronized.replicas(x, True, None) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert synchronized.replicas(x, True, None) is not None
    monkeypatch.setattr(synchronized, "COMPILES", False)
    with pytest.raises(NotImplementedError, match=r"2\.13 or later within torch\.compile; received 2\.\d+"):
        synchronized.replicas(x, True, None)
