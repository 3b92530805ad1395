"""What is run, in no framework's terms: the network, every experiment, and what several seeds of it amount to."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .digits import Digits

__all__ = [
    "COMPARISONS",
    "CONVOLUTIONS",
    "LAST",
    "TARGET",
    "Adjustment",
    "Clips",
    "Comparison",
    "Curve",
    "Experiment",
    "Measured",
    "Normalization",
    "Outcome",
    "Ramp",
    "Result",
    "Run",
    "quick",
]

CONVOLUTIONS = ((16, 1), (16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (32, 2))
"""Channels and stride of each 3 by 3 convolution. Each is followed by normalization, or else a bias, and a ReLU; the
mean over the pixels and one dense layer end the network."""

TARGET = 0.95
"""The test accuracy that runs race to."""

LAST = 5
"""Evaluations that the final accuracy is the mean of, for a single one depends on the last few batches."""


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A value that goes linearly from `low` to `high` while the progress of the training goes from `begin` to `end`.

    >>> ramp = Ramp(1, 3, begin=0.1, end=0.5)
    >>> [ramp.at(progress) for progress in (0, 0.1, 0.3, 0.5, 1)]
    [1.0, 1.0, 2.0, 3.0, 3.0]
    """

    low: float
    high: float
    begin: float
    end: float

    def at(self, progress: float) -> float:
        """The value after a part of the training, from 0 to 1."""
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.low + (self.high - self.low) * share


@dataclasses.dataclass(frozen=True)
class Clips:
    """Limits of batch renormalization over the training: r in [1/rmax, rmax], d in [-dmax, dmax].

    The stages and final values of Ioffe (2017), in parts of the training: plain batch normalization at first, and d
    gets its freedom before r.
    """

    rmax: Ramp = Ramp(1, 3, begin=0.05, end=0.3)
    dmax: Ramp = Ramp(0, 5, begin=0.05, end=0.2)


@dataclasses.dataclass(frozen=True)
class Adjustment:
    """Ranges of the random scale and bias of each feature in training."""

    scale: tuple[float, float] = (0.93, 1.07)
    bias: tuple[float, float] = (-0.1, 0.1)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Options of every normalization layer of a network.

    Attributes:
        momentum: Weight of the old value in the moving averages.
        clips: For batch renormalization, its limits.
        virtual_batch_size: Samples in each virtual batch.
        adjustment: For a random scale and bias, their ranges.
        replicas: Replicas that share a batch, each with statistics of its own, where these are not synchronized. They
            are simulated: sample i is of replica i mod `replicas`, and replica and channel are the feature axes of a
            layer without scale and offset, for all replicas have the same. In inference each has its share, too.
    """

    momentum: float
    clips: Clips | None = None
    virtual_batch_size: int | None = None
    adjustment: Adjustment | None = None
    replicas: int | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One way to train the network.

    Attributes:
        method: What is compared, in words.
        normalization: Options of the layers, or None for a network with biases instead.
        learning_rate: That of plain stochastic gradient descent.
        batch_size: Samples in a batch.
        steps: Batches in the training.
        evaluations: How often the test accuracy is taken, at equal distances.
        sampler: Name of the way in which batches are drawn.
    """

    method: str
    normalization: Normalization | None
    learning_rate: float
    batch_size: int
    steps: int
    evaluations: int
    sampler: str = "i.i.d."

    def evaluated(self, step: int) -> bool:
        """Tell whether the test accuracy is taken after a step, counted from 1."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Experiments that differ in what is compared, and in nothing else.

    Attributes:
        title: What they have in common.
        experiments: The experiments; the first one is what the others are held against.
        sweep: Whether it is one of several comparisons that differ in the learning rate.
        drawn: Whether its curves have a place in the figure.
    """

    title: str
    experiments: tuple[Experiment, ...]
    sweep: bool = False
    drawn: bool = True


def _learning_rates() -> Iterator[Comparison]:
    for rate in (0.05, 0.15, 0.5, 1.5):
        yield Comparison(
            f"Batches of 64, rate {rate:g}",
            tuple(
                Experiment(method, normalization, rate, batch_size=64, steps=160, evaluations=32)
                for method, normalization in (("no batch norm", None), ("batch norm", Normalization(momentum=0.9)))
            ),
            sweep=True,
            drawn=rate == 1.5,
        )


def _renorm(title: str, batch_size: int, steps: int, sampler: str) -> Comparison:
    methods = (
        ("batch norm", Normalization(momentum=0.98)),
        ("batch renorm", Normalization(momentum=0.98, clips=Clips())),
        ("no batch norm", None),
    )
    return Comparison(
        title,
        tuple(
            Experiment(method, normalization, 0.1, batch_size, steps, evaluations=40, sampler=sampler)
            for method, normalization in methods
        ),
    )


