"""The experiments as a user of Keras writes them: a sequential model, `compile`, `fit` and `evaluate`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from batchnorm.keras import BatchNormalization, ClippingSchedule

from .digits import SAMPLERS, Digits
from .experiments import CONVOLUTIONS, Adjustment, Clips, Curve, Experiment

__all__ = ["run"]

_ALONE = threading.Lock()
"""One network at a time has the progress bar."""


def run(experiment: Experiment, digits: Digits, seed: int, progress: Callable[[int], None]) -> Curve:
    """Train and test a network.

    Args:
        experiment: What to do.
        digits: The data.
        seed: Seed of the initial weights, of the batches and of the adjustment.
        progress: Called with the number of steps done since the last time.

    Returns:
        The test accuracy by step, in evaluation with the moving statistics.
    """
    images, labels = digits.train.images, digits.train.labels
    batches = SAMPLERS[experiment.sampler](labels, experiment.batch_size, np.random.default_rng(seed))
    with _ALONE:
        model = _network(experiment, seed)
        model.compile(
            keras.optimizers.SGD(experiment.learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        bar = _Bar(experiment.steps)
        curve = []
        done = 0
        for step in range(1, experiment.steps + 1):
            if experiment.evaluated(step):
                chosen = np.concatenate([next(batches) for _ in range(step - done)])
                model.fit(
                    images[chosen],
                    labels[chosen],
                    batch_size=experiment.batch_size,
                    shuffle=False,
                    verbose=0,
                    callbacks=[bar],
                )
                _, accuracy = model.evaluate(digits.test.images, digits.test.labels, batch_size=500, verbose=0)
                curve.append((step, float(accuracy)))
                progress(step - done)
                done = step
    return Curve(*zip(*curve, strict=True))


class _Bar(keras.callbacks.Callback):
    """Keras' own progress bar, over several calls of `fit`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.bar, self.done = keras.utils.Progbar(steps), 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.done += 1
        self.bar.update(self.done, list((logs or {}).items()))


def _network(experiment: Experiment, seed: int) -> Any:
    """Logits of images; with biases instead where an experiment has no normalization."""
    normalization = experiment.normalization
    seeds = _seeds(seed)
    layers: list[Any] = [keras.Input((8, 8, 1))]
    for channels, stride in CONVOLUTIONS:
        initializer = keras.initializers.HeNormal(seed=next(seeds))
        layers.append(
            keras.layers.Conv2D(
                channels,
                3,
                stride,
                padding="same",
                use_bias=normalization is None,
                kernel_initializer=initializer,
            )
        )
        if normalization is not None:
            layers.append(BatchNormalization(**_options(experiment, next(seeds))))
        layers.append(keras.layers.ReLU())
    initializer = keras.initializers.GlorotNormal(seed=next(seeds))
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, kernel_initializer=initializer)]
    return keras.Sequential(layers)


def _seeds(seed: int) -> Iterator[int]:
    """Seeds that differ from layer to layer."""
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.integers(2**31))


class _Adjust:
    """A random scale and bias of each feature, drawn anew in each step."""

    def __init__(self, adjustment: Adjustment, seed: int) -> None:
        self.ranges = adjustment.scale, adjustment.bias
        self.generator = keras.random.SeedGenerator(seed)

    def __call__(self, shape: Any) -> Any:
        return tuple(keras.random.uniform((shape[-1],), *ends, seed=self.generator) for ends in self.ranges)


def _options(experiment: Experiment, seed: int) -> dict[str, Any]:
    normalization = experiment.normalization
    assert normalization is not None
    options: dict[str, Any] = {
        "momentum": normalization.momentum,
        "virtual_batch_size": normalization.virtual_batch_size,
    }
    if normalization.clips is not None:
        schedule = _schedule(normalization.clips, experiment.steps)
        options |= {"renorm": True, "renorm_clipping": schedule, "renorm_momentum": normalization.momentum}
    if normalization.adjustment is not None:
        options["adjustment"] = _Adjust(normalization.adjustment, seed)
    return options


def _schedule(clips: Clips, steps: int) -> ClippingSchedule:
    """Limits of renorm by the number of steps before; both begin to widen together."""

    def at(progress: float) -> int:
        return max(round(progress * steps) - 1, 0)

    return ClippingSchedule(
        at(clips.rmax.begin),
        rmax=clips.rmax.high,
        rmax_end=at(clips.rmax.end),
        dmax=clips.dmax.high,
        dmax_end=at(clips.dmax.end),
    )
