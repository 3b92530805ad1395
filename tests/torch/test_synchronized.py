"""Synchronized statistics: several processes, each with a part of a batch, against one with the whole batch."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from batchnorm.torch import BatchNorm, ClippingSchedule, batch_norm, freeze, hold

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


RENORM = {"renorm": True, "renorm_clipping": {"rmin": 0.7, "rmax": 1.5, "dmax": 0.4}, "renorm_momentum": 0.2}
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
    "non-finite batches, composed": Case({"skip_nonfinite": True, "fused": False}, mean=float("nan"), kernel="composed"),
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
        results = []
        for layer, sliced in ((expected, Tensor.clone), (found, lambda whole: process.part(whole, sizes))):
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
                process.same("kernel", layer.kernel, case.kernel if len(given) else "composed")
                process.same("type", (y.dtype, given.grad.dtype), (case.dtype, case.dtype))  # type: ignore[union-attr]
        (y, dx, dadjusted), (own_y, own_dx, own_dadjusted) = results
        where, tolerance = f"step {step}, {sizes}", case.tolerance
        process.near(f"{where}: y", own_y, process.part(y, sizes), tolerance)
        process.near(f"{where}: dx", own_dx, process.part(dx, sizes), 4 * tolerance)
        for to, of in zip(own_dadjusted, dadjusted, strict=True):
            whole = process.summed(to) if of.shape[0] == 1 else to
            process.near(f"{where}: adjustment", whole, of if of.shape[0] == 1 else process.part(of, sizes), 4 * tolerance)
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
        process.same("buffers", [name for name, value in buffers(layer).items() if not torch.equal(before[name], value)], [])


def report(wrong: dict[str, list[str]]) -> str:
    return "\n".join(f"{name}: {problem}" for name, problems in wrong.items() for problem in problems[:6])


class Training:
    """A case as a suite wants it."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, process: Process) -> None:
        train(process, self.case)


@pytest.mark.slow
def test_parts_of_a_batch_train_as_the_whole_in_one_process(tmp_path: pathlib.Path) -> None:
    suite = {name: Training(case) for name, case in CASES.items()} | {
        "single value": single_value,
        "nothing at all": nothing_at_all,
    }
    wrong = run(3, tmp_path, suite, 200)
    assert not wrong, report(wrong)
