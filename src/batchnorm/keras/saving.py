"""Load saved models with stock batch normalization as the layer of this package."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from batchnorm.core.options import received

from .configuration import AXES, plain_policies
from .layer import BatchNormalization

__all__ = ["load_model"]

REGISTERED = keras.saving.get_registered_name(BatchNormalization)
STOCK = ("BatchNormalization", "BatchNormalizationV1")
SYNCHRONIZED = "SyncBatchNormalization"
"""A class of Keras 2 whose configuration does not say what its name does."""
CONFIG = "config.json"
FUNCTIONAL = "keras.src.models.functional"
"""Where Keras 3 looks for the class of functional models, which Keras 2 had in a module called engine."""


def load_model(
    filepath: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> Any:
    """Load a model as `keras.saving.load_model` does, with the layer of this package for each stock one in it.

    It reads files that Keras' own does not, too: those of tf_keras in the ``.keras`` format, batch normalization over
    several axes, and with virtual batches, in both formats; and in HDF5 files Keras 2's ``SyncBatchNormalization``, as
    a layer with ``synchronized=True``. (Its ``BatchNormalization(synchronized=True)`` was written without the argument:
    set it on the loaded layer.) The file stays as it is. For more options convert the model:
    ``convert(load_model(path), renorm=True)``.

    Args:
        filepath: A file that ends in ``.keras``, ``.h5`` or ``.hdf5``, of any generation of Keras.
        custom_objects: Classes and functions by name.
        compile: Whether to compile the model as it was.
        safe_mode: Whether to refuse lambdas in ``.keras`` files.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `filepath` is no path.
        ValueError: If it is of another kind, or Keras cannot load it.
    """
    if not isinstance(filepath, (str, os.PathLike)):
        raise TypeError(f"filepath must be a path; {received(filepath)}.")
    path = os.fspath(filepath)
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".keras", ".h5", ".hdf5"):
        raise ValueError(f"filepath must end in .keras, .h5 or .hdf5; {received(path)}.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path!r}")
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, f"model{kind}")
        (_rewrite_archive if kind == ".keras" else _rewrite_hdf5)(path, copy)
        given = {"custom_objects": dict(custom_objects or {}), "compile": compile, "safe_mode": safe_mode}
        return keras.saving.load_model(copy, **given)


def _rewrite_archive(path: str, copy: str) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} must be an archive that Keras has written.")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        if CONFIG not in source.namelist():
            raise ValueError(f"{path} must be an archive with {CONFIG} in it; received {source.namelist()}.")
        for entry in source.infolist():
            if entry.filename == CONFIG:
                target.writestr(entry, json.dumps(_ours(json.loads(source.read(entry)))))
            else:
                with source.open(entry) as old, target.open(entry, "w", force_zip64=True) as new:
                    shutil.copyfileobj(old, new)


def _rewrite_hdf5(path: str, copy: str) -> None:
    import h5py

    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} must be an HDF5 file that Keras has written.")
    shutil.copyfile(path, copy)
    with h5py.File(copy, "r+") as file:
        config = file.attrs.get("model_config")
        if config is None:
            raise ValueError(f"{path} must hold a whole model; received weights alone, which model.load_weights loads.")
        config = _ours(json.loads(config))
        file.attrs["model_config"] = json.dumps(config)
        if "model_weights" in file:
            _drop_groups(file["model_weights"], {inner["name"]: inner for inner in _layers(config)})


def _drop_groups(weights: Any, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Give variables of layers with virtual batches our shape: they had an axis for these, and the input's rank."""
    found: dict[str, bool] = {}

    def visit(path: str, value: Any) -> None:
        inner = layers.get(path.split("/")[-2]) if hasattr(value, "shape") else None
        if inner is not None and inner.get("virtual_batch_size") is not None and value.ndim > 1:
            found[path] = isinstance(inner[AXES], list) and len(inner[AXES]) > 1

    weights.visititems(visit)
    for path, several in found.items():
        value = weights[path][()]
        if several and value.shape[1] != 1:
            continue  # ours
        del weights[path]
        weights[path] = value.reshape((value.shape[0], *value.shape[2:]) if several else -1)


def _ours(config: Any) -> Any:
    """The configuration of a model with our layer for each stock one, and without what only older readers know."""
    return _replaced(plain_policies(config))


def _layers(config: Any) -> Iterator[dict[str, Any]]:
    """The configurations of our layers in that of a model."""
    if isinstance(config, dict) and config.get("class_name") == REGISTERED:
        yield config["config"]
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _layers(value)


def _replaced(config: Any) -> Any:
    if isinstance(config, list):
        return [_replaced(value) for value in config]
    if not isinstance(config, dict):
        return config
    name, inner = config.get("class_name"), config.get("config")
    registered = config.get("registered_name") or name
    if registered == "Functional" and str(config.get("module")).endswith(".engine.functional"):
        config = config | {"module": FUNCTIONAL}
    hdf5 = "module" not in config  # these know classes by their registered names
    synchronized = registered == SYNCHRONIZED and hdf5  # archives have variables by the class, where ours finds none
    if not isinstance(inner, dict) or not (registered in (*STOCK, REGISTERED) or synchronized):
        return {key: _replaced(value) for key, value in config.items()}
    known = {key: value for key, value in inner.items() if key not in ("axis", AXES)}
    if "axis" in inner or AXES in inner:
        known[AXES] = inner.get(AXES, inner.get("axis"))
    if synchronized:
        known["synchronized"] = True
    if hdf5:
        return config | {"class_name": REGISTERED, "config": known}
    ours = {"module": BatchNormalization.__module__, "class_name": "BatchNormalization", "registered_name": REGISTERED}
    return config | ours | {"config": known}
