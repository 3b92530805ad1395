"""PyTorch: our layer, its own as it is and compiled, and what users copy of sb3-contrib, torchrl and pytorch-tabnet.

Features last means channels_last, of the shape that PyTorch says features first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import batchnorm.torch
from benchmarks.cases import Case

from . import Array, Contender

__all__ = ["KEEPS_MEMORY", "PEERS", "TITLE", "array", "configure", "contenders", "extras", "ours", "versions"]

TITLE = "PyTorch"
KEEPS_MEMORY = False
PEERS = ("torch.nn", "torch.compile", "torchrl", "sb3-contrib", "pytorch-tabnet")
PACKAGES = ("torch", "torchrl", "sb3-contrib", "pytorch-tabnet")


def configure(threads: int) -> None:
    """Set the threads that PyTorch computes with."""
    warnings.filterwarnings("ignore", module="torchrl|gymnasium|stable_baselines3|sb3_contrib")
    torch.set_num_threads(threads)


def versions() -> str:
    """Name PyTorch and the peers with their versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def array(value: Any) -> Array:
    """Copy a tensor to NumPy."""
    return np.asarray(value.detach().float())


def _first(case: Case) -> tuple[int, ...]:
    """The shape with features first."""
    n, *rest = case.shape
    return case.shape if case.axis == 1 or not rest[1:] else (n, rest[-1], *rest[:-1])


def _options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "renorm" in case.option:
        options |= {"renorm": True, "renorm_clipping": {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}}
    if "virtual" in case.option:
        size = min(128 if "128" in case.option else 8, case.shape[0])
        options["virtual_batch_size"] = size - 1 if "uneven" in case.option else size
    if case.option == "adjustment":
        shape = _first(case)
        scale = torch.linspace(0.93, 1.07, shape[1]).reshape(-1, *(1,) * (len(shape) - 2))
        options["adjustment"] = lambda shape: (scale, scale - 1)
    return options


def _run(layer: nn.Module, case: Case, x: Tensor, dy: Tensor) -> Callable[[], list[Tensor]]:
    layer.train(case.mode != "inference")
    parameters = list(layer.parameters())
    given = (x,) if case.mask is None else (x, torch.from_numpy(case.mask))

    def step() -> list[Tensor]:
        y = layer(*given)
        return [y, *torch.autograd.grad(y, [x, *parameters], dy)]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [layer(*given)]

    return step if case.mode == "step" else forward


@functools.lru_cache(maxsize=2)  # cases of one shape follow each other
def _random(shape: tuple[int, ...], dtype: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = ((torch.randn(shape, generator=generator) * 2 + 0.5).to(getattr(torch, dtype)) for _ in range(2))
    return x, dy


def _data(case: Case) -> tuple[Tensor, Tensor]:
    x, dy = _random(case.shape, case.dtype)
    if _first(case) != case.shape:
        x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
    return x.detach().requires_grad_(case.mode == "step"), dy


def _kind(case: Case) -> str:
    """The name of the layer, here and in torch.nn."""
    rank = len(case.shape)
    return f"BatchNorm{1 if rank == 2 else rank - 2}d"


def _ours(case: Case) -> Any:
    shape = _first(case)
    if case.option == "two axes":
        axes = (1, 2) if case.axis == 1 else (2, 3)
        return batchnorm.torch.BatchNorm(tuple(shape[axis] for axis in axes), axis=axes)
    return getattr(batchnorm.torch, _kind(case))(shape[1], **_options(case))


def ours(case: Case) -> Contender:
    """Make our layer on the data of a case."""
    layer = _ours(case)
    return Contender("batchnorm", _run(layer, case, *_data(case)), lambda: layer.kernel)


def contenders(case: Case) -> tuple[list[Contender], Contender]:
    """Make the contenders of a case, ours first, and the floor: what reading and writing the data takes alone."""
    shape, (x, dy) = _first(case), _data(case)
    found = [ours(case)]
    if case.option == "plain":
        make = getattr(nn, _kind(case))
        found.append(Contender("torch.nn", _run(make(shape[1]), case, x, dy)))
        torch.compiler.reset()  # else it gives up compiling after a few shapes, without a word
        compiled: Any = torch.compile(make(shape[1]), fullgraph=True, dynamic=False)
        rounds = 2 if case.dtype == "bfloat16" else 1  # its gradient of the weight is off by up to 6 % there
        found.append(Contender("torch.compile", _run(compiled, case, x, dy), tolerance=rounds))
    if case.option == "renorm":
        found += _renorm_peers(case, shape, x, dy)
    if case.option.startswith("virtual") and len(shape) == 2:
        found.append(_tabnet(case, shape, x, dy, _options(case)["virtual_batch_size"]))

    @torch.no_grad()
    def floor() -> list[Tensor]:  # a copy; and for the gradient, two read and one written
        return [-x, x + dy] if case.mode == "step" else [-x]

    return found, Contender("floor", floor)


def _renorm_peers(case: Case, shape: tuple[int, ...], x: Tensor, dy: Tensor) -> list[Contender]:
    torchrl: Any = importlib.import_module("torchrl.modules")
    found = [Contender("torchrl", _run(torchrl.BatchRenorm1d(shape[1], warmup_steps=0), case, x, dy))]
    if len(shape) == 2:
        layers: Any = importlib.import_module("sb3_contrib.common.torch_layers")
        layer = layers.BatchRenorm1d(shape[1], eps=1e-5, warmup_steps=0)
        layer.steps += 1  # past what it calls warm-up
        found.append(Contender("sb3-contrib", _run(layer, case, x, dy), tolerance=20))  # other ε, n − 1 for n
    return found


def _tabnet(case: Case, shape: tuple[int, ...], x: Tensor, dy: Tensor, size: int) -> Contender:
    """Its virtual batches are samples that follow each other, ours every so many; so it gets them in another order."""
    network: Any = importlib.import_module("pytorch_tabnet.tab_network")
    order = torch.arange(shape[0]).reshape(size, -1).T.reshape(-1)
    x = x.detach()[order].requires_grad_(x.requires_grad)
    run = _run(network.GBN(shape[1], virtual_batch_size=size), case, x, dy[order])
    return Contender("pytorch-tabnet", run, rows=order.argsort().numpy())


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        short = [nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)]
        self.short = nn.Sequential(*short) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


def _resnet18() -> nn.Sequential:
    torch.manual_seed(0)
    stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *(_Block(*stage) for stage in (*stages, (512, 512, 1))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _without(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return model


def extras(quick: bool) -> list[tuple[Case, list[Contender]]]:
    """A whole training step of a network, with our layer, PyTorch's, and none."""
    found = []
    for axis, memory in ((1, torch.contiguous_format), (-1, torch.channels_last)):
        shape = (2 if quick else 16, 3, 64, 64)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory)
        labels = torch.arange(shape[0]) % 10

        def run(model: nn.Module, x: Tensor = x, labels: Tensor = labels) -> Callable[[], list[Tensor]]:
            parameters = list(model.parameters())

            def step() -> list[Tensor]:
                loss = nn.functional.cross_entropy(model(x), labels)
                return [loss, *torch.autograd.grad(loss, parameters)][:1]

            return step

        models = {
            "batchnorm": batchnorm.torch.convert(_resnet18()),
            "torch.nn": _resnet18(),
            "none": _without(_resnet18()),
        }
        contenders = [Contender(name, run(model.to(memory_format=memory))) for name, model in models.items()]  # type: ignore[call-overload]
        found.append((Case("ResNet-18", shape, axis, "float32", "network"), contenders))
    return found
