"""What a layer remembers: the names of its variables in creation order, and checkpoints of both generations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .algebra import Array
from .options import Options

__all__ = ["OLDER_RENORM", "PARAMETERS", "RENORM", "VARIABLES", "averages", "modernize", "names"]

PARAMETERS = ("gamma", "beta")
"""What is trained; everything else are averages, which training moves."""

RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
"""What a renorm layer keeps beside the moving statistics."""

VARIABLES = (*PARAMETERS, "moving_mean", "moving_variance", *RENORM)
"""Everything that a layer may have, in the order in which it is made."""

OLDER_RENORM = (
    "moving_mean",
    "moving_variance",
    "renorm_mean",
    "renorm_mean_weight",
    "renorm_stddev",
    "renorm_stddev_weight",
)
"""The statistics of a renorm layer of the older generation."""


def names(options: Options) -> tuple[str, ...]:
    """Name the variables of a layer, in the order in which they are made.

    >>> names(Options(scale=False, renorm=True))
    ('beta', 'moving_mean', 'moving_variance', 'moving_stddev', 'renorm_mean', 'renorm_stddev')
    """
    absent = ("gamma",) * (not options.scale) + ("beta",) * (not options.center) + RENORM * (not options.renorm)
    return tuple(name for name in VARIABLES if name not in absent)


def averages(variables: Mapping[str, Array]) -> dict[str, Array]:
    """What of the variables training moves."""
    return {name: value for name, value in variables.items() if name not in PARAMETERS}


class _Roots(Protocol):
    def sqrt(self, x: Array, /) -> Array: ...
    def maximum(self, x1: Array, x2: Array, /) -> Array: ...


def modernize(xp: _Roots, variables: Mapping[str, Array], epsilon: Any) -> dict[str, Array]:
    """Turn the variables of a renorm layer of the older generation into today's; today's pass through.

    In the first versions of the original the averages of renorm began at zero and were de-biased by the sum of their
    weights, kept beside them in ``renorm_mean_weight`` and ``renorm_stddev_weight``, and there was no
    ``moving_stddev``. Averages without any weight yet begin where today's layer begins: at the moving statistics.

    Raises:
        KeyError: If one of the variables that this takes is missing.
    """
    present = dict(variables)
    if "renorm_mean_weight" not in present and "renorm_stddev_weight" not in present:
        return present
    missing = [name for name in OLDER_RENORM if name not in present]
    if missing:
        raise KeyError(f"variables must hold all of an older renorm layer, {list(OLDER_RENORM)}; missing {missing}.")
    sigma = xp.sqrt(xp.maximum(present["moving_variance"], 0) + epsilon)
    present["moving_stddev"] = sigma
    for name, initial in (("renorm_mean", present["moving_mean"]), ("renorm_stddev", sigma)):
        weight = present.pop(f"{name}_weight")
        present[name] = present[name] / weight if weight > 0 else initial
    return present
