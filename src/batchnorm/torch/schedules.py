"""How the limits of renorm's correction widen in training."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from batchnorm.core.options import received

__all__ = ["ClippingSchedule"]


@dataclasses.dataclass(frozen=True)
class ClippingSchedule:
    """Limits of renorm's correction by the number of batches seen, as in the paper.

    Until `start` there is no correction, r = 1 and d = 0. Then r's upper limit rises linearly from 1 to `rmax` at batch
    `rmax_end`, and d's from 0 to `dmax` at batch `dmax_end`; then they stay. r's lower limit is 1/rmax, d's −dmax.

    Source: Ioffe, Batch Renormalization (2017), section 4.

    Args:
        start: Batches before the limits begin to widen.
        rmax: Last limit of r, at least 1.
        rmax_end: Batch at which it is reached, not before `start`.
        dmax: Last limit of d, at least 0.
        dmax_end: Batch at which it is reached, not before `start`.

    >>> schedule = ClippingSchedule()
    >>> schedule(0)
    {'rmin': 1.0, 'rmax': 1.0, 'dmax': 0.0}
    >>> schedule(25_000)["dmax"], schedule(10**6)["rmax"]
    (5.0, 3.0)
    """

    start: int = 5_000
    rmax: float = 3.0
    rmax_end: int = 40_000
    dmax: float = 5.0
    dmax_end: int = 25_000

    def __post_init__(self) -> None:
        for name, least, allowed in (
            ("start", 0, "at least 0"),
            ("rmax", 1, "at least 1"),
            ("rmax_end", self.start, "at least start"),
            ("dmax", 0, "at least 0"),
            ("dmax_end", self.start, "at least start"),
        ):
            value = getattr(self, name)
            if not (least <= value < math.inf):
                raise ValueError(f"{name} must be finite and {allowed}; {received(value)}.")

    def __call__(self, num_batches_tracked: int | Tensor) -> dict[str, float | Tensor]:
        """Give the limits after a number of batches, as tensors if it is one."""
        upper = 1 + (self.rmax - 1) * self._part(num_batches_tracked, self.rmax_end)
        return {"rmin": 1 / upper, "rmax": upper, "dmax": self.dmax * self._part(num_batches_tracked, self.dmax_end)}

    def _part(self, batches: int | Tensor, end: int) -> float | Tensor:
        """How much of the way from `start` to `end` is behind, from 0 to 1."""
        way = max(end - self.start, 1)
        if torch.is_tensor(batches):
            kept = torch.float32 if batches.device.type == "mps" else torch.float64  # MPS has no float64
            return ((batches - self.start).to(kept) / way).clamp(0, 1)
        return min(max((batches - self.start) / way, 0.0), 1.0)
