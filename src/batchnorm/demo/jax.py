"""The experiments as a user of JAX and Flax writes them: a model of NNX modules, an optimizer, a compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from batchnorm.flax import BatchNorm

from .digits import SAMPLERS, Digits
from .experiments import CONVOLUTIONS, Adjustment, Clips, Curve, Experiment

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
    model = _Network(experiment, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.sgd(experiment.learning_rate), wrt=nnx.Param)
    images, labels = digits.train.images, digits.train.labels

    @nnx.jit
    def step(model: Any, optimizer: Any, images: Any, labels: Any) -> None:
        def loss(model: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    @nnx.jit
    def correct(model: Any, images: Any, labels: Any) -> Any:
        return (model(images, training=False).argmax(-1) == labels).mean()

    batches = SAMPLERS[experiment.sampler](labels, experiment.batch_size, np.random.default_rng(seed))
    curve = []
    done = 0
    for number in range(1, experiment.steps + 1):
        batch = next(batches)
        step(model, optimizer, images[batch], labels[batch])
        if experiment.evaluated(number):
            curve.append((number, float(correct(model, digits.test.images, digits.test.labels))))
            progress(number - done)
            done = number
    return Curve(*zip(*curve, strict=True))


class _Network(nnx.Module):
    """Logits of images; with biases instead where an experiment has no normalization."""

    def __init__(self, experiment: Experiment, rngs: nnx.Rngs) -> None:
        normalization = experiment.normalization
        convolutions, norms, features = [], [], 1
        for channels, stride in CONVOLUTIONS:
            convolutions.append(
                nnx.Conv(
                    features,
                    channels,
                    (3, 3),
                    stride,
                    use_bias=normalization is None,
                    kernel_init=nnx.initializers.he_normal(),
                    rngs=rngs,
                )
            )
            if normalization is not None:
                options = _options(experiment, rngs)
                apart = normalization.replicas
                norms.append(_Apart(apart, channels, options) if apart else BatchNorm(channels, **options))
            features = channels
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        self.head = nnx.Linear(features, 10, kernel_init=nnx.initializers.glorot_normal(), rngs=rngs)

    def __call__(self, x: Any, training: bool = True) -> Any:
        for at, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if self.norms:
                x = self.norms[at](x, use_running_average=not training)
            x = nnx.relu(x)
        return self.head(x.mean((1, 2)))


class _Apart(nnx.Module):
    """Normalization of the samples of each replica by themselves, with one scale and bias for all."""

    def __init__(self, replicas: int, channels: int, options: dict[str, Any]) -> None:
        self.replicas = replicas
        self.norm = BatchNorm((replicas, channels), axis=(1, -1), use_scale=False, use_bias=False, **options)
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Any, use_running_average: bool) -> Any:
        shares = x.reshape(-1, self.replicas, *x.shape[1:])
        y = self.norm(shares, use_running_average=use_running_average)
        return (y * self.scale[...] + self.bias[...]).reshape(x.shape)


class _Adjust(nnx.Module):
    """A random scale and bias of each feature, drawn anew in each step; a module, so that its key goes on."""

    def __init__(self, adjustment: Adjustment, rngs: nnx.Rngs) -> None:
        self.ranges = adjustment.scale, adjustment.bias
        self.rngs = rngs

    def __call__(self, shape: Any) -> Any:
        return tuple(jax.random.uniform(self.rngs.noise(), (shape[-1],), jnp.float32, *ends) for ends in self.ranges)


def _options(experiment: Experiment, rngs: nnx.Rngs) -> dict[str, Any]:
    normalization = experiment.normalization
    assert normalization is not None
    options: dict[str, Any] = {
        "epsilon": EPSILON,
        "momentum": normalization.momentum,
        "virtual_batch_size": normalization.virtual_batch_size,
        "rngs": rngs,
    }
    if normalization.clips is not None:
        options |= {"renorm": True, "renorm_clipping": _schedule(normalization.clips, experiment.steps)}
    if normalization.adjustment is not None:
        options["adjustment"] = _Adjust(normalization.adjustment, rngs)
    return options


def _schedule(clips: Clips, steps: int) -> Callable[[Any], dict[str, Any]]:
    """Limits of renorm by the number of steps before."""

    def limits(done: Any) -> dict[str, Any]:
        progress = (done + 1) / steps
        rmax, dmax = (
            jnp.interp(progress, jnp.array([ramp.begin, ramp.end]), jnp.array([float(ramp.low), float(ramp.high)]))
            for ramp in (clips.rmax, clips.dmax)
        )
        return {"rmin": 1 / rmax, "rmax": rmax, "dmax": dmax}

    return limits
