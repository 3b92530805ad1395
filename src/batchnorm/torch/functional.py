"""The function, and the choice of who computes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.core import algebra, geometry, passes
from batchnorm.core import normalize as core
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Renorm
from batchnorm.core.options import Clipping, Options
from batchnorm.core.options import pair as checked_pair
from batchnorm.core.options import weight as weight_of_new

from . import autograd, cpu, layout, operators
from . import namespace as xp
from .cpu import KERNEL, Averages, Static

__all__ = ["TORCH", "Limits", "Pair", "batch_norm", "is_small", "is_traced", "normalize"]

Pair = tuple[Tensor, Tensor]
Limits = Mapping[str, float | Tensor] | None

TORCH = "torch"
"""The name of PyTorch's own operator, where a layer says which kernel served."""
SMALL = 1 << 17
"""Values up to which PyTorch's own operator takes less time than handing tensors to the CPU kernels; with features
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
    weight_of_new("momentum", momentum)
    weight_of_new("renorm_momentum", renorm_momentum)
    options = Options(
        axis=axis,
        decay=1 - momentum,
        center=bias is not None,
        scale=weight is not None,
        renorm=renorm_mean is not None,
        renorm_clipping=Clipping.of(renorm_clipping),
        renorm_decay=1 - renorm_momentum,
        virtual_batch_size=virtual_batch_size,
        adjustment=None if adjustment is None else lambda shape: adjustment,
        fused=fused,
    )
    renorm = None
    if renorm_mean is not None and renorm_stddev is not None:
        renorm = Renorm(renorm_mean, renorm_stddev, options.renorm_clipping)
    y, _ = normalize(
        input,
        geometry.counted_axes(axis if isinstance(axis, int) else tuple(axis), input.shape),
        options,
        running=(running_mean, running_var),
        weight=weight,
        bias=bias,
        training=training,
        momentum=momentum,
        eps=eps,
        renorm=renorm,
        renorm_momentum=renorm_momentum,
    )
    return y


def is_traced() -> bool:
    """Tell whether what is called now goes into a graph, or to a mode that looks at every operator."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Tell whether forward-mode derivatives or `torch.func` are at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


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
    renorm: Renorm | None,
    renorm_momentum: float,
) -> tuple[Tensor, str]:
    """Normalize, move what is to be moved, and name the kernel that served. Nothing moves if anything is wrong.

    Of `options` only what PyTorch's own layer does not have is read; the rest is given, as it is at this moment.
    """
    if not training:
        return _evaluate(x, axes, options, running, weight, bias, eps)
    size = options.virtual_batch_size
    plain = axes == (1,) and renorm is None and size is None and options.adjustment is None
    others = (*running, weight, bias, *(() if renorm is None else renorm[:2]))
    taken = cpu.takes(x, tuple([x.shape[axis] for axis in axes]), others)
    if not taken:
        wrong = _misfit(x, axes, others)
        if plain and (wrong or not _is_torch_s_mix(x, others)):  # PyTorch says what is wrong
            return torch.nn.functional.batch_norm(x, *running, weight, bias, True, 0.0, eps), TORCH
        if wrong:
            raise ValueError(wrong)
    plan, count = _checked(x, axes, size, eps)
    adjustment, by_feature = (None, True) if options.adjustment is None else _adjust(options, x, plan)
    traced, transformed = is_traced(), is_transformed()
    kernel = _select(x, plan, options.fused, momentum, plain, by_feature and count > 0, traced, transformed)
    if kernel == TORCH:
        return torch.nn.functional.batch_norm(x, *running, weight, bias, True, float(momentum), eps), kernel
    form = layout.memory_format(x)
    if kernel == KERNEL and len(axes) == 1:
        x = layout.in_format(x, form)
    elif not traced and not transformed:  # where a gradient comes from elsewhere, its layout is nothing to insist on
        x = layout.with_gradients_in_format(x, form)
    if kernel == KERNEL:
        static = Static(eps, axes, size)
        averages = None
        if traced:
            factor, offset = core.fold(xp, weight, bias, autograd.flat(x, plan, adjustment))
            y, group_moments = operators.forward(x, factor, offset, renorm, static)
        else:
            if taken and not torch.is_tensor(momentum):
                averages = Averages(running, momentum, True, renorm_momentum)
            old, limits = (None, None) if renorm is None else (renorm[:2], cpu.limits(renorm.clipping))
            y, group_moments = autograd.forward(x, weight, bias, adjustment, old, limits, static, plan, averages)
        y = layout.in_format(y, form)
        if averages is not None:
            return y, kernel
        moments = Moments(group_moments[0], group_moments[1], count)
        if renorm is None:
            moments = moments._replace(variance=algebra.unbiased_variance(xp, moments))
        averaged = algebra.average_groups(xp, moments, 0)
    else:
        trained = core.train(
            xp,
            x.to(layout.wide(x)),
            plan,
            eps,
            gamma=weight,
            beta=bias,
            adjustment=adjustment,
            renorm=renorm,
            unbiased=renorm is None,
        )
        y, averaged = trained.y.to(x.dtype).contiguous(memory_format=form), trained.averaged
    _move(averaged, plan, running, momentum, eps, renorm, renorm_momentum)
    return y, kernel


