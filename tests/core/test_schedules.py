"""How the limits of renorm's correction widen: what is refused. What they are is in the doctests."""

from __future__ import annotations

import math
from typing import Any

import pytest

from batchnorm.core.schedules import ClippingSchedule


@pytest.mark.parametrize("name", ["start", "rmax", "rmax_end", "dmax", "dmax_end"])
@pytest.mark.parametrize(
    ("value", "error"),
    [("3", TypeError), (None, TypeError), (True, TypeError), (-1, ValueError), (math.nan, ValueError)],
)
def test_a_bad_argument_of_a_schedule_is_refused_by_name_and_value(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{name} must be") as caught:
        ClippingSchedule(**{name: value})
    assert repr(value) in str(caught.value)
