"""Which statistics normalize, and whether they move: for a whole model, on these layers and on PyTorch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.core import algebra, normalize
from batchnorm.core.algebra import Moments
from batchnorm.core.options import received

from . import checks, layout
from . import namespace as xp
from . import synchronized as merging
from .modules import Layer

__all__ = ["freeze", "hold", "recalibrate", "unfreeze"]

Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def hold(model: Model) -> Iterator[Model]:
    """Normalize by the batch without moving a statistic, within a ``with`` statement.

    Layers in training normalize as ever; renorm corrects by its averages as they stand. No average moves and no batch
    is counted. Layers in evaluation are not concerned. For a pass that is not to count: the second one of SAM, a target
    network's, a look at the loss.

    Args:
        model: Model or layer, with layers of this package, of `torch.nn` (`SyncBatchNorm` too) or of subclasses that
            heed `track_running_stats`, which is False meanwhile; so it is in a copy that is made meanwhile.

    >>> layer = nn.BatchNorm1d(2)
    >>> with hold(layer):
    ...     y = layer(torch.randn(8, 2) + 5)
    >>> layer.running_mean, int(layer.num_batches_tracked)
    (tensor([0., 0.]), 0)
    """
    tracking = [layer for layer in _layers(model).values() if layer.track_running_stats]
    try:
        for layer in tracking:
            layer.track_running_stats = False
        yield model
    finally:
        for layer in tracking:
            layer.track_running_stats = True


def freeze(model: Model) -> Model:
    """Let every batch normalization layer normalize as in evaluation, also after ``model.train()``.

    Running statistics normalize, and none moves; parameters go on training. It holds for copies and pickles too, until
    `unfreeze`, and is not in the state dict. A layer's `training` is False from its next call on, whatever set it.

    Args:
        model: Model or layer, changed in place, with layers of this package, of `torch.nn` or of subclasses.

    Returns:
        The model.

    Raises:
        TypeError: If it is no module.
        ValueError: If a layer has no running statistics to normalize by. Then none is frozen.

    >>> layer = freeze(nn.BatchNorm1d(2)).train()
    >>> layer(torch.ones(1, 2)).round(decimals=2)
    tensor([[1., 1.]], grad_fn=<RoundBackward1>)
    """
    found = _layers(model)
    for name, layer in found.items():
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(
                f"model must have running statistics in each layer that is frozen; {name or 'the layer'} "
                f"({type(layer).__name__}) has none."
            )
    for layer in found.values():
        if not is_frozen(layer):
            layer.register_forward_pre_hook(_evaluate)
        layer.eval()
    return model


def unfreeze(model: Model) -> Model:
    """Undo `freeze`: layers are again in the mode of the model that is given.

    >>> unfreeze(freeze(nn.Sequential(nn.BatchNorm1d(2))))[0].training
    True
    """
    for layer in _layers(model).values():
        if is_frozen(layer):
            for key, hook in list(layer._forward_pre_hooks.items()):
                if hook is _evaluate:
                    del layer._forward_pre_hooks[key]
            layer.train(layer is model or model.training)
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Tell whether a layer is frozen."""
    return _evaluate in layer._forward_pre_hooks.values()


def _evaluate(layer: nn.Module, _: Any) -> None:
    if layer.training:
        layer.eval()


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalization layers of a model, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; {received(model)}.")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


# ---- Statistics anew.


@torch.no_grad()
def recalibrate(
    model: Model,
    batches: Iterable[Any],
    *,
    call: Callable[[Model, Any], Any] | None = None,
    progress: bool = True,
) -> Model:
    """Set the running statistics to those of given data, in one pass.

    Meanwhile batch normalization layers normalize by the batch, and all other modules are as they are. Each layer puts
    together all values that it was given, however the batches divide them: its running mean is their mean m, its
    running variance v·n/(n − 1), or v with renorm, whose own averages become m and √(v + eps). Virtual batches are not
    seen, and what is masked is not counted. The number of batches tracked stays, and so do frozen layers. Synchronized
    layers put together the values of all replicas, which all call this with as many batches.

    For statistics of a copy whose parameters are an average, after a change of the data, or before quantization.

    Args:
        model: Model or layer, changed in place, with layers of this package, of `torch.nn` or of subclasses.
        batches: What the model is called with: tensors, or tuples and lists of which the first is one.
        call: Function of the model and a batch that calls it, for anything else.
        progress: Whether to show a progress bar, where `tqdm` is installed, once it has taken some seconds.

    Returns:
        The model. Nothing has changed in it on an error, or without data.

    >>> layer = nn.BatchNorm1d(1)
    >>> recalibrate(layer, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [7.0]])]).running_mean
    tensor([4.])
    """
    gathered = {layer: _Gathered() for layer in _layers(model).values() if layer.running_mean is not None}
    gathered = {layer: into for layer, into in gathered.items() if not is_frozen(layer)}
    modes = {layer: layer.training for layer in gathered}
    handles = [
        layer.register_forward_pre_hook(into, with_kwargs=True, prepend=True) for layer, into in gathered.items()
    ]
    try:
        with hold(model):
            for layer in gathered:
                layer.train()
            for batch in _shown(batches, progress):
                if call is not None:
                    call(model, batch)
                else:
                    model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for handle in handles:
            handle.remove()
        for layer, mode in modes.items():
            layer.train(mode)
    together = {layer: _together(layer, into.moments) for layer, into in gathered.items()}
    for layer, moments in together.items():
        if moments is not None:
            _set(layer, moments)
    return model


class _Gathered:
    """The moments of all values that a layer was given, as a hook before its calls."""

    def __init__(self) -> None:
        self.moments: Moments | None = None

    def __call__(self, layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else keywords["input"]
        plan = layout.plan(x, layer.axes(x) if isinstance(layer, Layer) else (1,), None)
        mask = arguments[1] if len(arguments) > 1 else keywords.get("mask")
        weights = None if mask is None else checks.weights(mask, x, plan)
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        self.moments = normalize.gather(
            xp, self.moments, x.to(layout.accumulation_dtype(x.dtype)), plan, exact, weights
        )


def _together(layer: Any, moments: Moments | None) -> Moments | None:
    """The moments of all replicas, where a layer merges them, and some may have been given nothing."""
    synchronized = isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "synchronized", False)
    replicas = merging.replicas(layer.running_mean, synchronized, getattr(layer, "process_group", None))
    if replicas is None:
        return moments
    if moments is None:
        nothing = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        moments = Moments(nothing, nothing, 0)
    return replicas.merge(moments)


def _set(layer: Any, moments: Moments) -> None:
    renorm = getattr(layer, "renorm_mean", None) is not None
    variance = moments.variance if renorm else algebra.unbiased_variance(xp, moments)
    new = {"running_mean": moments.mean, "running_var": variance}
    if renorm:
        new |= {"renorm_mean": moments.mean, "renorm_stddev": algebra.stddev(xp, variance, layer.eps)}
    for name, value in new.items():
        old = getattr(layer, name)
        old.copy_(torch.where(moments.count > 0, value, old.to(value.dtype)))


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    shown: Iterable[Any] = tqdm(batches, desc="recalibrate", delay=3.0, leave=False)
    return shown
