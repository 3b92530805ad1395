"""The CPU kernels on tensors, by their addresses: exchanging arrays takes longer than normalizing a small batch.

Whatever these addresses belong to has been checked before, by `can_read` or `check`: it is of a type that the kernels
know, on the CPU, and of as many elements as it is to have.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import cpu
from batchnorm.core.geometry import Geometry, View
from batchnorm.core.options import Clipping

from . import layout
from .layout import accumulation_dtype

__all__ = [
    "KERNEL",
    "Averages",
    "Replica",
    "Static",
    "are_plain",
    "backward",
    "can_read",
    "check",
    "forward",
    "is_plain",
    "limits",
    "move",
    "serves",
    "totals",
]

KERNEL = cpu.KERNEL
CPU = torch.device("cpu")  # named, as a default device may be another; x.device takes a microsecond longer
TYPES = {getattr(torch, name) for name in cpu.TYPES}
Limits = tuple[float, float, float]
UNLIMITED = Clipping().limits


def _share_threads() -> None:
    """Let the kernels use PyTorch's own threads, which spin while they wait, and would take the processors from others.

    Where its OpenMP is not found, they keep to theirs.
    """
    folder = pathlib.Path(torch.__file__).parent
    for path in sorted({*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")}):
        try:
            found = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):  # not the one that is loaded
            continue
        if cpu.library is not None:
            cpu.library.use_openmp(ctypes.cast(found, ctypes.c_void_p).value)
        return


_share_threads()


class Static(NamedTuple):
    """The arguments of a training step that are not tensors."""

    epsilon: float
    axes: tuple[int, ...]
    virtual_batch_size: int | None
    zeroed: bool = True
    """Whether what weighs nothing is 0 in the output, and its gradient not looked at."""


class Averages(NamedTuple):
    """What a training step moves besides renorm's own averages, the weights of the new values, and what is left out.

    The variance moves to the unbiased one; with renorm to the biased one.
    """

    running: tuple[Tensor | None, Tensor | None]
    momentum: float
    renorm_momentum: float
    skip_nonfinite: bool


def serves(x: Tensor, plan: Geometry, traced: bool) -> bool:
    """Tell whether the kernels can compute a training step. They are for CPUs, and know no subclasses of tensors."""
    return (
        cpu.library is not None
        and x.is_cpu
        and x.dtype in TYPES
        and x.layout is torch.strided
        and (len(plan.features) == 1 or plan.collapses(x.shape))
        and (traced or is_plain(x))
    )


def can_read(x: Tensor, shape: tuple[int, ...], values: Sequence[Tensor | None]) -> bool:
    """Tell whether the kernels can read and move parameters and statistics of this shape where they are."""
    dtype = accumulation_dtype(x.dtype)
    for value in values:
        if value is not None and not (
            value.dtype == dtype and value.shape == shape and value.is_cpu and value.is_contiguous() and is_plain(value)
        ):
            return False
    return x.is_cpu and x.dtype in TYPES


def check(x: Tensor, view: View, **values: Tensor | None) -> None:
    """Raise unless tensors are what the kernels read beside an input that is seen in a way; for who calls by hand."""
    sizes = {
        "dy": view.rows * view.features * view.inner,
        "moments": 2 * view.virtual_batches * view.parameters,
        "counts": 2 * view.virtual_batches,
    }
    for name, value in values.items():
        if value is None:
            continue
        size = sizes.get(name, (2 if name == "correction" else 1) * view.parameters)
        if not value.is_cpu:
            raise ValueError(f"{name} must be on the CPU; received one on {value.device}.")
        dtype = {
            "dy": x.dtype,
            "moments": accumulation_dtype(x.dtype),
            "correction": accumulation_dtype(x.dtype),
            "counts": accumulation_dtype(x.dtype),
        }.get(name)
        if dtype is not None and value.dtype not in ((dtype, torch.float64) if name == "moments" else (dtype,)):
            raise TypeError(f"{name} must be of {dtype}; received {value.dtype}.")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point type; received {value.dtype}.")
        if value.numel() != size or (name == "dy" and value.shape != x.shape):
            raise ValueError(f"{name} must have {size} elements; received shape {tuple(value.shape)}.")


def is_plain(x: Tensor) -> bool:
    """Tell whether memory holds what a tensor says: of no subclass, which may be anything, no view of negatives."""
    return (type(x) is Tensor or type(x) is torch.nn.Parameter) and not x.is_neg()


def are_plain(values: Sequence[Tensor | None]) -> bool:
    """Tell whether all that are there are plain."""
    return all(value is None or is_plain(value) for value in values)


def forward(
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    renorm: tuple[Tensor, Tensor] | None,
    weights: Tensor | None,
    limits: Limits | None,
    static: Static,
    averages: Averages | None = None,
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """Compute the output, the moments [2][groups][parameters], and r and d in one tensor; move the averages.

    Where groups may differ in what counts in them, also Σw and Σw², [2][groups]. With the `totals` of all replicas the
    moments and counts are theirs. The last result is whether an average has moved, if any was to.
    """
    dtype = accumulation_dtype(x.dtype)
    x, view, kernel = layout.kernel(x, static.axes, static.virtual_batch_size, static.epsilon)
    y = torch.empty_like(x)
    optional, weights = _weighed(weights, dtype, static)
    counts = correction = None
    moments = torch.empty((2, view.virtual_batches, view.parameters), dtype=torch.float64, device=CPU)
    if weights is not None or static.virtual_batch_size is not None or totals is not None:
        counts = torch.empty((2, view.virtual_batches), dtype=dtype, device=CPU)
    if totals is not None:
        optional["totals"] = _at("totals", totals)
    mean, variance = _halves(moments)
    factor, offset = _dense(factor, dtype), _dense(offset, dtype)  # which keeps them until the call has ended
    if counts is not None:
        optional["count"], optional["square_count"] = _halves(counts)
    if renorm is not None:
        correction = torch.empty((2, view.parameters), dtype=dtype, device=CPU)
        r, d = _halves(correction)
        renorm_mean, renorm_stddev = _dense(renorm[0], dtype), _dense(renorm[1], dtype)
        rmin, rmax, dmax = limits or UNLIMITED
        optional |= {
            "renorm_mean": _at("renorm_mean", renorm_mean), "renorm_stddev": _at("renorm_stddev", renorm_stddev),
            "r": r, "d": d, "rmin": rmin, "rmax": rmax, "dmax": dmax,
        }  # fmt: skip
    if averages is not None:
        (running_mean, running_variance), momentum, renorm_momentum, skip_nonfinite = averages
        optional |= {
            "running_mean": _at("running_mean", running_mean), "running_variance": _at("running_var", running_variance),
            "momentum": momentum, "renorm_momentum": renorm_momentum,
            "unbiased": True, "skip_nonfinite": skip_nonfinite,
        }  # fmt: skip
    moved = kernel.forward_at(
        threads=torch.get_num_threads(), x=_at("x", x), y=_at("y", y), mean=mean, variance=variance,
        factor=_at("factor", factor), offset=_at("offset", offset), **optional,
    )  # fmt: skip
    return y, moments, correction, counts, moved


def move(
    x: Tensor,
    moments: Tensor,
    counts: Tensor | None,
    renorm: tuple[Tensor, ...] | None,
    static: Static,
    averages: Averages,
) -> bool:
    """Move the averages as `forward` does with them, but after it: where it was not certain yet that it succeeds."""
    kernel = layout.kernel(x, static.axes, static.virtual_batch_size, static.epsilon)[2]
    running, momentum, renorm_momentum, skip_nonfinite = averages
    names = ("running_mean", "running_variance", "renorm_mean", "renorm_stddev")
    given = dict(zip(names, (*running, *(renorm or ())), strict=False))
    if counts is not None:
        given |= {"count": counts[0], "square_count": counts[1]}
    moved: bool = kernel.move_averages(
        mean=moments[0].numpy(), variance=moments[1].numpy(),
        **{name: value.detach().numpy() for name, value in given.items() if value is not None},
        momentum=momentum, unbiased=True, skip_nonfinite=skip_nonfinite, renorm_momentum=renorm_momentum,
    )  # fmt: skip
    return moved


def backward(
    dy: Tensor,
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    moments: Tensor,
    correction: Tensor | None,
    weights: Tensor | None,
    counts: Tensor | None,
    static: Static,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of x, and of factor and offset where these are there, in one row each."""
    dtype = accumulation_dtype(x.dtype)
    x, view, kernel = layout.kernel(x, static.axes, static.virtual_batch_size, static.epsilon)
    dy, dx = _beside(dy, x), torch.empty_like(x)
    dfactor = None if factor is None else torch.empty(view.parameters, dtype=dtype, device=CPU)
    doffset = None if offset is None else torch.empty(view.parameters, dtype=dtype, device=CPU)
    factor = _dense(factor, dtype)
    mean, variance = _halves(moments)
    r, d = _halves(correction)
    optional, weights = _weighed(weights, dtype, static)
    if weights is not None:
        optional["count"] = _halves(counts)[0]
    kernel.backward_at(
        threads=torch.get_num_threads(), x=_at("x", x), dy=_at("dy", dy), dx=_at("dx", dx), mean=mean,
        variance=variance, factor=_at("factor", factor), r=r, d=d, dfactor=_at("dfactor", dfactor),
        doffset=_at("doffset", doffset), **optional,
    )  # fmt: skip
    return dx, dfactor, doffset