def _large_batches() -> Comparison:
    methods = (
        ("batch norm", Normalization(momentum=0.9)),
        ("virtual batches of 16", Normalization(momentum=0.9, virtual_batch_size=16)),
        ("adjustment", Normalization(momentum=0.9, adjustment=Adjustment())),
    )
    return Comparison(
        "Batches of 256",
        tuple(
            Experiment(method, normalization, 0.3, batch_size=256, steps=60, evaluations=20)
            for method, normalization in methods
        ),
    )


def _replicas() -> Comparison:
    """Replicas of few samples. With synchronized statistics they take the steps of one process with all samples."""
    methods = (
        ("batch norm", Normalization(momentum=0.98, replicas=4)),
        ("batch renorm", Normalization(momentum=0.98, replicas=4, clips=Clips())),
        ("synchronized", Normalization(momentum=0.98)),
        ("synchronized renorm", Normalization(momentum=0.98, clips=Clips())),
    )
    return Comparison(
        "Four replicas of 4 samples",
        tuple(
            Experiment(method, normalization, 0.1, batch_size=16, steps=400, evaluations=40)
            for method, normalization in methods
        ),
    )


COMPARISONS = (
    *_learning_rates(),
    _renorm("Batches of 4", 4, steps=800, sampler="i.i.d."),
    _renorm("Batches of 32 from two classes", 32, steps=320, sampler="two classes"),
    _large_batches(),
    _replicas(),
)
"""Everything that the demo runs."""


def quick(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Cut every experiment down to two steps, to see that all of it works."""
    return tuple(
        dataclasses.replace(
            comparison,
            experiments=tuple(
                dataclasses.replace(experiment, steps=2, evaluations=2) for experiment in comparison.experiments
            ),
        )
        for comparison in comparisons
    )


@dataclasses.dataclass(frozen=True)
class Curve:
    """Test accuracy of one run, by the steps after which it was taken.

    >>> curve = Curve((10, 20, 30), (0.5, 0.97, 0.9))
    >>> curve.reached(), curve.reached(0.99), round(curve.mean, 2)
    (20, None, 0.79)
    """

    steps: tuple[int, ...]
    accuracy: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of all evaluations, which is high for a training that is fast and steady."""
        return statistics.fmean(self.accuracy)

    @property
    def final(self) -> float:
        """The mean of the last evaluations."""
        return statistics.fmean(self.accuracy[-LAST:])

    def reached(self, target: float = TARGET) -> int | None:
        """The first step at which an accuracy was reached, or None."""
        points = zip(self.steps, self.accuracy, strict=True)
        return next((step for step, accuracy in points if accuracy >= target), None)


Run = Callable[[Experiment, "Digits", int, Callable[[int], None]], Curve]
"""What a framework contributes: function of an experiment, the data, a seed, and a function to call with the number of
steps done since the last time."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Mean and standard deviation over seeds; no deviation for a single one.

    >>> str(Measured.of([0.96, 0.97, 0.98]))
    '0.970 ± 0.010'
    """

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Sum up the values of several seeds."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, spec: str) -> str:
        return format(self.mean, spec) + ("" if self.spread is None else " ± " + format(self.spread, spec.lstrip("+")))

    def __str__(self) -> str:
        return format(self, ".3f")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An experiment and its curves, one for each seed."""

    experiment: Experiment
    curves: tuple[Curve, ...]

    @property
    def mean(self) -> Measured:
        """Accuracy over the whole run."""
        return Measured.of([curve.mean for curve in self.curves])

    @property
    def final(self) -> Measured:
        """Final accuracy."""
        return Measured.of([curve.final for curve in self.curves])

    @property
    def arrivals(self) -> list[int]:
        """Steps to `TARGET` of the runs that reached it."""
        return [step for step in (curve.reached() for curve in self.curves) if step is not None]

    @property
    def steps_to_target(self) -> Measured | None:
        """Steps to `TARGET`, or None unless every run reached it."""
        return Measured.of(self.arrivals) if len(self.arrivals) == len(self.curves) else None


@dataclasses.dataclass(frozen=True)
class Result:
    """A comparison and what came of its experiments, in their order."""

    comparison: Comparison
    outcomes: tuple[Outcome, ...]

    def gain(self, outcome: Outcome, quantity: Callable[[Curve], float]) -> Measured:
        """How far an outcome is above the first one, seed by seed: the same seed draws the same batches."""
        pairs = zip(outcome.curves, self.outcomes[0].curves, strict=True)
        return Measured.of([quantity(mine) - quantity(other) for mine, other in pairs])
