"""Every test has two threads, whatever the one before it asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .cases import library


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = library.num_threads()
    library.set_num_threads(2)
    yield
    library.set_num_threads(before)
