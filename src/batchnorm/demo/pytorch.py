"""The experiments as a user of PyTorch writes them: a model of modules, an optimizer, and the loop around them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.torch import BatchNorm, BatchNorm2d

from .digits import SAMPLERS, Digits, Samples
from .experiments import CONVOLUTIONS, Clips, Curve, Experiment

__all__ = ["run"]

EPSILON = 1e-3
"""The original's default, which the other runs take."""


def run(experiment: Experiment, digits: Digits, seed: int, progress: Callable[[int], None]) -> Curve:
    """Train and test a network.

    Args:
        experiment: What to do.
        digits: The data.
        seed: Seed of the initial weights, of the batches and of the adjustment.
        progress: Called with the number of steps done since the last time.

    Returns:
        The test accuracy by step, in evaluation with the running statistics.
    """
    # With one thread each, sums are always taken in the same order, and several runs share the processors well.
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)  # PyTorch's own is shared by the runs beside this one
    model = _network(_normalization(experiment, generator))
    _initialize(model, generator)
    optimizer = torch.optim.SGD(model.parameters(), experiment.learning_rate)
    images, labels = _tensors(digits.train)
    test_images, test_labels = _tensors(digits.test)

    batches = SAMPLERS[experiment.sampler](digits.train.labels, experiment.batch_size, np.random.default_rng(seed))
    curve = []
    done = 0
    for step in range(1, experiment.steps + 1):
        batch = torch.from_numpy(next(batches))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if experiment.evaluated(step):
            model.eval()
            with torch.inference_mode():
                correct = model(test_images).argmax(dim=1) == test_labels
            model.train()
            curve.append((step, float(correct.float().mean())))
            progress(step - done)
            done = step
    return Curve(*zip(*curve, strict=True))


def _tensors(samples: Samples) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(samples.images).movedim(-1, 1).contiguous(), torch.from_numpy(samples.labels)


def _network(normalization: Callable[[int], nn.Module] | None) -> nn.Sequential:
    """Logits of images. With None there are biases instead of normalization."""
    layers: list[nn.Module] = []
    features = 1
    for channels, stride in CONVOLUTIONS:
        if stride == 1:
            padding = 1
        else:  # as TensorFlow pads an even size: at the end only
            layers.append(nn.ZeroPad2d((0, 1, 0, 1)))
            padding = 0
        layers.append(nn.Conv2d(features, channels, 3, stride, padding, bias=normalization is None))
        if normalization is not None:
            layers.append(normalization(channels))
        layers.append(nn.ReLU())
        features = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10))


def _initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights as TensorFlow's `he_normal` does for convolutions, and `glorot_normal` for the dense layer."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan = layer.weight[0].numel() / 2 if isinstance(layer, nn.Conv2d) else sum(layer.weight.shape) / 2
            deviation = 1 / math.sqrt(fan) / 0.87962566  # of what is left of a normal distribution within ±2
            limit = 2 * deviation
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-limit, b=limit, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class _Apart(nn.Module):
    """Normalization of the samples of each replica by themselves, with one scale and offset for all."""

    def __init__(self, replicas: int, channels: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.replicas = replicas
        self.norm = BatchNorm((replicas, channels), axis=(1, 2), affine=False, **options)
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shares = x.reshape(-1, self.replicas, *x.shape[1:])
        y: Tensor = self.norm(shares) * self.weight[:, None, None] + self.bias[:, None, None]
        return y.flatten(0, 1)


def _normalization(experiment: Experiment, generator: torch.Generator) -> Callable[[int], nn.Module] | None:
    """A function of the channels to a normalization layer, or None for a network without it."""
    normalization = experiment.normalization
    if normalization is None:
        return None
    step = 1 - normalization.momentum  # PyTorch's momentum is the weight of the new value
    options: dict[str, Any] = {
        "eps": EPSILON,
        "momentum": step,
        "virtual_batch_size": normalization.virtual_batch_size,
    }
    if normalization.clips is not None:
        options |= {
            "renorm": True,
            "renorm_clipping": _schedule(normalization.clips, experiment.steps),
            "renorm_momentum": step,
        }
    if normalization.adjustment is not None:
        ranges = normalization.adjustment.scale, normalization.adjustment.bias
        options["adjustment"] = lambda shape: tuple(
            torch.empty(shape[1], 1, 1).uniform_(*ends, generator=generator) for ends in ranges
        )
    if normalization.replicas is not None:
        return functools.partial(_Apart, normalization.replicas, options=options)
    return functools.partial(BatchNorm2d, **options)


def _schedule(clips: Clips, steps: int) -> Callable[[Tensor], dict[str, float]]:
    """Limits of renorm by the number of batches tracked before."""

    def limits(batches: Tensor) -> dict[str, float]:
        progress = (int(batches) + 1) / steps
        rmax = clips.rmax.at(progress)
        return {"rmin": 1 / rmax, "rmax": rmax, "dmax": clips.dmax.at(progress)}

    return limits
