"""Configurations of batch normalization as every generation of Keras wrote them, read as ours.

What differs:

- Keras up to 3.13 writes no keys of renorm; from 3.14 on they are always there.
- Keras 3 writes types as strings at first, and later as policies.
- In Keras 2 and tf_keras a built layer's axis is a list, a policy of types is called Policy, and a layer may have the
  shape of the model's input.
- In its layers of TensorFlow 1 initializers have a type, and with virtual batches a built layer's axes are all one too
  large; its variables have an axis for the virtual batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["AXES", "plain_policies", "read", "shaped"]

AXES = "feature_axes"
"""Key by which `batchnorm.keras.load_model` gives the axis past Keras' own reader of HDF5 files, which loses lists."""


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the configuration of a batch normalization layer of any generation.

    Where virtual batches and a positive axis come from a layer of TensorFlow 1, the axis may be one too large, and
    nothing may tell; then it is taken as it is, with a warning. `batchnorm.keras.load_model` knows.

    >>> read({"axis": [3], "momentum": 0.9, "virtual_batch_size": 8, "gamma_initializer":
    ...       {"module": "keras.initializers", "class_name": "Ones", "config": {"dtype": "float32"}}})
    {'axis': 2, 'momentum': 0.9, 'virtual_batch_size': 8, 'gamma_initializer': {'class_name': 'Ones', 'config': {}}}
    """
    found = {name: _value(name, value) for name, value in config.items() if name not in ("batch_input_shape", AXES)}
    axis = config.get(AXES, config.get("axis"))
    if axis is None:
        return found
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    if config.get("virtual_batch_size") is not None and min(axes) > 0 and "synchronized" not in config:
        # Ours always has the key, and the layers of TensorFlow 1 never do.
        if axes != [axis] and _is_from_tf_keras(config):
            axes = [feature_axis - 1 for feature_axis in axes]
        else:
            warnings.warn(
                f"axis={axis} of {config.get('name')!r} may be one too large: layers of TensorFlow 1 with virtual "
                "batches wrote it so once they were built. It is taken as it is.",
                stacklevel=2,
            )
    return found | {"axis": axes[0] if len(axes) == 1 else axes}


def _is_from_tf_keras(config: Mapping[str, Any]) -> bool:
    """Tell its layers of TensorFlow 1 from ours, whose initializers have no module."""
    return any(isinstance(value, Mapping) and "module" in value for value in config.values())


def _value(name: str, value: Any) -> Any:
    if name == "dtype":
        return plain_policies(value)
    if name.endswith("_initializer") and isinstance(value, Mapping) and "dtype" in value.get("config", {}):
        rest = {key: each for key, each in value["config"].items() if key not in ("dtype", "verify_shape")}
        return {"class_name": value["class_name"], "config": rest}
    return value


def plain_policies(config: Any) -> Any:
    """Give the policies of Keras 2 by their names, at any depth of a configuration.

    >>> plain_policies({"dtype": {"class_name": "Policy", "config": {"name": "mixed_float16"}}})
    {'dtype': 'mixed_float16'}
    """
    if isinstance(config, list):
        return [plain_policies(value) for value in config]
    if not isinstance(config, Mapping):
        return config
    if config.get("class_name") in ("Policy", "PolicyV1") and "name" in config.get("config", {}):
        return config["config"]["name"]
    return {name: plain_policies(value) for name, value in config.items()}


def shaped(value: Any, shape: tuple[int, ...]) -> Any:
    """Give a saved variable the shape of ours, where they differ in sizes of 1 only.

    >>> shaped(np.zeros((1, 1, 1, 5)), (5,)).shape
    (5,)
    """
    array = np.asarray(value)
    sizes = [size for size in array.shape if size != 1]
    return array.reshape(shape) if sizes == [size for size in shape if size != 1] else array
