"""Processes of one process group, which compare what each computes with one process that has the whole batch."""

from __future__ import annotations

import contextlib
import datetime
import pathlib
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn

Suite = Mapping[str, Callable[["Process"], None]]


class Process:
    """One of several processes: its rank, its part of whole batches, and what it found wrong."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.wrong = rank, size, list[str]()

    def part(self, whole: Any, sizes: tuple[int, ...]) -> Any:
        """The samples that are this process's."""
        return whole.split(sizes)[self.rank].clone()

    def near(self, what: str, found: Any, expected: Any, tolerance: float) -> None:
        """Note what differs, and go on, since others do."""
        found, expected = (torch.as_tensor(value).detach().double() for value in (found, expected))
        if found.shape != expected.shape:
            self.wrong.append(f"{what}: shape {tuple(found.shape)} for {tuple(expected.shape)}")
        elif not torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            self.wrong.append(f"{what}: off by {(found - expected).abs().max():.1e}, allowed {tolerance:.0e}")

    def same(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self.wrong.append(f"{what}: {found} for {expected}")

    @contextlib.contextmanager
    def collectives(self, what: str, expected: int) -> Iterator[None]:
        """Count what goes through the default group."""
        number: Any = distributed.group.WORLD._get_sequence_number_for_group  # type: ignore[union-attr]
        before = number()
        yield
        self.same(f"collectives {what}", number() - before, expected)

    def summed(self, value: Any) -> Tensor:
        """The sum over processes."""
        total: Tensor = value.detach().double().clone()
        distributed.all_reduce(total)
        return total


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def work(rank: int, size: int, directory: str, suite: Suite) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, list[str]] = {}
    for name, case in suite.items():
        process = Process(rank, size)
        try:
            with warnings.catch_warnings(action="error"):
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # of DDP, about other versions
                case(process)
        except Exception:
            found[name] = [traceback.format_exc()]
            break
        if process.wrong:
            found[name] = process.wrong
    torch.save(found, f"{directory}/{rank}.pt")
    if not found:
        distributed.destroy_process_group()


def run(size: int, directory: pathlib.Path, suite: Suite, seconds: float, survivors: int | None = None) -> None:
    """Run every case in each of some processes, and raise for what is wrong; nothing outlives the time."""
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, size, str(directory), suite)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
    finally:
        for process in processes:
            process.kill()
    wrong = []
    for rank in range(size if survivors is None else survivors):
        path = directory / f"{rank}.pt"
        found = torch.load(path, weights_only=True) if path.exists() else {"all": ["ended without a result"]}
        wrong += [f"process {rank}, {name}: {some}" for name, problems in found.items() for some in problems[:6]]
    assert not wrong, "\n".join(wrong)