def _select(
    x: Tensor,
    plan: Geometry,
    fused: bool | None,
    momentum: float | Tensor,
    plain: bool,
    by_feature: bool,
    traced: bool,
    transformed: bool,
) -> str:
    """Choose who serves a training step; PyTorch's operator goes first where it is the faster one, or is wanted."""
    if transformed:  # of which PyTorch's operator has wrong second derivatives, and the kernels know nothing
        return passes.COMPOSED
    serves = {
        KERNEL: by_feature and cpu.serves(x, plan, traced),
        TORCH: plain and not (torch.is_tensor(momentum) and torch.compiler.is_compiling()),
    }
    # Exported programs are to hold nothing of this package.
    if torch.compiler.is_exporting() if traced else is_small(x):
        serves = {TORCH: serves.pop(TORCH), **serves}
    return passes.select(fused, serves)


@torch.no_grad()
def _move(
    averaged: Moments,
    plan: Geometry,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float | Tensor,
    eps: float,
    renorm: Renorm | None,
    renorm_momentum: float,
) -> None:
    mean, variance = (value.reshape(plan.feature_sizes) for value in averaged[:2])
    averages = {"moving_mean": running[0], "moving_variance": running[1]}
    if renorm is not None:
        averages |= {"renorm_mean": renorm.mean, "renorm_stddev": renorm.stddev}
    moved = algebra.step(
        xp,
        {name: average for name, average in averages.items() if average is not None},
        Moments(mean, variance, averaged.count),
        eps,
        rate=momentum,
        renorm_rate=renorm_momentum,
    )
    for name, value in moved.items():
        averages[name].copy_(value)  # type: ignore[union-attr]


def _evaluate(
    x: Tensor,
    axes: tuple[int, ...],
    options: Options,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, str]:
    kernel = passes.select(options.fused, {TORCH: axes == (1,)})
    if kernel != TORCH:
        _check_type(x)
        if eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    mean, variance = running
    if kernel == TORCH or mean is None or variance is None:
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), TORCH
    if wrong := _misfit(x, axes, (*running, weight, bias)):
        raise ValueError(wrong)
    form = layout.memory_format(x)
    if not is_traced() and not is_transformed():
        x = layout.with_gradients_in_format(x, form)
    plan = layout.plan(x, axes, None)
    y: Tensor = core.infer(xp, x.to(layout.wide(x)), plan, eps, mean, variance, gamma=weight, beta=bias)
    return y.to(x.dtype).contiguous(memory_format=form), kernel


# ---- Checks, in PyTorch's words.


def _check_type(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"input must be of a floating-point type; received {x.dtype}.")


def _is_torch_s_mix(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Tell whether PyTorch's operator takes these types: all the same, or a short input and the rest float32."""
    if not x.is_floating_point():
        return False
    types = {value.dtype for value in others if value is not None}
    return not types or types == {x.dtype} or (types == {torch.float32} and x.dtype in (torch.float16, torch.bfloat16))


def _checked(x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None, eps: float) -> tuple[Geometry, int]:
    """Work out the geometry of a training step, and count the values of each feature in a (virtual) batch."""
    _check_type(x)
    plan, count = layout.training_plan(x, axes, virtual_batch_size)
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    return plan, count


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


def _adjust(options: Options, x: Tensor, plan: Geometry) -> tuple[Pair, bool]:
    """Ask for the adjustment of a batch, and tell whether it has one value for each feature."""
    assert options.adjustment is not None
    first, second = (
        value if torch.is_tensor(value) else torch.as_tensor(value, device=x.device, dtype=layout.wide(x))
        for value in checked_pair(options.adjustment(x.shape))
    )
    for value in (first, second):
        if value.device != x.device:
            raise ValueError(
                f"adjustment must return tensors on the input's device, {x.device}; received one on {value.device}."
            )
    return (first, second), plan.check_adjustment((first.shape, second.shape), x.shape)
