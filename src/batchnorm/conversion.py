"""Files of variables from one framework's names to another's: `python -m batchnorm convert`."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from batchnorm.core import dialects, state
from batchnorm.core.dialects import DIALECTS, Found
from batchnorm.core.options import flag, received, small_number
from batchnorm.numpy import namespace as xp

__all__ = ["Converted", "convert_file"]

KINDS = (
    ".pt and .pth (a state dict), .safetensors, .msgpack (Flax), .npz, .keras, .weights.h5, .h5 and .hdf5 (Keras), and "
    "the prefix of a TensorFlow checkpoint"
)
KERAS = (".keras", ".h5", ".hdf5")


class Converted(NamedTuple):
    """What `convert_file` has done.

    Attributes:
        layers: Names of the layers in the source, to those in the target.
        left: Number of the source's other variables that are not in the target.
    """

    layers: dict[str, str]
    left: int


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    into: str | os.PathLike[str] | None = None,
    rename: Sequence[tuple[str, str]] = (),
    renorm: bool | None = None,
    epsilon: float | None = None,
) -> Converted:
    """Write the batch normalization layers of a file under the names of another framework.

    Layers are found by the names of their mean and variance. Within one framework everything else in the file is
    copied as it is, unless the source is Keras'; between frameworks only these layers are written, for other layers
    differ in more than names. With `into` everything else is that of a file that is there already.

    Args:
        source: File to read: a TensorFlow checkpoint's prefix, ``.pt``, ``.pth``, ``.safetensors``, ``.msgpack``,
            ``.npz``, ``.keras``, ``.weights.h5``, ``.h5`` or ``.hdf5``.
        target: File to write, of any of these kinds.
        to: Names to write: ``"tensorflow"`` (Keras' and NumPy's, too), ``"torch"``, ``"flax"``, or ``"linen"`` (Flax
            with its two collections). By default those of `into`, or what the kind of `target` suggests.
        into: File of the kind of `target`, of which the target becomes a copy, with the layers' variables replaced.
            Files of Keras can be written only so, for they know variables by their place in a model.
        rename: Pairs of a regular expression and its replacement, applied to the names of layers in turn.
        renorm: Whether to write renorm's averages. By default where they are in the source, or with `into` there.
        epsilon: That of the layers, which files do not know. Needed where a standard deviation follows from a variance.

    Returns:
        The names of the layers, and the number of variables left out.

    Raises:
        ValueError: If there is no layer in the source, one does not fit, a name is not there in `into` or there twice,
            epsilon is needed or negative, the kind of a file is unknown, or target and source are one file.
        TypeError: For an argument of the wrong type.
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the package is missing that reads or writes such a file.
    """
    source, target = os.fspath(source), os.fspath(target)
    if os.path.abspath(source) == os.path.abspath(target):
        raise ValueError(f"target must differ from source; {received(target)} for both.")
    if to is not None and to not in list(DIALECTS):
        raise ValueError(f"to must be one of {list(DIALECTS)}; {received(to)}.")
    for pair in rename:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(f"rename must be of pairs (pattern, replacement); {received(pair)}.")
    renorm = None if renorm is None else flag("renorm", renorm)
    epsilon = None if epsilon is None else small_number("epsilon", epsilon)
    there = read = _read(source)
    found = _found(source, read)
    if into is not None:
        if _kind(os.fspath(into)) != _kind(target):
            raise ValueError(f"into must be a file of the target's kind; received {into} and {target}.")
        there = _read(os.fspath(into))
    elif _kind(target) in KERAS:
        raise ValueError(
            f"into must be given for {target}: files of Keras know variables by their place in a model, so they can "
            "only be written over those of a model that was saved."
        )
    places = _found(os.fspath(into), there) if into is not None else {}
    first = next(iter((places or found).values())).dialect
    dialect = to or (first if places else _suggested(target, first))
    written: dict[str, Any] = {}
    layers: dict[str, str] = {}
    taken: set[str] = set()
    for name, layer in found.items():
        new = _renamed(name, rename, DIALECTS[dialect].separator)
        if new in layers.values():
            raise ValueError(f"rename must keep names apart; received two layers that become {new!r}.")
        layers[name] = new
        place = places.get(new) if into is not None else _place(new, layer, dialect, renorm)
        if place is None:
            raise ValueError(
                f"{into} must have each layer of the source; it has {_some(places)} and not {new!r}. "
                "rename gives layers other names."
            )
        variables = {ours: _array(read[key]) for ours, key in layer.keys.items()}
        try:
            completed = dialects.complete(xp, variables, place.keys, epsilon)
            for ours, value in completed.items():
                shape = np.shape(there[place.keys[ours]]) if into is not None else None
                written[place.keys[ours]] = _shaped(ours, value, dialect, shape, variables)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name!r} in {source} cannot be converted: {error.args[0]}.") from error
        taken |= {*layer.keys.values(), *layer.spare}
    others = {key: value for key, value in read.items() if key not in taken}
    if into is not None:
        _write(target, there | written, os.fspath(into), written)
        return Converted(layers, len(others))
    same = _kind(source) not in KERAS and all(layer.dialect == dialect for layer in found.values())
    clashing = sorted(set(others) & set(written)) if same else []
    if clashing:
        raise ValueError(f"rename must keep names apart; received {clashing[0]!r}, which is another variable's.")
    _write(target, (others if same else {}) | written, None, written)
    return Converted(layers, 0 if same else len(others))


# ---- Names and shapes.


def _found(path: str, variables: Mapping[str, Any]) -> dict[str, Found]:
    found = dialects.find(variables)
    if not found:
        raise ValueError(
            f"{path} must have batch normalization: a mean and a variance under the names of one framework, such as "
            f"moving_mean and moving_variance, or running_mean and running_var; received {_some(variables)}."
        )
    return found


def _some(names: Mapping[str, Any]) -> str:
    listed = ", ".join(repr(name) for name in sorted(names)[:8])
    return f"{listed} and {len(names) - 8} more" if len(names) > 8 else listed or "no variable"


def _suggested(target: str, source: str) -> str:
    kind = _kind(target)
    if kind in (".pt", ".pth"):
        return "torch"
    if kind == ".msgpack":
        return source if source == "flax" else "linen"
    return source if kind == ".safetensors" else "tensorflow"


def _renamed(name: str, rename: Sequence[tuple[str, str]], separator: str) -> str:
    for pattern, replacement in rename:
        try:
            name = re.sub(pattern, replacement, name)
        except re.error as error:
            raise ValueError(f"rename must be of regular expressions; received {pattern!r}: {error}.") from error
    return re.sub("[./]" if separator == "." else r"\.", separator, name)


def _place(name: str, layer: Found, dialect: str, renorm: bool | None) -> Found:
    """Where the variables of a layer go in a file of their own."""
    spoken = DIALECTS[dialect]
    if renorm is None:
        renorm = any(ours.startswith("renorm_") for ours in layer.keys)
    parameters = tuple(ours for ours in state.PARAMETERS if ours in layer.keys)
    wanted = (*parameters, "moving_mean", "moving_variance", *spoken.always, *(spoken.renorm if renorm else ()))

    def key(ours: str) -> str:
        parts = [name, spoken.names[ours]] if name else [spoken.names[ours]]
        if dialect == "linen":
            parts.insert(0, "params" if ours in parameters else "batch_stats")
        return spoken.separator.join(parts)

    return Found(dialect, {ours: key(ours) for ours in wanted})


def _shaped(name: str, value: Any, dialect: str, shape: tuple[int, ...] | None, variables: Mapping[str, Any]) -> Any:
    """A value in the shape and type of its new place: of several axes, TensorFlow's has the rank of the input."""
    if name == "steps":
        return np.array(value, np.int64 if dialect == "torch" else np.int32)
    value = np.asarray(value, variables["moving_variance"].dtype if name not in variables else None)
    if shape is None:
        if dialect == "tensorflow":
            return value
        shape = tuple(size for size in value.shape if size != 1) or (1,)
    if [size for size in shape if size != 1] != [size for size in value.shape if size != 1]:
        raise ValueError(f"{name} must have shape {tuple(shape)}; received shape {value.shape}")
    return value.reshape(shape)


