"""Where: feature axes, the axes summed over, the shapes of the parameters, virtual batches, and what broadcasts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["REFUSED_WEIGHTS", "Geometry", "View", "counted_axes", "plan"]

REFUSED_WEIGHTS = "mask must hold finite numbers that are not negative; received others."
"""What is said where a framework finds that not all weights are so."""


class View(NamedTuple):
    """An array as the CPU kernels see it: (rows, features, inner), row r in group (r // span) % groups.

    Groups are virtual batches, unless parameters are by group: then they are feature axes, too. What weighs positions
    has the order of the array without its feature axes.
    """

    rows: int
    groups: int
    span: int
    features: int
    inner: int
    grouped_parameters: bool = False

    @property
    def parameters(self) -> int:
        """Values of a parameter."""
        return self.groups * self.features if self.grouped_parameters else self.features

    @property
    def virtual_batches(self) -> int:
        """Groups that share parameters."""
        return 1 if self.grouped_parameters else self.groups

    @property
    def whole(self) -> View:
        """The same of a whole batch, as inference sees it."""
        return self if self.grouped_parameters else self._replace(groups=1, span=1)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How the layer looks at its input.

    A whole batch is seen as it is. With virtual batches of b samples a batch of N is seen as (R, G, …), with G = ⌈N/b⌉
    groups, so that sample i is in group i mod G; the group is then axis 1. Where G does not divide N, the last row is
    filled up with samples that weigh nothing. Statistics keep their reduced axes with size 1.

    Attributes:
        rank: Rank of the input.
        features: Size of each feature axis, by axis, ascending.
        virtual_batch_size: b, or None.
        axes: The feature axes of the input, ascending, none negative.
        feature_sizes: Their sizes: the shape of a parameter where ranks do not matter.
        reduced_axes: The axes of the view that statistics are taken over.
        group_axis: The axis of the view that counts virtual batches, or None.
        input_shape: The shape in which a parameter broadcasts against the input.
        view_shape: The shape in which a parameter broadcasts against the view.
        parameter_shape: The shape of gamma, beta and every statistic in checkpoints.
    """

    rank: int
    features: tuple[tuple[int, int], ...]
    virtual_batch_size: int | None
    axes: tuple[int, ...]
    feature_sizes: tuple[int, ...]
    reduced_axes: tuple[int, ...]
    group_axis: int | None
    input_shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    parameter_shape: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, features: tuple[tuple[int, int], ...], virtual_batch_size: int | None) -> Geometry:
        """Derive everything from what tells inputs apart."""
        axes, sizes = tuple(axis for axis, _ in features), tuple(size for _, size in features)
        reduced = tuple(axis for axis in range(rank) if axis not in axes)
        by_axis = dict(features)
        shape = tuple(by_axis.get(axis, 1) for axis in range(rank))
        if virtual_batch_size is None:
            parameter_shape = sizes if len(sizes) == 1 else shape
            return cls(rank, features, None, axes, sizes, reduced, None, shape, shape, parameter_shape)
        reduced = tuple(axis if axis == 0 else axis + 1 for axis in reduced)
        view = (shape[0], 1, *shape[1:])
        return cls(rank, features, virtual_batch_size, axes, sizes, reduced, 1, shape, view, view)

    @property
    def whole(self) -> Geometry:
        """The same without virtual batches, as inference sees it."""
        return self if self.virtual_batch_size is None else Geometry.of(self.rank, self.features, None)

    def check_input(self, shape: Sequence[int | None]) -> None:
        """Raise unless an input of this shape fits (None is an unknown size)."""
        if len(shape) != self.rank:
            raise ValueError(f"inputs must have rank {self.rank}, as built for; received shape {tuple(shape)}.")
        for axis, size in self.features:
            if shape[axis] not in (None, size):
                raise ValueError(
                    f"inputs must have size {size} on axis {axis}, as built for; received shape {tuple(shape)}."
                )

    def check_divides(self, batch: int | None) -> None:
        """Raise unless virtual batches divide a batch of this many samples (None is an unknown number)."""
        if self.virtual_batch_size is not None and batch is not None and batch % self.virtual_batch_size:
            raise ValueError("".join(map(str, self.divides(batch))))

    def divides(self, batch: Any) -> tuple[str, Any, str]:
        """Say that virtual batches must divide a batch, of a size that may be known only when a program runs."""
        return (
            "virtual_batch_size must divide the batch size in training; received a batch of ",
            batch,
            f" samples and virtual_batch_size={self.virtual_batch_size}.",
        )

    def check_adjustment(self, shapes: Sequence[Sequence[int | None] | None], shape: Sequence[int | None]) -> bool:
        """Raise unless arrays of these shapes broadcast to inputs of a shape (None is unknown).

        Returns:
            Whether they are known to have one value for each feature.
        """
        by_feature = True
        for given in shapes:
            if given is None:
                by_feature = False
                continue
            lead = self.rank - len(given)
            if lead < 0 or any(
                size not in (1, None, shape[axis]) and shape[axis] is not None for axis, size in enumerate(given, lead)
            ):
                raise ValueError(
                    f"adjustment must be or return arrays that broadcast to the inputs' shape {tuple(shape)}; "
                    f"received shape {tuple(given)}."
                )
            by_feature = by_feature and all(size == 1 or axis in self.axes for axis, size in enumerate(given, lead))
        return by_feature

    def mask_shape(self, given: Sequence[int | None], shape: Sequence[int | None]) -> tuple[Any, ...]:
        """Say how a mask of a shape broadcasts against inputs of a shape (None is unknown): with 1 on feature axes.

        Raises:
            ValueError: Unless it has one value for each position: the inputs' shape without the feature axes, or with
                size 1 on them.

        >>> plan((8, 3, 50), 1, None).mask_shape((8, 50), (8, 3, 50))
        (8, 1, 50)
        """
        aligned = tuple(1 if axis in self.axes else size for axis, size in enumerate(shape))
        positions = tuple(size for axis, size in enumerate(shape) if axis not in self.axes)
        for allowed in (aligned, positions):
            if len(given) == len(allowed) and all(
                size == wanted or size is None or wanted is None for size, wanted in zip(given, allowed, strict=True)
            ):
                return aligned
        raise ValueError(
            f"mask must have shape {positions} or {aligned} for inputs of shape {tuple(shape)}, one value for each "
            f"position; received shape {tuple(given)}."
        )

    @staticmethod
    def check_upstream(given: Sequence[int], shape: Sequence[int]) -> None:
        """Raise unless a gradient dy of this shape belongs to an output of a shape."""
        if tuple(given) != tuple(shape):
            raise ValueError(f"dy must have the shape of the output, {tuple(shape)}; received shape {tuple(given)}.")

    def split(self, shape: Sequence[Any], *, uneven: bool = False) -> tuple[Any, ...]:
        """Turn the shape of an input into that of its view; a size that is not known yet divides unless `uneven`."""
        if self.virtual_batch_size is None:
            return tuple(shape)
        batch, *rest = shape
        groups = -(-batch // self.virtual_batch_size)
        if isinstance(batch, int):
            return (-(-batch // max(groups, 1)), groups, *rest)
        if uneven:
            return (-(-batch // (groups + 1 // (batch + 1))), groups, *rest)  # divided by 1 where there is no sample
        return (self.virtual_batch_size, groups, *rest)

    def padding(self, shape: Sequence[Any], *, uneven: bool = False) -> Any:
        """Count the samples that fill up the last row of the view."""
        if self.virtual_batch_size is None or not (uneven or isinstance(shape[0], int)):
            return 0
        rows, groups, *_ = self.split(shape, uneven=uneven)
        return rows * groups - shape[0]

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
        """Tell whether the kernels can see an input of this shape: two runs at most, one with virtual batches."""
        return len(self.runs(shape)) <= (2 if self.virtual_batch_size is None else 1)

    def view(self, shape: Sequence[Any]) -> View | None:
        """See an input of this shape as the CPU kernels do; None where they cannot.

        Feature axes may lie too far apart. Where groups do not divide the samples, the first have one more. Of sizes
        that are known only when a program runs the view has such numbers.

        >>> plan((32, 64, 56, 56), 1, None).view((32, 64, 56, 56))
        View(rows=32, groups=1, span=1, features=64, inner=3136, grouped_parameters=False)
        >>> plan((32, 7, 7, 64), -1, 8).view((32, 7, 7, 64))
        View(rows=1568, groups=4, span=49, features=64, inner=1, grouped_parameters=False)
        >>> plan((8, 6, 5, 3), (1, 3), None).view((8, 6, 5, 3))
        View(rows=240, groups=6, span=5, features=3, inner=1, grouped_parameters=True)
        """
        known = [size if isinstance(size, int) else None for size in shape]
        if not self.collapses(known):
            return None
        *apart, (first, last) = self.runs(known)
        before, after = math.prod(shape[:first]), math.prod(shape[last + 1 :])
        features = math.prod(shape[first : last + 1])
        for begin, end in apart:  # one at most
            groups, between = math.prod(shape[begin : end + 1]), math.prod(shape[end + 1 : first])
            return View(before, groups, between, features, after, grouped_parameters=True)
        if self.virtual_batch_size is None:
            return View(before, 1, 1, features, after)
        return View(before, self.split(shape)[1], math.prod(shape[1:first]), features, after)

    def least(self, shape: Sequence[Any]) -> Any:
        """Count the values of each feature in the smallest virtual batch of inputs of a shape, or in the batch."""
        rows, *rest = self.split(shape)
        padded = self.padding(shape) > 0  # the last row is not of every group
        return self.count((rows - 1 if padded else rows, *rest))

    def count(self, shape: Sequence[Any]) -> Any:
        """Count the values of each feature in a view of this shape, or in a whole batch."""
        count = 1
        for axis in self.reduced_axes:
            count = count * shape[axis]
        return count


def counted_axes(axis: int | tuple[int, ...], shape: Sequence[int | None]) -> tuple[int, ...]:
    """Count feature axes from the start, ascending.

    Raises:
        ValueError: If one is out of range, or named twice.
    """
    rank = len(shape)
    given = axis if isinstance(axis, tuple) else (axis,)
    if not all(-rank <= feature_axis < rank for feature_axis in given):
        raise ValueError(
            f"axis must be in [{-rank}, {rank}) for inputs of rank {rank}; received axis={axis} "
            f"and inputs of shape {tuple(shape)}."
        )
    axes = tuple(sorted(feature_axis % rank for feature_axis in given))
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"axis must name each axis once; received axis={axis}, which is {list(axes)} for inputs of rank {rank}."
        )
    return axes


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
    >>> plan((10, 3), -1, 4).split((10, 3))  # virtual batches of 4, 3 and 3 samples
    (4, 3, 3)
    """
    axes = counted_axes(axis, shape)
    if virtual_batch_size is not None and 0 in axes:
        raise ValueError(
            f"axis cannot include the batch axis 0 with virtual_batch_size={virtual_batch_size}; received axis={axis}."
        )
    features = []
    for feature_axis in axes:
        size = shape[feature_axis]
        if size is None:
            raise ValueError(
                f"inputs must have a known size on every feature axis; received axis={axis} and shape {shape}."
            )
        features.append((feature_axis, size))
    return Geometry.of(len(shape), tuple(features), virtual_batch_size)
