"""The function, and the choice of who computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from batchnorm.core import algebra, kernels
from batchnorm.core.algebra import Moments
from batchnorm.core.options import Clipping, Options, received, scalar
from batchnorm.native import KERNEL

from . import composed, native
from . import namespace as xp
from .composed import Pair

__all__ = ["Limits", "batch_norm", "check", "feature_axes", "is_small", "normalize"]

Limits = Mapping[str, float | Tensor] | None

TORCH = "torch"
"""The name of PyTorch's own operator, where a layer says which kernel served."""
SMALL = 1 << 17
"""Values up to which PyTorch's own operator takes less time than handing tensors to the native kernels; with features
last, where its operator is better, four times as many."""


def is_small(x: Tensor) -> bool:
    """Tell whether PyTorch's own operator is the faster one for a plain step."""
    values = x.numel()
    return values <= SMALL or (values <= 4 * SMALL and (x.dim() == 2 or not x.is_contiguous()))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    axis: int | tuple[int, ...] = 1,
    renorm_mean: Tensor | None = None,
    renorm_stddev: Tensor | None = None,
    renorm_clipping: Limits = None,
    renorm_momentum: float = 0.01,
    virtual_batch_size: int | None = None,
    adjustment: Pair | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Normalize a batch, as `torch.nn.functional.batch_norm` does, with every option of `BatchNorm`.

    In training y = (((x − m)/σ·r + d)·a + b)·weight + bias with σ = sqrt(v + eps), where m and v are the mean and the
    biased variance of each feature over the batch, or over each virtual batch; r = 1 and d = 0 without renorm, a = 1
    and b = 0 without adjustment. In evaluation m and v are `running_mean` and `running_var`, and r, d, a, b are left
    out.

    Args:
        input: Batch of any rank with a feature axis, or several.
        running_mean: Moved towards m in training if given, used in evaluation; of the size of the feature axes.
        running_var: Likewise of v·n/(n − 1), n values of each feature. With renorm √(running_var + eps) is moved
            towards σ instead.
        weight: Scale of each feature, or None.
        bias: Offset of each feature, or None.
        training: True to normalize by the batch.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the variance.
        axis: The feature axis, or several.
        renorm_mean: Average of m that renorm corrects by; moved in training. Renorm is on if it is given.
        renorm_stddev: Likewise of σ.
        renorm_clipping: Limits of renorm's correction, a mapping with any of the keys rmin, rmax and dmax.
        renorm_momentum: Weight of the new value in renorm's averages.
        virtual_batch_size: Samples in each virtual batch of training, or None for the whole batch. Sample i is in
            virtual batch i mod (N / virtual_batch_size).
        adjustment: Scale a and bias b that broadcast to the input, applied in training, or None.
        fused: None or True for the fastest kernel that can serve, False for PyTorch's composed operations.

    Returns:
        Tensor of the shape, type and memory format of `input`.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, shapes that do not fit, a batch that does not divide into virtual batches,
            a single value for each feature in training, or options that exclude each other.

    Source: Ioffe and Szegedy (2015); Ioffe, Batch Renormalization (2017), algorithm 1.

    >>> x = torch.tensor([[1.0, 10.0], [3.0, 20.0]])
    >>> batch_norm(x, None, None, training=True)
    tensor([[-1.0000, -1.0000],
            [ 1.0000,  1.0000]])
    """
    if (renorm_mean is None) != (renorm_stddev is None):
        raise ValueError("renorm_mean and renorm_stddev must be given together.")
    if renorm_mean is not None and (running_mean is None or running_var is None):
        raise ValueError("renorm_mean must come with running_mean and running_var; received None for one of them.")
    options = check(
        axis=axis,
        renorm=renorm_mean is not None,
        renorm_clipping=renorm_clipping,
        renorm_momentum=renorm_momentum,
        virtual_batch_size=virtual_batch_size,
        adjustment=None if adjustment is None else lambda shape: adjustment,
        fused=fused,
    )
    renorm = None if renorm_mean is None or renorm_stddev is None else (renorm_mean, renorm_stddev)
    y, _ = normalize(
        input,
        feature_axes(input, axis),
        options,
        running=(running_mean, running_var),
        weight=weight,
        bias=bias,
        training=training,
        momentum=momentum,
        eps=eps,
        renorm=renorm,
        clipping=options.renorm_clipping,
        renorm_momentum=renorm_momentum,
    )
    return y


def check(
    *,
    axis: Any,
    renorm: Any,
    renorm_clipping: Any,
    renorm_momentum: Any,
    virtual_batch_size: Any,
    adjustment: Callable[[Any], Any] | None,
    fused: Any,
) -> Options:
    """Check the options that PyTorch's own layer does not have; a schedule of limits is left for later."""
    scalar("renorm_momentum", renorm_momentum, 0, 1, "in [0, 1]")
    return Options(
        axis=axis,
        renorm=renorm,
        renorm_clipping=Clipping.of(None if callable(renorm_clipping) else renorm_clipping),
        virtual_batch_size=virtual_batch_size,
        adjustment=adjustment,
        fused=fused,
    )


