from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(scope="session")
def original() -> Any:
    """The original layer, as its authors keep it. Nothing but tests may import it."""
    return importlib.import_module("tf_keras.src.legacy_tf_layers.normalization")
