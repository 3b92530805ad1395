"""What the C library does with the memory of arrays that are gone: keep it for the next, or return it to the system.

glibc returns arrays of more than 32 MB, and then the next array is of pages that the system has yet to make, which
takes longer than to normalize it. Users have either: other allocators keep it, and so does glibc if told to.
"""

from __future__ import annotations

import os

__all__ = ["KEPT", "RETURNED", "THEIR_OWN", "environment"]

KEPT, RETURNED, THEIR_OWN = "kept", "returned", "the framework's"

_KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(512 * 2**20),
    "MALLOC_ARENA_MAX": "1",  # heaps of other threads, in which XLA allocates, go back whatever the others say
}


def environment(memory: str) -> dict[str, str]:
    """Make the environment of a process that treats memory so."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return others | (_KEEP if memory == KEPT else {})
