"""A process has one backend of Keras, by KERAS_BACKEND; without that, `test_backends.py` runs the rest on each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

CHOSEN = "KERAS_BACKEND" in os.environ
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_configure(config: pytest.Config) -> None:
    """Let backends do what they do."""
    if CHOSEN:
        config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't:DeprecationWarning")
        config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")  # of what inductor imports


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Collect what runs on a backend, or what runs that in processes of its own."""
    if collection_path.suffix != ".py":
        return None
    return CHOSEN if collection_path.name == "test_backends.py" else not CHOSEN


@pytest.fixture(autouse=CHOSEN)
def _seeded() -> Iterator[None]:
    import keras

    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)  # which takes longer than most of the tests