# ---- Files.


def _kind(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _read(path: str) -> dict[str, Any]:
    """The variables of a file by name; for files of Keras only those of batch normalization."""
    kind = _kind(path)
    if os.path.isfile(f"{path}.index"):
        kind = "checkpoint"
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"no file and no TensorFlow checkpoint at {path!r}")
    if kind not in READERS:
        raise ValueError(f"{path} must be of one of these kinds: {KINDS}.")
    try:
        return READERS[kind](path)
    except (ValueError, FileNotFoundError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of its kind: {error}") from error


def _write(path: str, variables: Mapping[str, Any], into: str | None, changed: Mapping[str, Any]) -> None:
    kind = _kind(path)
    if kind in KERAS:
        assert into is not None
        _write_keras(into, path, changed)
    else:
        WRITERS.get(kind, _write_checkpoint)(path, dict(variables))


def _array(value: Any) -> Any:
    """An array of any framework as NumPy's, which knows no bfloat16."""
    return np.asarray(value.float() if str(getattr(value, "dtype", "")) == "torch.bfloat16" else value)


def _read_npz(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _write_npz(path: str, variables: dict[str, Any]) -> None:
    with open(path, "wb") as file:  # savez would add to the name
        np.savez(file, **{key: _array(value) for key, value in variables.items()})


def _read_torch(path: str) -> dict[str, Any]:
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        keys = _some(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path} must hold a state dict, of tensors alone; received {keys}.")
    return dict(state)


def _write_torch(path: str, variables: dict[str, Any]) -> None:
    import torch

    given = {key: value for key, value in variables.items() if isinstance(value, torch.Tensor)}
    torch.save({**{key: torch.from_numpy(np.array(variables[key])) for key in variables.keys() - given}, **given}, path)


def _read_safetensors(path: str) -> dict[str, Any]:
    import safetensors.numpy

    return dict(safetensors.numpy.load_file(path))


def _write_safetensors(path: str, variables: dict[str, Any]) -> None:
    import safetensors.numpy

    safetensors.numpy.save_file({key: np.array(_array(value), order="C") for key, value in variables.items()}, path)


def _read_msgpack(path: str) -> dict[str, Any]:
    from flax import serialization, traverse_util

    with open(path, "rb") as file:
        tree = serialization.msgpack_restore(file.read())
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def _write_msgpack(path: str, variables: dict[str, Any]) -> None:
    from flax import serialization, traverse_util

    with open(path, "wb") as file:
        file.write(serialization.msgpack_serialize(traverse_util.unflatten_dict(variables, sep="/")))


OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"
"""What checkpoints by object put behind the name of a variable."""


def _read_checkpoint(path: str) -> dict[str, Any]:
    from batchnorm.tensorflow import checkpoints

    return {name.removesuffix(OBJECT): value for name, value in checkpoints.read(path).items()}


def _write_checkpoint(path: str, variables: dict[str, Any]) -> None:
    if _kind(path) in READERS:
        raise ValueError(f"{path} must not end in the way of another kind of file.")
    from batchnorm.tensorflow import checkpoints

    checkpoints.write(path, variables)


# ---- Files of Keras.

BY_COUNT = {2: state.VARIABLES[2:4], 4: state.VARIABLES[:4], 5: state.VARIABLES[2:], 7: state.VARIABLES}
"""Which variables a layer has, by how many they are."""


def _read_keras(path: str) -> dict[str, Any]:
    found: dict[str, Any] = _keras(
        path, lambda file: {name: np.asarray(file[place]) for name, place in _keras_places(file).items()}
    )
    return found


def _write_keras(into: str, path: str, changed: Mapping[str, Any]) -> None:
    def assign(file: Any) -> None:
        places = _keras_places(file)
        for name, value in changed.items():
            file[places[name]][...] = value

    shutil.copyfile(into, path)
    _keras(path, assign, writing=True)


def _keras(path: str, use: Callable[[Any], Any], writing: bool = False) -> Any:
    """Open the HDF5 file at a path, or in the archive there, for the time of a call."""
    import h5py

    if _kind(path) != ".keras":
        with h5py.File(path, "r+" if writing else "r") as file:
            return use(file)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    weights = "model.weights.h5"
    if weights not in contents:
        raise ValueError(f"{path} must be an archive with {weights} in it; received {_some(contents)}.")
    memory = io.BytesIO(contents[weights])
    with h5py.File(memory, "r+" if writing else "r") as file:
        result = use(file)
    if writing:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, memory.getvalue() if name == weights else content)
    return result


def _keras_places(file: Any) -> dict[str, str]:
    """Where the variables of batch normalization are, by name.

    Keras 2 names them. Keras 3 numbers them, in groups called after classes or attributes, and keeps the layer's name
    beside: there a layer is one of that class, or has four or seven variables of one shape, as no other layer has.
    """
    import h5py

    root = file.get("model_weights", file)
    if "layer_names" in root.attrs or "layer_names0" in root.attrs:
        return _keras2_places(root)
    places = {}

    def visit(path: str, group: Any) -> None:
        names = path.split("/")
        if not isinstance(group, h5py.Group) or names[-1] != "vars" or not len(group):
            return
        kind = len(names) > 1 and names[-2].startswith("batch_normalization")
        variables = [group[str(at)] for at in range(len(group))]
        steps = ("steps",) if variables[-1].shape == () else ()  # the last, where the limits of renorm are a schedule
        count = len(variables) - len(steps)
        if not count or len({variable.shape for variable in variables[:count]}) > 1 or not (kind or count in (4, 7)):
            return
        scopes = ["/".join(names[: at + 1]) for at in range(len(names) - 1) if names[at] != "layers"]
        name = "/".join(_keras_name(file, scope) for scope in scopes)
        if count not in BY_COUNT:
            raise ValueError(
                f"{name!r} must have 2, 4, 5 or 7 variables, for numbers do not tell gamma from beta; received {count}."
            )
        for at, variable in enumerate(BY_COUNT[count] + steps):
            places[f"{name}/{variable}"] = f"{path}/{at}"

    file.visititems(visit)
    return places


def _keras_name(file: Any, scope: str) -> str:
    last = scope.rpartition("/")[2]  # a list of layers has no variables, and older files no names
    return str(file[f"{scope}/vars"].attrs.get("name", last)) if f"{scope}/vars" in file else last


def _keras2_places(root: Any) -> dict[str, str]:
    import h5py

    places: dict[str, str] = {}

    def visit(path: str, variable: Any) -> None:
        if isinstance(variable, h5py.Dataset):
            layer, _, name = path.partition("/")  # the group of a layer, and in it the names of variables
            name = name.removesuffix(":0")
            places[name if name.startswith(f"{layer}/") else f"{layer}/{name}"] = f"{root.name}/{path}"

    root.visititems(visit)
    found = dialects.find(places).values()
    return {key: places[key] for layer in found for key in layer.keys.values()}


READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
    ".msgpack": _read_msgpack,
    "checkpoint": _read_checkpoint,
    **dict.fromkeys(KERAS, _read_keras),
}
WRITERS: dict[str, Callable[[str, dict[str, Any]], None]] = {
    ".npz": _write_npz,
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".safetensors": _write_safetensors,
    ".msgpack": _write_msgpack,
}
