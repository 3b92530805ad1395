"""Where: feature axes, the axes summed over, the shapes of the parameters, and virtual batches."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Canonical", "Geometry", "plan"]


class Canonical(NamedTuple):
    """An array as the native kernels see it: (rows, features, inner), row r in group (r // span) % groups.

    Groups are virtual batches, unless each has parameters of its `own`: then they are feature axes, too.
    """

    rows: int
    groups: int
    span: int
    features: int
    inner: int
    own: bool = False

    @property
    def parameters(self) -> int:
        """Values of a parameter."""
        return self.groups * self.features if self.own else self.features


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How the layer looks at its input.

    A whole batch is seen as it is. With virtual batches of b samples it is seen as (b, G, …), G = N / b groups, so
    that sample i is in group i mod G; the group is then axis 1. Statistics keep their reduced axes with size 1.

    Attributes:
        rank: Rank of the input.
        features: Size of each feature axis, by axis, ascending.
        virtual_batch_size: b, or None.
    """

    rank: int
    features: tuple[tuple[int, int], ...]
    virtual_batch_size: int | None

    @property
    def axes(self) -> tuple[int, ...]:
        """The feature axes of the input, ascending, none negative."""
        return tuple(axis for axis, _ in self.features)

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        """The axes of the view that statistics are taken over."""
        reduced = [axis for axis in range(self.rank) if axis not in self.axes]
        if self.virtual_batch_size is None:
            return tuple(reduced)
        return tuple(axis if axis == 0 else axis + 1 for axis in reduced)

    @property
    def group_axis(self) -> int | None:
        """The axis of the view that counts virtual batches."""
        return None if self.virtual_batch_size is None else 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape in which a parameter broadcasts against the input."""
        sizes = dict(self.features)
        return tuple(sizes.get(axis, 1) for axis in range(self.rank))

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The shape in which a parameter broadcasts against the view."""
        if self.virtual_batch_size is None:
            return self.input_shape
        return (self.input_shape[0], 1, *self.input_shape[1:])

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of gamma, beta and every statistic in checkpoints."""
        if len(self.features) == 1 and self.virtual_batch_size is None:
            return (self.features[0][1],)
        return self.view_shape

    def check_input(self, shape: Sequence[int | None]) -> None:
        """Raise unless an input of this shape fits (None is an unknown size)."""
        if len(shape) != self.rank:
            raise ValueError(f"inputs must have rank {self.rank}, as built for; received shape {tuple(shape)}.")
        for axis, size in self.features:
            if shape[axis] not in (None, size):
                raise ValueError(
                    f"inputs must have size {size} on axis {axis}, as built for; received shape {tuple(shape)}."
                )

    def split(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """Turn the shape of an input (sizes may be symbolic) into that of its view."""
        if self.virtual_batch_size is None:
            return tuple(shape)
        size = self.virtual_batch_size
        if isinstance(shape[0], int) and shape[0] % size:
            raise ValueError(
                f"virtual_batch_size must divide the batch size in training; received a batch of "
                f"{shape[0]} samples and virtual_batch_size={size}."
            )
        return (size, shape[0] // size, *shape[1:])

    def runs(self, shape: Sequence[int | None]) -> list[tuple[int, int]]:
        """Find what lies together: the first and last feature axis of each run, with only axes of size 1 between.

        >>> plan((8, 6, 5, 3), (1, 2), None).runs((8, 6, 5, 3)), plan((8, 6, 5, 3), (1, 3), None).runs((8, 6, 5, 3))
        ([(1, 2)], [(1, 1), (3, 3)])
        """
        found: list[tuple[int, int]] = []
        for axis in self.axes:
            if found and all(shape[between] == 1 for between in range(found[-1][1] + 1, axis)):
                found[-1] = found[-1][0], axis
            else:
                found.append((axis, axis))
        return found

    def collapses(self, shape: Sequence[int | None]) -> bool:
        """Tell whether `canonical` can see an input of this shape: two runs at most, one with virtual batches."""
        return len(self.runs(shape)) <= (2 if self.virtual_batch_size is None else 1)

    def is_by_feature(self, shape: Sequence[int | None]) -> bool:
        """Tell whether an array of this shape has one value for each feature when broadcast against the input."""
        lead = self.rank - len(shape)
        return all(size == 1 or lead + axis in self.axes for axis, size in enumerate(shape))

    def canonical(self, shape: Sequence[int]) -> Canonical | None:
        """See an input of this shape as the native kernels do; None where feature axes lie too far apart.

        >>> plan((32, 64, 56, 56), 1, None).canonical((32, 64, 56, 56))
        Canonical(rows=32, groups=1, span=1, features=64, inner=3136, own=False)
        >>> plan((32, 7, 7, 64), -1, 8).canonical((32, 7, 7, 64))
        Canonical(rows=1568, groups=4, span=49, features=64, inner=1, own=False)
        >>> plan((8, 6, 5, 3), (1, 3), None).canonical((8, 6, 5, 3))
        Canonical(rows=240, groups=6, span=5, features=3, inner=1, own=True)
        """
        if not self.collapses(shape):
            return None
        *apart, (first, last) = self.runs(shape)
        before, after = math.prod(shape[:first]), math.prod(shape[last + 1 :])
        features = math.prod(shape[first : last + 1])
        for begin, end in apart:  # one at most
            groups, between = math.prod(shape[begin : end + 1]), math.prod(shape[end + 1 : first])
            return Canonical(before, groups, between, features, after, own=True)
        if self.virtual_batch_size is None:
            return Canonical(before, 1, 1, features, after)
        return Canonical(before, shape[0] // self.virtual_batch_size, math.prod(shape[1:first]), features, after)

    def count(self, shape: Sequence[Any]) -> Any:
        """Count the values per group and feature in a view of this shape."""
        count = 1
        for axis in self.reduced_axes:
            count = count * shape[axis]
        return count


@functools.lru_cache(maxsize=1024)
def plan(shape: tuple[int | None, ...], axis: int | tuple[int, ...], virtual_batch_size: int | None) -> Geometry:
    """Work out the geometry for inputs of a shape; None is a size that is not known yet.

    Raises:
        ValueError: If a feature axis is out of range, named twice, of unknown size, or the batch axis of virtual
            batches.

    >>> plan((None, 5, 5, 3), -1, None).parameter_shape
    (3,)
    >>> plan((None, 5, 5, 3), (1, 3), None).parameter_shape
    (1, 5, 1, 3)
    >>> geometry = plan((32, 5, 5, 3), -1, 8)
    >>> geometry.parameter_shape, geometry.split((32, 5, 5, 3)), geometry.reduced_axes
    ((1, 1, 1, 1, 3), (8, 4, 5, 5, 3), (0, 2, 3))
    """
    rank = len(shape)
    given = axis if isinstance(axis, tuple) else (axis,)
    for one in given:
        if not -rank <= one < rank:
            raise ValueError(
                f"axis must be in [{-rank}, {rank}) for inputs of rank {rank}; received axis={axis} "
                f"and inputs of shape {shape}."
            )
    axes = sorted(one % rank for one in given)
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"axis must name each axis once; received axis={axis}, which is {axes} for inputs of rank {rank}."
        )
    if virtual_batch_size is not None and 0 in axes:
        raise ValueError(
            f"axis cannot include the batch axis 0 with virtual_batch_size={virtual_batch_size}; received axis={axis}."
        )
    features = []
    for one in axes:
        size = shape[one]
        if size is None:
            raise ValueError(
                f"inputs must have a known size on every feature axis; received axis={axis} and shape {shape}."
            )
        features.append((one, size))
    return Geometry(rank, tuple(features), virtual_batch_size)
