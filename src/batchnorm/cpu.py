"""The CPU kernels, where they could be built: for which arrays, with how many threads, and what they run on."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from .core.geometry import View

__all__ = ["KERNEL", "TYPES", "instruction_set", "kernel", "library", "num_threads", "set_num_threads"]

KERNEL = "cpu"
"""The name of these kernels, where a layer says which one served."""
TYPES = ("float32", "float64", "float16", "bfloat16")
"""The types of arrays that they know."""


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("batchnorm._cpu")
    except ModuleNotFoundError:
        return None


library = _load()
"""The extension module, or None where it was not built."""


@functools.lru_cache(maxsize=1024)
def kernel(view: View, dtype: str, epsilon: float) -> Any:
    """The kernels for arrays that are seen in one way, of one type, with one epsilon."""
    assert library is not None
    return library.Kernel(**view._asdict(), dtype=dtype, epsilon=epsilon)


def instruction_set() -> str | None:
    """Name the instructions that the kernels use on this processor; None where there are no kernels.

    The environment variable ``BATCHNORM_ISA`` (``avx512bf16``, ``avx512``, ``avx2`` or ``baseline``) asks for
    lesser ones.
    """
    return None if library is None else str(library.instruction_set())


def num_threads() -> int:
    """How many threads a call may use: what was set last, else ``OMP_NUM_THREADS``, else the number of processors."""
    return 1 if library is None else int(library.num_threads())


def set_num_threads(threads: int) -> None:
    """Set how many threads a call may use, the calling one among them; more than 1,024 count as 1,024.

    Raises:
        ValueError: If it is less than 1.
        TypeError: If it is not an int.

    >>> before = num_threads()
    >>> set_num_threads(1)
    >>> num_threads()
    1
    >>> set_num_threads(before)
    """
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int that is at least 1; received {threads!r}.")
    if threads < 1:
        raise ValueError(f"threads must be an int that is at least 1; received {threads!r}.")
    if library is not None:
        library.set_num_threads(threads)
