"""The variables of a layer under the names of each framework: found among others, completed, and named anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from . import state
from .algebra import Array, Namespace, stddev

__all__ = ["DIALECTS", "Dialect", "Found", "complete", "find"]


class Dialect(NamedTuple):
    """How a family of frameworks names the variables of a layer.

    Attributes:
        names: From the names of `batchnorm.core.state` to theirs; ``steps`` is the number of batches.
        separator: What stands between a layer's name and that of its variable.
        always: Variables that a layer always has here, beside the moving statistics.
        renorm: Variables that it has beside those if it renormalizes.
    """

    names: dict[str, str]
    separator: str
    always: tuple[str, ...]
    renorm: tuple[str, ...]


_WEIGHTS = ("renorm_mean_weight", "renorm_stddev_weight")
_AVERAGES = {"renorm_mean": "renorm_mean", "renorm_stddev": "renorm_stddev"}
_FLAX = Dialect(
    {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var", "steps": "steps", **_AVERAGES},
    "/",
    (),
    ("renorm_mean", "renorm_stddev", "steps"),
)
DIALECTS = {
    "tensorflow": Dialect({name: name for name in (*state.VARIABLES, *_WEIGHTS, "steps")}, "/", (), state.RENORM),
    "torch": Dialect(
        {
            "gamma": "weight",
            "beta": "bias",
            "moving_mean": "running_mean",
            "moving_variance": "running_var",
            "steps": "num_batches_tracked",
            **_AVERAGES,
        },
        ".",
        ("steps",),
        ("renorm_mean", "renorm_stddev"),
    ),
    "flax": _FLAX,
    "linen": _FLAX,
}
"""TensorFlow 1, Keras and NumPy have one dialect; linen is that of Flax in two collections."""
_BATCH_RENORM = {"gamma": "scale", "beta": "bias", "moving_mean": "ra_mean", "moving_variance": "ra_var"}
_READ = [
    *((name, DIALECTS[name].names) for name in ("tensorflow", "torch", "flax")),
    ("torch", _BATCH_RENORM | {"steps": "steps"}),  # sb3-contrib's BatchRenorm
]
_COLLECTIONS = ("params", "batch_stats")
_LIMITS = ("r_max", "d_max")  # kept by sbx's BatchRenorm beside its statistics; they never change


class Found(NamedTuple):
    """A layer among the variables of a file.

    Attributes:
        dialect: Key of `DIALECTS`.
        keys: From the names of `batchnorm.core.state` to keys of the file.
        spare: Keys of the file that belong to the layer and have no counterpart.
    """

    dialect: str
    keys: dict[str, str]
    spare: tuple[str, ...] = ()


def find(keys: Iterable[str]) -> dict[str, Found]:
    """Find the layers among the variables of a file: whatever has a mean and a variance under names of one dialect.

    >>> find(["conv/kernel", "conv/bn/moving_mean", "conv/bn/moving_variance"])["conv/bn"].keys
    {'moving_mean': 'conv/bn/moving_mean', 'moving_variance': 'conv/bn/moving_variance'}
    """
    scopes: dict[str, dict[str, str]] = {}
    collected: set[str] = set()
    for key in keys:
        scope, _, name = key.rpartition("/" if "/" in key else ".")
        collection, _, rest = scope.partition("/")
        if collection in _COLLECTIONS:
            collected.add(scope := rest)
        scopes.setdefault(scope, {})[name] = key
    found = {}
    for scope, held in scopes.items():
        for dialect, names in _READ:
            if held.keys() >= {names["moving_mean"], names["moving_variance"]}:
                found[scope] = Found(
                    "linen" if dialect == "flax" and scope in collected else dialect,
                    {ours: held[theirs] for ours, theirs in names.items() if theirs in held},
                    tuple(held[name] for name in _LIMITS if dialect == "flax" and name in held),
                )
    return found


def complete(
    xp: Namespace, variables: Mapping[str, Array], wanted: Iterable[str], epsilon: Any | None
) -> dict[str, Array]:
    """Give a layer just the variables that are wanted, as they follow from those that it has.

    Averages of renorm that are missing begin where they begin in a new layer, at the moving statistics; a missing gamma
    is 1, a missing beta 0, and a missing number of steps 0.

    Args:
        xp: Array functions.
        variables: The variables of one layer, of either generation of renorm.
        wanted: Names, of `batchnorm.core.state` or ``steps``.
        epsilon: That of the layer. Needed where a standard deviation follows from a variance.

    Raises:
        ValueError: If epsilon is needed and None, or if gamma or beta is there and not wanted.
        KeyError: If variables of the older generation of renorm are incomplete.
    """
    wanted = tuple(wanted)
    lost = [name for name in state.PARAMETERS if name in variables and name not in wanted]
    if lost:
        raise ValueError(f"the target has no {' and no '.join(lost)}, and the source has")
    older = any(name in variables for name in _WEIGHTS)
    derived = ("moving_stddev", "renorm_stddev")
    if epsilon is None and (
        any(name in wanted and name not in variables for name in derived)
        or (older and any(name in wanted for name in state.RENORM))
    ):
        raise ValueError("epsilon must be given, for standard deviations follow from variances by it")
    present = state.modernize(xp, variables, epsilon) if older and epsilon is not None else dict(variables)
    mean, variance = present["moving_mean"], present["moving_variance"]
    rules: dict[str, Callable[[], Any]] = {
        "gamma": lambda: xp.ones_like(mean),
        "beta": lambda: mean - mean,
        "moving_stddev": lambda: stddev(xp, variance, epsilon),
        "renorm_mean": lambda: mean + 0,  # an array of its own, for frameworks that give buffers away
        "renorm_stddev": lambda: stddev(xp, variance, epsilon),
        "steps": lambda: 0,
    }
    return {name: present[name] if name in present else rules[name]() for name in wanted}
