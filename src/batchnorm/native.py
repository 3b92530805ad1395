"""The native kernels, where they could be built: how many threads they use, and what they run on."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["KERNEL", "instruction_set", "library", "num_threads", "set_num_threads"]

KERNEL = "native"
"""The name of these kernels, where a layer says which one served."""


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("batchnorm._native")
    except ModuleNotFoundError:
        return None


library = _load()
"""The extension module, or None where it was not built."""


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
