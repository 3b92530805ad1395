"""What is wrong with a call, in PyTorch's words where it has them; all of it is asked before a statistic moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from batchnorm.core.geometry import REFUSED_WEIGHTS, Geometry
from batchnorm.core.options import Options, received
from batchnorm.core.options import pair as checked_pair

from . import layout

__all__ = [
    "STATISTICS",
    "adjustment",
    "engine",
    "is_torch_s_mix",
    "misfit",
    "moved",
    "process_group",
    "training_plan",
    "weights",
]

Pair = tuple[Tensor, Tensor]
STATISTICS = ("running_mean", "running_var", "renorm_mean", "renorm_stddev")
SHORT = (torch.float16, torch.bfloat16)


def is_torch_s_mix(x: Tensor, values: Iterable[Tensor | None]) -> bool:
    """Tell whether PyTorch's operator takes these types: all the same, or a short input and the rest float32."""
    if not x.is_floating_point():
        return False
    types = {value.dtype for value in values if value is not None}
    return not types or types == {x.dtype} or (types == {torch.float32} and x.dtype in SHORT)


def training_plan(
    x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None, eps: float, single: bool
) -> tuple[Geometry, int]:
    """Work out the geometry of a training step, and count the values of each feature in the smallest virtual batch.

    Where a `single` one is no error here, it may be one of several of all replicas, or what a mask left.
    """
    plan, count = layout.training_plan(x, axes, virtual_batch_size)
    if count == 1 and not single:
        virtual = "" if virtual_batch_size is None else f" and virtual_batch_size={virtual_batch_size}"
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}{virtual}")
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    return plan, count


def process_group(group: Any, synchronized: bool) -> None:
    """Raise unless a process group is one that this process is in, and is wanted."""
    if group is None:
        return
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be None or a torch.distributed.ProcessGroup that this process is a member of; "
            f"{received(group)}."
        )
    if not synchronized:
        raise ValueError(f"process_group must be None without synchronized=True; {received(group)}.")


def engine(x: Tensor, backends: str) -> None:
    """Raise unless a process group can send from the input's device; "cpu:gloo,cuda:nccl" are such backends."""
    devices = [backend.partition(":")[0] for backend in backends.split(",")]
    if x.device.type not in devices:
        raise ValueError(
            f"synchronized=True needs a process group with a backend for the input's device, {x.device}; received one "
            f"for {backends}."
        )


def misfit(x: Tensor, axes: tuple[int, ...], values: dict[str, Tensor | None]) -> Exception | None:
    """Say what does not fit: the input's type, or the place, the type or the shape of a statistic or a parameter."""
    if not x.is_floating_point():
        return TypeError(f"input must be of a floating-point type; received {x.dtype}.")
    shape, device = x.shape, x.device
    expected = torch.Size([shape[axis] for axis in axes])
    for name, value in values.items():
        if value is None:
            continue
        if value.device != device:
            return ValueError(f"{name} must be on the input's device, {device}; received one on {value.device}.")
        if value.shape != expected:
            return ValueError(
                f"{name} must have shape {tuple(expected)} for an input of shape {tuple(shape)} with feature axes "
                f"{axes}; received shape {tuple(value.shape)}."
            )
        if value.dtype != x.dtype and not (value.dtype == torch.float32 and x.dtype in SHORT):
            allowed = f"{x.dtype} or {torch.float32}" if x.dtype in SHORT else f"{x.dtype}"
            return TypeError(f"{name} must be of {allowed} for an input of {x.dtype}; received {value.dtype}.")
    return None


def moved(averages: dict[str, Tensor | None]) -> None:
    """Raise if one of these cannot be changed in its place, before another is."""
    for name, value in averages.items():
        if value is None:
            continue
        if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(
                f"{name} must have memory for each of its values, as it is moved; received an expanded tensor of shape "
                f"{tuple(value.shape)} and strides {value.stride()}."
            )
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name} must not be moved outside of inference mode; it was made within.")


def adjustment(options: Options, x: Tensor, plan: Geometry) -> tuple[Pair, bool]:
    """Ask for the adjustment of a batch, and tell whether it has one value for each feature."""
    assert options.adjustment is not None
    first, second = (
        value
        if torch.is_tensor(value)
        else torch.as_tensor(value, device=x.device, dtype=layout.accumulation_dtype(x.dtype))
        for value in checked_pair(options.adjustment(x.shape))
    )
    for value in (first, second):
        if value.device != x.device:
            raise ValueError(
                f"adjustment must return tensors on the input's device, {x.device}; received one on {value.device}."
            )
    return (first, second), plan.check_adjustment((first.shape, second.shape), x.shape)


def weights(mask: Any, x: Tensor, plan: Geometry) -> Tensor:
    """A mask as it broadcasts against an input."""
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"mask must be a tensor of booleans or real numbers; received {_described(mask)}.")
    if mask.requires_grad:
        raise ValueError("mask must be a constant; received a tensor that requires a gradient.")
    if mask.device != x.device:
        raise ValueError(f"mask must be on the input's device, {x.device}; received one on {mask.device}.")
    shape = plan.mask_shape(mask.shape, x.shape)
    # Looking at values would break a graph, and make a processor wait for another device.
    if (
        mask.dtype != torch.bool
        and mask.is_cpu
        and layout.is_eager()
        and not bool(((mask >= 0) & (mask < torch.inf)).all())
    ):
        raise ValueError(REFUSED_WEIGHTS)
    return mask.reshape(shape)


def _described(value: Any) -> str:
    return f"one of {value.dtype}" if isinstance(value, Tensor) else f"{value!r} of type {type(value).__name__}"
