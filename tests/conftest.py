"""Settings of every test."""

import gc

import hypothesis
import pytest

hypothesis.settings.register_profile("batchnorm", derandomize=True, deadline=None, print_blob=True, max_examples=100)
hypothesis.settings.load_profile("batchnorm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first, the longest before all, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: -sum(marker.kwargs.get("seconds", 5) for marker in item.iter_markers("slow")))


def pytest_collection_finish() -> None:
    """Keep what has been imported, which stays for good, out of every later search for garbage."""
    gc.collect()
    gc.freeze()
