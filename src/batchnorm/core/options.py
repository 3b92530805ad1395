"""What was asked for: every option of the layer, checked once, before anything is made or changed."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Clipping", "Options", "flag", "pair", "received", "scalar", "sizes", "small_number", "weight"]


def received(value: object) -> str:
    """Say what came, for the end of an error message."""
    return f"received {value!r} of type {type(value).__name__}"


def _is_scalar_array(value: object) -> bool:
    """Tell whether `value` is a real scalar of some framework, whose value may not be known yet."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        return False
    # NumPy's kinds: floating, signed, unsigned; other frameworks have but names.
    name = str(value.dtype)
    if getattr(value.dtype, "kind", "f") not in "fiu" or any(kind in name for kind in ("bool", "string", "complex")):
        return False
    try:
        return len(value.shape) == 0
    except (TypeError, ValueError):  # a symbolic tensor of unknown rank
        return True


def scalar(name: str, value: Any, low: float, high: float, allowed: str) -> Any:
    """Check a real number in [low, high]; a framework's scalar is taken as it is, for its value may come later."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not low <= float(value) <= high:  # also refuses NaN
            raise ValueError(f"{name} must be {allowed}; {received(value)}.")
        return value
    if _is_scalar_array(value):
        return value
    raise TypeError(f"{name} must be {allowed}, as a number or a scalar tensor; {received(value)}.")


def weight(name: str, value: Any) -> Any:
    """Check the weight of an average's old or new value."""
    return scalar(name, value, 0, 1, "in [0, 1]")


def small_number(name: str, value: Any) -> Any:
    """Check what is added to a variance."""
    return scalar(name, value, 0, sys.float_info.max, "finite and at least 0")


def flag(name: str, value: Any) -> bool:
    """Check a switch. 0, 1 and NumPy's booleans are as good as Python's."""
    if isinstance(value, bool):  # at once, for calls ask too
        return value
    # NumPy's booleans are not among the numbers.
    if (isinstance(value, numbers.Integral) or type(value).__name__ in ("bool_", "bool")) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False; {received(value)}.")


def pair(adjusted: Any) -> tuple[Any, Any]:
    """Check an adjustment, or what the function has returned that makes one."""
    if not isinstance(adjusted, (list, tuple)) or len(adjusted) != 2:
        raise ValueError(f"adjustment must be or return a pair (scale, bias); {received(adjusted)}.")
    scale, bias = adjusted
    for value in (scale, bias):  # arrays are told from other things where they are made
        if value is None or isinstance(value, (str, bytes, complex)):
            raise TypeError(f"adjustment must be or return a pair of arrays or numbers; {received(value)}.")
    return scale, bias


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """Check the size of a feature axis, or of each of several."""
    allowed = "an int that is at least 0, or a list or tuple of such ints"
    found = tuple(_integer(name, size, allowed) for size in (value if isinstance(value, (list, tuple)) else (value,)))
    if min(found, default=-1) < 0:
        raise ValueError(f"{name} must be {allowed}; {received(value)}.")
    return found


def _integer(name: str, value: Any, allowed: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}; {received(value)}.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}; {received(value)}.") from None


def _axis(axis: Any) -> int | tuple[int, ...]:
    allowed = "an int or a list or tuple of distinct ints"
    if isinstance(axis, (list, tuple)):
        axes = tuple(_integer("axis", feature_axis, allowed) for feature_axis in axis)
        if not axes or len(set(axes)) != len(axes):
            raise ValueError(f"axis must be {allowed}, at least one; {received(axis)}.")
        return axes
    return _integer("axis", axis, allowed)


