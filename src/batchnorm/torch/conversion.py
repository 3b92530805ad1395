"""Replace the batch normalization of a model."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from batchnorm.core.options import received

from .modules import OPTIONS, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, checked

__all__ = ["convert"]

Module = TypeVar("Module", bound=nn.Module)

OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    **{layer: layer for layer in (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)},
}


def convert(module: nn.Module, **options: Any) -> nn.Module:
    """Replace the batch normalization layers of a model by those of this package.

    Parameters, statistics, hooks, mode, type, device and whatever else a layer carries are taken over as they are, so
    that optimizers go on; a layer that is used in two places stays one. With ``renorm=True``, renorm's averages begin
    at the running statistics.

    Args:
        module: Model, changed in place, or a single layer. `torch.nn.BatchNorm1d`, `2d` and `3d` and the layers of this
            package are replaced, not their subclasses.
        **options: renorm, renorm_clipping, renorm_momentum, virtual_batch_size, adjustment and fused, as in
            `BatchNorm`. What is not named stays as it is in a layer of this package, and is at its default in others.

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
        raise TypeError(f"module must be a torch.nn.Module; received {received(module)}.")
    found = [layer for layer in module.modules() if type(layer) in OURS]
    wanted = [_wanted(layer, options) for layer in found]  # all of them are checked before any is replaced
    replaced = {layer: _replacement(layer, given) for layer, given in zip(found, wanted, strict=True)}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(module, module)


def _wanted(layer: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    given = {name: options.get(name, getattr(layer, name, default)) for name, default in OPTIONS.items()}
    own = {name: getattr(layer, name) for name in ("eps", "momentum", "track_running_stats")}
    checked(given, axis=getattr(layer, "axis", 1), **own)
    return given


def _replacement(layer: nn.Module, given: dict[str, Any]) -> Layer:
    kind = OURS[type(layer)]
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)  # hooks among them, which their handles still remove
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):  # the replaced layer stays what it was
        new.__dict__[name] = layer.__dict__[name].copy()
    with torch.no_grad():
        new.configure(given)
    return new
