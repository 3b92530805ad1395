"""How the limits of renorm's correction widen in training."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from .options import received

__all__ = ["ClippingSchedule"]


@dataclasses.dataclass(frozen=True)
class ClippingSchedule:
    """Limits of renorm's correction by the number of batches seen, as in the paper.

    Until `start` there is no correction, r = 1 and d = 0. Then r's upper limit rises linearly from 1 to `rmax` at batch
    `rmax_end`, and d's from 0 to `dmax` at batch `dmax_end`; then they stay. r's lower limit is 1/rmax, d's −dmax. An
    end that is `start` is a switch: all of the limit from that batch on.

    Source: Ioffe, Batch Renormalization (2017), section 4.

    Args:
        start: Batches before the limits begin to widen.
        rmax: Last limit of r, at least 1.
        rmax_end: Batch at which it is reached, not before `start`.
        dmax: Last limit of d, at least 0.
        dmax_end: Batch at which it is reached, not before `start`.

    Raises:
        TypeError: For an argument that is no number.
        ValueError: For one out of range.

    >>> schedule = ClippingSchedule()
    >>> schedule(0)
    {'rmin': 1.0, 'rmax': 1.0, 'dmax': 0.0}
    >>> schedule(25_000)["dmax"], schedule(10**6)["rmax"]
    (5.0, 3.0)
    >>> switch = ClippingSchedule(100_000, rmax_end=100_000, dmax_end=100_000)
    >>> switch(99_999)["dmax"], switch(100_000)["dmax"]
    (0.0, 5.0)
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
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a finite number that is {allowed}; {received(value)}.")
            if not (least <= float(value) < math.inf):
                raise ValueError(f"{name} must be finite and {allowed}; {received(value)}.")

    def __call__(self, batches: Any) -> dict[str, Any]:
        """Give the limits after a number of batches: of an int as floats, of a framework's integer as its arrays."""
        upper = 1 + (self.rmax - 1) * self._part(batches, self.rmax_end)
        return {"rmin": 1 / upper, "rmax": upper, "dmax": self.dmax * self._part(batches, self.dmax_end)}

    def _part(self, batches: Any, end: int) -> Any:
        """How much of the way from `start` to `end` is behind, from 0 to 1.

        |n − begin| − |n − end| + (end − begin) is twice n − begin between them, and stays beyond; every framework can
        say it, and in integers it is exact.
        """
        begin = min(self.start, end - 1)
        way = end - begin
        twice = abs(batches - begin) - abs(batches - end) + way
        if not getattr(twice, "is_mps", True):  # PyTorch divides integers in float32, and MPS has no float64
            twice = twice.double()
        return twice / (2 * way)