def feature_axes(x: Tensor, axis: Any) -> tuple[int, ...]:
    """Count axes from the start, ascending."""
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    rank = x.dim()
    for one in given:
        if not -rank <= one < rank:
            raise ValueError(
                f"axis must be in [{-rank}, {rank}) for inputs of rank {rank}; received axis={axis} "
                f"and an input of shape {tuple(x.shape)}."
            )
    return tuple(sorted(one % rank for one in given))


def normalize(
    x: Tensor,
    axes: tuple[int, ...],
    options: Options,
    *,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    renorm: Pair | None,
    clipping: Clipping,
    renorm_momentum: float,
) -> tuple[Tensor, str]:
    """Normalize, move what is to be moved, and name the kernel that served. Nothing moves if anything is wrong."""
    if not training:
        return _evaluate(x, axes, options, running, weight, bias, eps)
    size = options.virtual_batch_size
    plain = axes == (1,) and renorm is None and size is None and options.adjustment is None
    others = (*running, weight, bias, *(renorm or ()))
    taken = native.takes(x, tuple([x.shape[axis] for axis in axes]), others)
    if not taken:
        wrong = _misfit(x, axes, others)
        if plain and (wrong or not _is_torch_s_mix(x, others)):  # PyTorch says what is wrong
            return torch.nn.functional.batch_norm(x, *running, weight, bias, True, 0.0, eps), TORCH
        if wrong:
            raise ValueError(wrong)
    count = _check_batch(x, axes, size, eps)
    pair, by_feature = (None, True) if options.adjustment is None else _adjust(options.adjustment, x, axes)
    mode = native.mode()
    kernel = _select(x, axes, options, momentum, plain, by_feature and count > 0, mode)
    if kernel == TORCH:
        return torch.nn.functional.batch_norm(x, *running, weight, bias, True, float(momentum), eps), kernel
    layout = composed.memory_format(x)
    keeps = kernel == KERNEL and len(axes) == 1
    own = _laid_out(x, layout) if keeps else _with_gradients_like(x, layout, mode)
    if kernel == KERNEL:
        averages = None
        if taken and not mode.traced and not torch.is_tensor(momentum):
            averages = native.Averages(running, momentum, count / (count - 1), renorm_momentum)
        y, both = native.forward(
            own,
            native.How(eps, axes, size),
            mode.traced,
            weight=weight,
            bias=bias,
            adjustment=None if pair is None else _flat(pair, x, axes),
            renorm=renorm,
            clipping=clipping,
            averages=averages,
        )
        y = _laid_out(y, layout)
        if both is None:
            return y, kernel
        moments = Moments(*both.mean(dim=1))
    else:
        seen = composed.plan(x, axes, size)
        y, moments = composed.train(
            own, seen, eps, weight=weight, bias=bias, adjustment=pair, renorm=renorm, clipping=clipping
        )
        y = y.contiguous(memory_format=layout)
    shape = [x.shape[axis] for axis in axes]
    moments = Moments(*(moment.reshape(shape) for moment in moments))
    if count > 0:
        _move(moments, count, running, momentum, eps, renorm, renorm_momentum)
    return y, kernel


