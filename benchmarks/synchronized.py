"""``python -m benchmarks.synchronized``: what synchronized statistics cost, over gloo on this machine.

Each process has one thread and its own batches. A step is forward and backward of every normalization of a ResNet-18,
one after the other. Contenders take turns, all processes the same one at a time, and the slowest process counts.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor, distributed, multiprocessing, nn
from torch.autograd import Function

from batchnorm.torch import BatchNorm2d

from .terminal import terminal

LAYERS = [(64, 112), *[(64, 56)] * 4, *[(128, 28)] * 5, *[(256, 14)] * 5, *[(512, 7)] * 5]
"""Channels and side of the normalizations of a ResNet-18."""
FEATURES = (64, 512, 2048)


class _Sum(Function):
    """Sum over processes, as is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient)  # type: ignore[no-untyped-call]


class ThreeSums(nn.Module):
    """The layer as one writes it down: sums of values, of their squares and of their number, one after the other."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the values of all processes."""
        count: Tensor = _Sum.apply(torch.tensor(float(x.numel() // x.shape[1])))  # type: ignore[no-untyped-call]
        mean: Tensor = _Sum.apply(x.sum((0, 2, 3))) / count  # type: ignore[no-untyped-call]
        squares: Tensor = _Sum.apply((x * x).sum((0, 2, 3)))  # type: ignore[no-untyped-call]
        variance = squares / count - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)  # type: ignore[operator]
            self.running_var.lerp_(variance * count / (count - 1), 0.1)  # type: ignore[operator]
        scale = self.weight * torch.rsqrt(variance + 1e-5)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class Step:
    """Forward and backward of every layer, with a collective after each pass of a layer, or without."""

    def __init__(self, make: Callable[[int], nn.Module], data: list[Tensor], collectives: bool = False) -> None:
        self.layers = [make(x.shape[1]) for x in data]
        self.data, self.collectives = data, collectives

    def __call__(self) -> None:
        """Do one."""
        for layer, x in zip(self.layers, self.data, strict=True):
            y = layer(x)
            if self.collectives:
                collective(x)
            y.backward(x.detach())
            if self.collectives:
                collective(x)
            x.grad = None


def collective(x: Tensor) -> None:
    """A collective as large as those of an input."""
    distributed.all_reduce(torch.zeros(2 + 2 * x.shape[1], dtype=torch.float64))


def collectives(data: list[Tensor]) -> None:
    """The collectives of a step by themselves, in the order in which they come."""
    for x in data:
        for _ in ("forward", "backward"):
            collective(x)


def times(contenders: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, of the slowest process each time."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    order, begin = np.random.default_rng(0), time.perf_counter()
    goes_on = torch.ones(())
    while goes_on:
        for turn in order.permutation(len(contenders)):
            name = list(contenders)[turn]
            distributed.barrier()
            start = time.perf_counter()
            contenders[name]()
            slowest = torch.tensor(time.perf_counter() - start)
            distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
            taken[name].append(float(slowest))
        goes_on.fill_(time.perf_counter() - begin < seconds or len(taken[name]) < 5)
        distributed.broadcast(goes_on, 0)
    return {name: 1e3 * statistics.median(own[1:]) for name, own in taken.items()}


def measure(rank: int, processes: int, batch: int, seconds: float, directory: str) -> None:
    """Measure in one of the processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=processes)
    torch.manual_seed(rank)
    data = [torch.randn(batch, features, side, side).requires_grad_() for features, side in LAYERS]
    steps = times(
        {
            "ours, synchronized": Step(lambda features: BatchNorm2d(features, synchronized=True), data),
            "three plain all-reduces": Step(ThreeSums, data),
            "ours, local": Step(BatchNorm2d, data),
            "ours, local, and a collective after each pass": Step(BatchNorm2d, data, collectives=True),
            "the collectives alone": lambda: collectives(data),
        },
        seconds,
    )
    sums = {features: torch.zeros(2 + 2 * features, dtype=torch.float64) for features in FEATURES}

    def twenty(sum: Tensor) -> Callable[[], None]:
        def call() -> None:
            for _ in range(20):
                distributed.all_reduce(sum)

        return call

    latencies = times({str(features): twenty(sum) for features, sum in sums.items()}, seconds / 10)
    if rank == 0:
        torch.save((steps, latencies), f"{directory}/found.pt")
    distributed.destroy_process_group()


def main() -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synchronized", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="samples in each process")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            measure, (options.processes, options.batch, options.seconds, directory), nprocs=options.processes
        )
        steps, latencies = torch.load(pathlib.Path(directory) / "found.pt")
    console = terminal()
    ours = steps["ours, synchronized"]
    steps["the sum of local and collectives alone"] = steps["ours, local"] + steps["the collectives alone"]
    table = Table(box=box.SIMPLE)
    for head in ("normalizations of a ResNet-18, forward and backward", "ms", "÷ ours, synchronized"):
        table.add_column(head, justify="left" if "ResNet" in head else "right")
    for name, milliseconds in steps.items():
        table.add_row(name, f"{milliseconds:.1f}", f"{milliseconds / ours:.2f}")
    console.print(table)
    table = Table("features", "bytes", "µs for a collective", box=box.SIMPLE)
    for features, milliseconds in latencies.items():
        table.add_row(features, f"{16 * int(features) + 16:,}", f"{1e3 * milliseconds / 20:.0f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
