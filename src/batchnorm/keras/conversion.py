"""Replace the batch normalization of a model, there and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import keras

from batchnorm.core import dialects, state
from batchnorm.core.options import received

from .backends import xp
from .layer import BatchNormalization

__all__ = ["convert", "revert"]

Layer = Any
Stock = keras.layers.BatchNormalization
OPTIONS = (
    *("renorm", "renorm_clipping", "renorm_momentum", "virtual_batch_size", "adjustment", "fused", "skip_nonfinite"),
)
"""What `convert` can give a layer: everything on which parameters and statistics do not depend."""
WEIGHTS = (*state.VARIABLES, "steps")
COMPILED = ("train_function", "test_function", "predict_function")


def convert(model: Layer, **options: Any) -> Layer:
    """Replace the batch normalization layers of a model by those of this package.

    Each layer is changed in place: connections, weights, name, type and whether it is trainable stay, and so the model
    stays compiled, and its optimizer goes on. Layers in nested models and wrappers are changed, too, and one that is
    used in two places stays one. With ``renorm=True``, renorm's averages begin at the moving ones.

    Args:
        model: A model of any kind, or a layer; changed in place. `keras.layers.BatchNormalization` and
            `batchnorm.keras.BatchNormalization` are converted. Subclasses, which may have a call of their own, and
            layers that have no weights yet are left as they are, with a warning that names them.
        **options: renorm, renorm_clipping, renorm_momentum, virtual_batch_size, adjustment, fused and skip_nonfinite,
            as in `BatchNormalization`. What is not named stays as it is.

    Returns:
        The model.

    Raises:
        TypeError: For an unknown option, one of the wrong type, or if `model` is no layer.
        ValueError: For a value out of range, or options that exclude each other. Then nothing has changed.

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8), keras.layers.BatchNormalization()])
    >>> convert(model, renorm=True).layers[1].renorm
    True
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"options must be among {list(OPTIONS)}; received {unknown}.")
    found = _layers(model)
    chosen = [layer for layer in found if type(layer) in (Stock, BatchNormalization) and layer.built]
    new = [_made(layer, BatchNormalization, layer.get_config() | options) for layer in chosen]  # all are checked first
    unbuilt = any(not layer.built for layer in found)
    hint = "; those without weights can be converted after the first batch" if unbuilt else ""
    _warn("converted", [layer for layer in found if layer not in chosen], hint)
    return _changed(model, zip(chosen, new, strict=True))


def revert(model: Layer) -> Layer:
    """Replace the layers of this package by Keras' own, which give the same in inference.

    For deployment, and for programs that know Keras' layer only. Connections, weights, name and type stay; options go,
    so that in training the layers are plain ones, and renorm's averages with them.

    Args:
        model: A model, or a layer; changed in place. Layers over several axes, for which Keras has none, and
            subclasses are left as they are, with a warning that names them.

    Returns:
        The model.

    Raises:
        TypeError: If it is no layer.

    >>> model = keras.Sequential([keras.Input((3,)), BatchNormalization(renorm=True)])
    >>> type(revert(model).layers[0]) is keras.layers.BatchNormalization
    True
    """
    found = [layer for layer in _layers(model) if isinstance(layer, BatchNormalization)]
    chosen = [
        layer
        for layer in found
        if type(layer) is BatchNormalization and layer.built and (isinstance(layer.axis, int) or len(layer.axis) == 1)
    ]
    new = []
    for layer in chosen:
        config = {name: value for name, value in layer.get_config().items() if name not in OPTIONS}
        axis = config["axis"]
        new.append(_made(layer, Stock, config | {"axis": axis if isinstance(axis, int) else axis[0]}))
    _warn("reverted", [layer for layer in found if layer not in chosen], "")
    return _changed(model, zip(chosen, new, strict=True))


def _layers(model: Layer) -> list[Layer]:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a model or a layer of Keras; {received(model)}.")
    return [layer for layer in model._flatten_layers() if isinstance(layer, Stock)]


def _warn(what: str, left: list[Layer], hint: str) -> None:
    if left:
        names = ", ".join(f"{layer.path or layer.name} ({type(layer).__name__})" for layer in left)
        warnings.warn(f"Batch normalization layers that were not {what}: {names}{hint}.", stacklevel=3)


def _made(layer: Layer, kind: Any, config: dict[str, Any]) -> Layer:
    """A layer as it is to become, with weights of its own, of which it gives those that are missing."""
    try:
        new = kind.from_config(config)
    except TypeError as error:  # Keras wraps whatever is raised in one of these
        raise error.__context__ or error from None
    new.build(layer.get_build_config()["input_shape"])
    wanted = [name for name in WEIGHTS if getattr(new, name, None) is not None and name != "steps"]
    present = {name: getattr(layer, name).value for name in WEIGHTS if getattr(layer, name, None) is not None}
    for name, value in dialects.complete(xp, present, wanted, new.epsilon).items():
        getattr(new, name).assign(value)
    return new


def _changed(model: Layer, pairs: Iterable[tuple[Layer, Layer]]) -> Layer:
    general = set(vars(keras.layers.Layer()))
    for layer, new in pairs:
        _become(layer, new, general)
    for each in model._flatten_layers():
        for name in COMPILED:
            if getattr(each, name, None) is not None:
                setattr(each, name, None)  # traced with the layers as they were
        if hasattr(each, "_torch_params"):  # PyTorch's view of the weights
            each._track_variables()
    return model


def _become(layer: Layer, new: Layer, general: set[str]) -> None:
    """Make a layer what another is, in its own place: what every layer has stays, but for how it is called."""
    layer._tracker.unlock()
    scope = layer.moving_mean.path.rpartition("/")[0]
    for name in WEIGHTS:
        old, value = getattr(layer, name, None), getattr(new, name, None)
        if old is not None and value is None:
            layer._untrack_variable(old)
        elif value is not None:
            value._path = f"{scope}/{name}"  # it was made outside of the model
    for generator in list(vars(layer).get("_generators") or ()):  # of an adjustment that it may lose
        layer._tracker.untrack(generator)
    given = {name: value for name, value in vars(new).items() if name not in general and not name.startswith("_self_")}
    stays = {name for name in WEIGHTS if vars(layer).get(name) is not None and given.get(name) is not None}
    for name in list(vars(layer)):
        specific = name not in general and not name.startswith("_self_") and name not in stays
        if specific or name in ("build", "quantize"):  # which Keras wraps for each layer
            del layer.__dict__[name]
    layer.__class__ = type(new)
    called = ("_call_signature", "_call_has_context_arg", "_call_context_args", "call_signature_parameters")
    for name, value in (
        given | {name: vars(new)[name] for name in (*called, "_auto_config") if name in vars(new)}
    ).items():
        if name not in stays:
            setattr(layer, name, value)
    if hasattr(layer, "_tracked"):
        layer._tracked = [name for name in layer._tracked if name in vars(layer)]
    layer._lock_state()