@dataclasses.dataclass(frozen=True)
class Clipping:
    """Limits of batch renormalization's correction: r in [rmin, rmax], d in [-dmax, dmax]; None is no limit.

    Each may be a number, or a scalar tensor or variable of a framework (a schedule).
    """

    rmin: Any = None
    rmax: Any = None
    dmax: Any = None

    @property
    def limits(self) -> tuple[Any, Any, Any]:
        """The three limits, infinite where there is none."""
        return (
            -math.inf if self.rmin is None else self.rmin,
            math.inf if self.rmax is None else self.rmax,
            math.inf if self.dmax is None else self.dmax,
        )

    @classmethod
    def of(cls, clipping: Mapping[str, Any] | Clipping | None) -> Clipping:
        """Check a mapping with any of the keys 'rmin', 'rmax' and 'dmax'."""
        if clipping is None:
            return cls()
        if isinstance(clipping, Clipping):
            return clipping
        allowed = "None or a dictionary with any of the keys 'rmin', 'rmax', 'dmax'"
        if not isinstance(clipping, Mapping):
            raise TypeError(f"renorm_clipping must be {allowed}; {received(clipping)}.")
        if set(clipping) - {"rmin", "rmax", "dmax"}:
            raise ValueError(f"renorm_clipping must be {allowed}; {received(dict(clipping))}.")
        limits = {
            key: scalar(
                f"renorm_clipping[{key!r}]",
                value,
                0 if key == "dmax" else -math.inf,
                math.inf,
                "at least 0" if key == "dmax" else "other than NaN",
            )
            for key, value in clipping.items()
            if value is not None
        }
        rmin, rmax = limits.get("rmin", 0), limits.get("rmax", math.inf)
        if isinstance(rmin, numbers.Real) and isinstance(rmax, numbers.Real) and rmin > rmax:
            raise ValueError(
                f"renorm_clipping must have rmin <= rmax (rmin is 0 and rmax infinite where missing); "
                f"{received(dict(clipping))}."
            )
        return cls(**limits)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one layer. Every framework's arguments end here.

    Attributes:
        axis: The feature axis, or several; negative ones count from the end.
        decay: Weight of the old value in the moving averages of inference, in [0, 1]. Users know it as ``momentum``.
        epsilon: Added to the variance, at least 0.
        center: Whether there is an offset beta.
        scale: Whether there is a scale gamma.
        renorm: Whether to correct by batch renormalization (Ioffe, 2017).
        renorm_clipping: Limits of that correction.
        renorm_decay: Weight of the old value in the averages of renorm. Users know it as ``renorm_momentum``.
        fused: True or None for the fastest kernel that can serve, False for the composed path.
        virtual_batch_size: Samples in each virtual batch, or None for the whole batch.
        adjustment: Function of the input's shape to a pair (scale, bias), applied in training before gamma and beta.
        cumulative: Whether the moving averages are plain averages of all batches, in the place of `decay`.
        skip_nonfinite: Whether features whose moments are not finite keep their averages in that step. Not with
            `cumulative`, as one number of batches cannot serve features that skip apart.
        synchronized: Whether the moments are those of all replicas' values together. Not with virtual batches, which
            are parts of what one replica has.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or for options that exclude each other.

    >>> Options(axis=[1, -1], virtual_batch_size=8).axis
    (1, -1)
    >>> Options(decay=1.5)
    Traceback (most recent call last):
    ValueError: momentum must be in [0, 1]; received 1.5 of type float.
    """

    axis: int | Sequence[int] = -1
    decay: Any = 0.99
    epsilon: Any = 1e-3
    center: bool = True
    scale: bool = True
    renorm: bool = False
    renorm_clipping: Clipping = dataclasses.field(default_factory=Clipping)
    renorm_decay: Any = 0.99
    fused: bool | None = None
    virtual_batch_size: int | None = None
    adjustment: Callable[[Any], tuple[Any, Any]] | None = None
    cumulative: bool = False
    skip_nonfinite: bool = False
    synchronized: bool = False

    @property
    def feature_axis(self) -> int | tuple[int, ...]:
        """`axis` as it was checked, and as `geometry` takes it."""
        return self.axis if isinstance(self.axis, int) else tuple(self.axis)

    @property
    def rate(self) -> Any:
        """Weight of the new value in the moving averages."""
        return 1 - self.decay

    @property
    def renorm_rate(self) -> Any:
        """Weight of the new value in the averages of renorm."""
        return 1 - self.renorm_decay

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("axis", _axis(self.axis))
        put("decay", weight("momentum", self.decay))
        put("epsilon", small_number("epsilon", self.epsilon))
        put("renorm_decay", weight("renorm_momentum", self.renorm_decay))
        for name in ("center", "scale", "renorm", "cumulative", "skip_nonfinite", "synchronized"):
            put(name, flag(name, getattr(self, name)))
        if self.fused is not None:
            put("fused", flag("fused", self.fused))
        put("renorm_clipping", Clipping.of(self.renorm_clipping))
        if self.skip_nonfinite and self.cumulative:
            raise ValueError("skip_nonfinite and momentum=None cannot be used together; received both.")
        if self.virtual_batch_size is not None:
            size = _integer("virtual_batch_size", self.virtual_batch_size, "None or an int that is at least 1")
            if size < 1:
                raise ValueError(f"virtual_batch_size must be None or at least 1; {received(size)}.")
            put("virtual_batch_size", size)
            if self.synchronized:
                raise ValueError(
                    f"synchronized and virtual_batch_size cannot be used together; received synchronized=True and "
                    f"virtual_batch_size={size}."
                )
        if self.adjustment is not None and not callable(self.adjustment):
            raise TypeError(
                f"adjustment must be None or a function from a shape to a pair (scale, bias); "
                f"{received(self.adjustment)}."
            )
        if self.adjustment is not None and self.virtual_batch_size is not None:
            raise ValueError(
                f"adjustment and virtual_batch_size cannot be used together; received "
                f"virtual_batch_size={self.virtual_batch_size} and adjustment={self.adjustment!r}."
            )
