"""The CPU kernels, where they could be built: for which arrays, with how many threads, and what they run on."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any

from .core.geometry import View

__all__ = [
    "KERNEL",
    "TYPES",
    "binding",
    "instruction_set",
    "kernel",
    "library",
    "num_threads",
    "set_num_threads",
    "share_threads",
]

KERNEL = "cpu"
"""The name of these kernels, where a layer says which one served."""
TYPES = ("float32", "float64", "float16", "bfloat16")
"""The types of arrays that they know."""
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")
MOST = 1024
"""The number of threads that more count as."""


def _check_environment() -> None:
    asked = os.environ.get("BATCHNORM_ISA")
    if asked and asked not in INSTRUCTION_SETS:
        *most, last = INSTRUCTION_SETS
        warnings.warn(
            f"The environment variable BATCHNORM_ISA must be {', '.join(most)} or {last}; received {asked!r}, "
            "which counts as not set.",
            stacklevel=1,
        )


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("batchnorm._cpu")
    except ModuleNotFoundError:
        return None


_check_environment()
library = _load()
"""The extension module, or None where it was not built."""


@functools.lru_cache(maxsize=1024)
def kernel(view: View, dtype: str, epsilon: float) -> Any:
    """The kernels for arrays that are seen in one way, of one type, with one epsilon."""
    assert library is not None
    return library.Kernel(**view._asdict(), dtype=dtype, epsilon=epsilon)


def binding(to: str) -> str | None:
    """Find the library that binds the kernels to ``"tensorflow"`` or ``"xla"``; None where it was not built."""
    found = importlib.util.find_spec(f"batchnorm._{to}_ops")  # no module, but it lies where modules do
    return None if found is None else found.origin


def instruction_set() -> str | None:
    """Name the instructions that the kernels use on this processor; None where there are no kernels.

    The environment variable ``BATCHNORM_ISA`` (``avx512bf16``, ``avx512``, ``avx2`` or ``baseline``) asks for
    lesser ones.
    """
    return None if library is None else str(library.instruction_set())


# ---- Threads. Each library has a pool of its own, and all follow one number.

_followers: list[ctypes.CDLL] = []
_asked: int | None = None


def num_threads() -> int:
    """How many threads a call on NumPy, TensorFlow or JAX may use.

    What was set last, else ``OMP_NUM_THREADS``, else the number of processors that the process may use: by its
    affinity, which the sets of containers narrow, and by the quota of its control group, rounded up.
    """
    if library is not None:
        return int(library.num_threads())
    return int(_followers[0].batchnorm_num_threads()) if _followers else 1


def set_num_threads(threads: int) -> None:
    """Set how many threads a call on NumPy, TensorFlow or JAX may use, the calling one among them.

    More than 1,024 count as 1,024. Calls on PyTorch use as many as ``torch.set_num_threads`` says.

    Raises:
        ValueError: If it is less than 1.
        TypeError: If it is not an int.

    >>> before = num_threads()
    >>> set_num_threads(1)
    >>> num_threads()
    1
    >>> set_num_threads(before)
    """
    global _asked
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int that is at least 1; received {threads!r}.")
    if threads < 1:
        raise ValueError(f"threads must be an int that is at least 1; received {threads!r}.")
    _asked = min(threads, MOST)
    if library is not None:
        library.set_num_threads(_asked)
    for follower in _followers:
        follower.batchnorm_set_num_threads(_asked)


def share_threads(path: str) -> None:
    """Let a library with a pool of its own, which is loaded already, follow `set_num_threads`."""
    follower = ctypes.CDLL(path)
    if _asked is not None:
        follower.batchnorm_set_num_threads(_asked)
    _followers.append(follower)
