from __future__ import annotations

import importlib
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf

# Two logical devices, for distribution strategies; they must be set up before anything runs.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session")
def original() -> Any:
    """The original layer, as its authors keep it. Nothing but tests may import it."""
    return importlib.import_module("tf_keras.src.legacy_tf_layers.normalization")
