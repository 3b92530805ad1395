"""Replace the batch normalization of a model, there and back."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.core.options import received

from .modules import OPTIONS, RENORM, STATE, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, checked

__all__ = ["convert", "revert"]

Module = TypeVar("Module", bound=nn.Module)

THEIRS: dict[type[nn.Module], type[nn.Module]] = {
    BatchNorm1d: nn.BatchNorm1d,
    BatchNorm2d: nn.BatchNorm2d,
    BatchNorm3d: nn.BatchNorm3d,
}
OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: BatchNorm,
    **{layer: layer for layer in (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)},
}


def convert(module: nn.Module, **options: Any) -> nn.Module:
    """Replace the batch normalization layers of a model by those of this package.

    Parameters, statistics, hooks, mode, type, device and whatever else a layer carries are taken over as they are, so
    that optimizers go on; a layer that is used in two places stays one. With ``renorm=True``, renorm's averages begin
    at the running statistics.

    Args:
        module: Model, changed in place, or a single layer. `torch.nn.BatchNorm1d`, `2d` and `3d` and the layers of this
            package are replaced, and `torch.nn.SyncBatchNorm` by a synchronized `BatchNorm`. Subclasses, which may have
            a forward of their own, and lazy layers are left as they are, with a warning that names them.
        **options: renorm, renorm_clipping, renorm_momentum, virtual_batch_size, adjustment, fused, skip_nonfinite,
            synchronized and process_group, as in `BatchNorm`. What is not named stays as it is in a layer of this
            package, and is at its default in others.

    Returns:
        The model; a new module if it is itself a batch normalization layer.

    Raises:
        TypeError: For an unknown option, or one of the wrong type.
        ValueError: For a value out of range, or options that exclude each other. Then nothing has changed.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> convert(model, renorm=True)[1]
    BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, renorm=True)
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"options must be among {list(OPTIONS)}; received {unknown}.")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; {received(module)}.")
    found = [layer for layer in module.modules() if type(layer) in OURS]
    wanted = [_wanted(layer, options) for layer in found]  # all of them are checked before any is replaced
    _warn(
        "not converted",
        {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm) and layer not in found},
    )
    converted: nn.Module = _replace(
        module, {layer: _ours(layer, given) for layer, given in zip(found, wanted, strict=True)}
    )
    return converted


def revert(module: nn.Module) -> nn.Module:
    """Replace the layers of this package by PyTorch's own, which give the same in evaluation.

    For deployment, and for tools that look for the exact class: fusion, quantization, and programs that load a state
    dict without renorm's averages. Parameters, statistics, hooks, mode and whatever else a layer carries stay; options
    go, so that in training the layers are plain ones.

    Args:
        module: Model, changed in place, or a single layer. `BatchNorm1d`, `2d` and `3d` are replaced, and by
            `torch.nn.SyncBatchNorm` a synchronized `BatchNorm` with ``axis=1``. Any other `BatchNorm`, for which
            PyTorch has no layer, and subclasses are left as they are, with a warning that names them.

    Returns:
        The model; a new module if it is itself a layer.

    Raises:
        TypeError: If it is no module.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8, renorm=True))
    >>> revert(model)[1]
    BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    >>> type(model[1]) is nn.BatchNorm2d
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; {received(module)}.")
    named = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    _warn("not reverted", {name: layer for name, layer in named.items() if _their_class(layer) is None})
    reverted: nn.Module = _replace(
        module, {layer: _theirs(layer, theirs) for layer in named.values() if (theirs := _their_class(layer))}
    )
    return reverted


def _their_class(layer: Layer) -> type[nn.Module] | None:
    if type(layer) is BatchNorm and layer.axis == 1 and layer.synchronized:
        return nn.SyncBatchNorm
    return THEIRS.get(type(layer))


def _replace(module: nn.Module, replaced: dict[nn.Module, Any]) -> Any:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(module, module)


def _warn(what: str, left: dict[str, nn.Module]) -> None:
    if not left:
        return
    names = ", ".join(f"{name or 'the module itself'} ({type(layer).__name__})" for name, layer in left.items())
    lazy = any(isinstance(layer, LazyModuleMixin) for layer in left.values())
    hint = "; lazy layers can be converted after their first batch" if lazy else ""
    warnings.warn(f"Batch normalization layers that were {what}: {names}{hint}.", stacklevel=3)


def _wanted(layer: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    defaults = OPTIONS | {"synchronized": isinstance(layer, nn.SyncBatchNorm)}
    given = {name: options.get(name, getattr(layer, name, default)) for name, default in defaults.items()}
    own = {name: getattr(layer, name) for name in ("eps", "momentum")}
    checked(given, axis=getattr(layer, "axis", 1), track_running_stats=layer.running_mean is not None, **own)
    return given


def _ours(layer: nn.Module, given: dict[str, Any]) -> Layer:
    new: Layer = _copied(layer, OURS[type(layer)])
    with torch.no_grad():
        new.configure(given)
    return new


def _theirs(layer: Layer, kind: type[nn.Module]) -> nn.Module:
    new: nn.Module = _copied(layer, kind)
    for name in (*STATE, "axis"):
        new.__dict__.pop(name, None)
    if kind is nn.SyncBatchNorm:
        new.process_group = layer.process_group
    for name in RENORM:
        new._buffers.pop(name, None)
    return new


def _copied(layer: nn.Module, kind: Any) -> Any:
    """The same of another class, to be changed without a change of the layer."""
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)  # hooks among them, which their handles still remove
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        new.__dict__[name] = layer.__dict__[name].copy()
    return new
