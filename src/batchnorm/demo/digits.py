"""The data: scikit-learn's 1,797 scans of handwritten digits, 8 by 8 pixels, and how batches are drawn from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

__all__ = ["SAMPLERS", "TEST_SIZE", "Digits", "Sampler", "Samples", "iid", "load", "two_classes"]

TEST_SIZE = 500
"""Samples that are kept for the test; the other 1,297 are for training."""

Sampler = Callable[[NDArray[np.int64], int, np.random.Generator], Iterator[NDArray[np.intp]]]
"""Function of labels, batch size and generator to the indices of one batch after another, without end."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images of shape [n, 8, 8, 1], of mean 0 and variance 1 over the training set, and their digits."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Digits:
    """The data, split once and for all."""

    train: Samples
    test: Samples


def load() -> Digits:
    """Load, scale and split the scans; each digit has the same share of both parts, and every call gives the same.

    >>> digits = load()
    >>> digits.train.images.shape, digits.test.images.shape
    ((1297, 8, 8, 1), (500, 8, 8, 1))
    """
    bunch: Any = load_digits()
    images = bunch.images.astype(np.float32)[..., np.newaxis]
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return Digits(Samples(images[train], labels[train]), Samples(images[test], labels[test]))


def iid(labels: NDArray[np.int64], batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Draw every sample of a batch independently from all samples."""
    while True:
        yield rng.integers(len(labels), size=batch_size, dtype=np.intp)


def two_classes(labels: NDArray[np.int64], batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Draw two classes for each batch, and half of its samples from each; any two are as likely as any others."""
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while True:
        first, second = rng.choice(len(members), size=2, replace=False)
        half = batch_size // 2
        yield np.concatenate([rng.choice(members[first], half), rng.choice(members[second], batch_size - half)])


SAMPLERS: Mapping[str, Sampler] = MappingProxyType({"i.i.d.": iid, "two classes": two_classes})
"""The samplers by the names that experiments know them by."""