class _GradientsLike(torch.autograd.Function):
    """The same, with a gradient in a given layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.contiguous(memory_format=ctx.layout), None


def _laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x if x.is_contiguous(memory_format=layout) else x.contiguous(memory_format=layout)


def _with_gradients_like(x: Tensor, layout: torch.memory_format, mode: native.Mode) -> Tensor:
    if mode.traced or mode.transformed:
        return x  # where a gradient comes from elsewhere, its layout is nothing to insist on
    kept: Tensor = _GradientsLike.apply(x, layout)  # type: ignore[no-untyped-call]
    return kept


def _select(
    x: Tensor,
    axes: tuple[int, ...],
    options: Options,
    momentum: float | Tensor,
    plain: bool,
    serves: bool,
    mode: native.Mode,
) -> str:
    if options.fused is False or mode.transformed:  # of which PyTorch's operator has wrong second derivatives
        return kernels.COMPOSED
    if plain and not mode.traced and is_small(x):
        return TORCH
    torch_serves = plain and not (torch.is_tensor(momentum) and torch.compiler.is_compiling())
    if torch_serves and mode.traced and torch.compiler.is_exporting():  # programs that hold nothing of this package
        return TORCH
    native_serves = serves and native.serves(x, axes, options.virtual_batch_size, mode)
    return kernels.select(options.fused, {KERNEL: native_serves, TORCH: torch_serves})


@torch.no_grad()
def _move(
    moments: Moments,
    count: int,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float | Tensor,
    eps: float,
    renorm: Pair | None,
    renorm_momentum: float,
) -> None:
    running_mean, running_var = running

    def move(average: Tensor, value: Tensor, weight: float | Tensor) -> None:
        average.lerp_(value.to(average.dtype), weight.to(average.dtype) if torch.is_tensor(weight) else weight)

    if running_mean is not None:
        move(running_mean, moments.mean, momentum)
    if renorm is None:
        if running_var is not None:
            move(running_var, algebra.bessel(xp, moments.variance, count), momentum)
        return
    sigma = algebra.stddev(xp, moments.variance, eps)
    if running_var is not None:
        running_stddev = algebra.stddev(xp, running_var.to(sigma.dtype), eps)
        move(running_stddev, sigma, momentum)
        running_var.copy_(algebra.inference_variance(xp, running_stddev, eps))
    move(renorm[0], moments.mean, renorm_momentum)
    move(renorm[1], sigma, renorm_momentum)


def _evaluate(
    x: Tensor,
    axes: tuple[int, ...],
    options: Options,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, str]:
    kernel = kernels.select(options.fused, {TORCH: axes == (1,)})
    if kernel != TORCH:
        _check_type(x)
        if eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    mean, variance = running
    if kernel == TORCH or mean is None or variance is None:
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), TORCH
    if wrong := _misfit(x, axes, (*running, weight, bias)):
        raise ValueError(wrong)
    layout = composed.memory_format(x)
    own, seen = _with_gradients_like(x, layout, native.mode()), composed.plan(x, axes, None)
    y = composed.evaluate(own, seen, eps, Moments(mean, variance), weight, bias)
    return y.contiguous(memory_format=layout), kernel


def _check_type(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"input must be of a floating-point type; received {x.dtype}.")


def _is_torch_s_mix(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Tell whether PyTorch's operator takes these types: all the same, or a short input and the rest float32."""
    if not x.is_floating_point():
        return False
    types = {value.dtype for value in others if value is not None}
    return not types or types == {x.dtype} or (types == {torch.float32} and x.dtype in (torch.float16, torch.bfloat16))


def _check_batch(x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None, eps: float) -> int:
    """Count the values of each feature in a (virtual) batch."""
    _check_type(x)
    if virtual_batch_size is not None and 0 in axes:
        raise ValueError(
            f"axis cannot include the batch axis 0 with virtual_batch_size={virtual_batch_size}; received axis={axes}."
        )
    shape = x.shape
    features = 1
    for axis in axes:
        features *= shape[axis]
    count = x.numel() // features if features else 0
    if virtual_batch_size is not None:
        samples = x.shape[0]
        if samples % virtual_batch_size:
            raise ValueError(
                f"virtual_batch_size must divide the batch size in training; received a batch of {samples} samples and "
                f"virtual_batch_size={virtual_batch_size}."
            )
        count = count // (samples // virtual_batch_size) if samples else 0
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    return count


def _misfit(x: Tensor, axes: tuple[int, ...], values: tuple[Tensor | None, ...]) -> str | None:
    """Say which statistic or parameter does not fit: it is elsewhere, or not of the shape of the feature axes."""
    shape, device = x.shape, x.device
    expected = torch.Size([shape[axis] for axis in axes])
    names = ("running_mean", "running_var", "weight", "bias", "renorm_mean", "renorm_stddev")
    for name, value in zip(names, values, strict=False):
        if value is None:
            continue
        if value.device != device:
            return f"{name} must be on the input's device, {device}; received one on {value.device}."
        if value.shape != expected:
            return (
                f"{name} must have shape {tuple(expected)} for an input of shape {tuple(shape)} with feature axes "
                f"{axes}; received shape {tuple(value.shape)}."
            )
    return None


def _adjust(adjustment: Callable[[Any], Any], x: Tensor, axes: tuple[int, ...]) -> tuple[Pair, bool]:
    """Ask for the adjustment of a batch, and tell whether it has one value for each feature."""
    pair = adjustment(x.shape)
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(f"adjustment must return a pair (scale, bias); {received(pair)}.")
    tensors, by_feature = [], True
    for value in pair:
        tensor = value if torch.is_tensor(value) else torch.as_tensor(value, device=x.device, dtype=composed.wide(x))
        if tensor.device != x.device:
            raise ValueError(
                f"adjustment must return tensors on the input's device, {x.device}; received one on {tensor.device}."
            )
        lead = x.dim() - tensor.dim()
        if lead < 0 or any(size not in (1, x.shape[lead + axis]) for axis, size in enumerate(tensor.shape)):
            raise ValueError(
                f"adjustment must return tensors that broadcast to the input's shape {tuple(x.shape)}; "
                f"received shape {tuple(tensor.shape)}."
            )
        by_feature = by_feature and all(size == 1 or lead + axis in axes for axis, size in enumerate(tensor.shape))
        tensors.append(tensor)
    return (tensors[0], tensors[1]), by_feature


def _flat(pair: Pair, x: Tensor, axes: tuple[int, ...]) -> Pair:
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    scale, bias = (value.expand(shape).reshape(-1) for value in pair)
    return scale, bias