# ---- Around the sums over replicas.


def totals(x: Tensor, weights: Tensor | None, static: Static) -> Tensor:
    """Measure what replicas add up, as `algebra.totals` in float64."""
    x, view, kernel = layout.kernel(x, static.axes, None, static.epsilon)
    found = torch.empty(2 + 2 * view.parameters, dtype=torch.float64, device=CPU)
    optional, weights = _weighed(weights, accumulation_dtype(x.dtype), static)
    optional.pop("zeroed", None)
    kernel.totals_at(threads=torch.get_num_threads(), x=_at("x", x), totals=_at("totals", found), **optional)
    return found


class Replica(NamedTuple):
    """What a replica's gradient is of: its input, and the moments, counts, r and d that `forward` gave."""

    x: Tensor
    factor: Tensor | None
    moments: Tensor
    correction: Tensor | None
    weights: Tensor | None
    counts: Tensor
    static: Static

    def totals_gradient(self, dy: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute what replicas add up, the gradient of the totals, and the gradients of factor and offset here."""
        totals = torch.empty(2 + self.moments.numel(), dtype=torch.float64, device=CPU)
        dtype, parameters = accumulation_dtype(self.x.dtype), self.moments.numel() // 2
        dfactor, doffset = (torch.empty(parameters, dtype=dtype, device=CPU) if wants else None for wants in wanted)
        self._call("totals_gradient_at", dy, totals, dfactor=_at("dfactor", dfactor), doffset=_at("doffset", doffset))
        return totals, dfactor, doffset

    def gradient(self, dy: Tensor, totals: Tensor) -> Tensor:
        """Compute the gradient of x from the sum of those of the totals."""
        dx = torch.empty_like(layout.kernel(self.x, self.static.axes, None, self.static.epsilon)[0])
        self._call("totals_combine_at", dy, totals, dx=_at("dx", dx))
        return dx

    def _call(self, method: str, dy: Tensor, totals: Tensor, **others: int) -> None:
        dtype = accumulation_dtype(self.x.dtype)
        x, _, kernel = layout.kernel(self.x, self.static.axes, None, self.static.epsilon)
        dy, factor = _beside(dy, x), _dense(self.factor, dtype)
        mean, variance = _halves(self.moments)
        r, d = _halves(self.correction)
        optional, weights = _weighed(self.weights, dtype, self.static)
        getattr(kernel, method)(
            threads=torch.get_num_threads(), x=_at("x", x), dy=_at("dy", dy), mean=mean, variance=variance,
            count=_at("counts", self.counts), factor=_at("factor", factor), r=r, d=d, totals=_at("totals", totals),
            **others, **optional,
        )  # fmt: skip
        del weights  # kept until here


def _beside(dy: Tensor, x: Tensor) -> Tensor:
    """A gradient that lies in memory as x does."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


def limits(clipping: Clipping) -> Limits:
    """Read limits, of which some may be tensors."""
    rmin, rmax, dmax = (float(limit) for limit in clipping.limits)
    return rmin, rmax, dmax


def _dense(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return value if value is None or (value.dtype == dtype and value.is_contiguous()) else value.to(dtype).contiguous()


def _weighed(weights: Tensor | None, dtype: torch.dtype, static: Static) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments that say what counts, and the tensor that keeps their memory: booleans, or numbers of a type."""
    if weights is None or not weights.numel():
        return {}, None
    if weights.dtype == torch.bool:
        weights, name = weights.contiguous(), "mask"
    else:
        weights, name = weights.to(dtype).contiguous(), "weights"
    return {name: _at(name, weights), "zeroed": static.zeroed}, weights


def _at(name: str, value: Tensor | None) -> int:
    if value is None:
        return 0
    address = value.data_ptr()
    if not address and value.numel():  # which would count as an absent one
        raise RuntimeError(f"{name} has no memory; received a tensor of shape {tuple(value.shape)} without storage.")
    return address


def _halves(value: Tensor | None) -> tuple[int, int]:
    """Addresses of both halves of a tensor."""
    if value is None:
        return 0, 0
    first = value.data_ptr()
    return first, first + value.nbytes // 2
