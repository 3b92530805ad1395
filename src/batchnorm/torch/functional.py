"""The function, and the choice of who computes it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core import algebra, geometry, passes
from batchnorm.core import normalize as core
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Renorm
from batchnorm.core.options import Clipping, Options, received
from batchnorm.core.options import weight as weight_of_new

from . import autograd, checks, cpu, layout, operators, synchronized
from . import namespace as xp
from .autograd import Call
from .checks import Pair
from .cpu import KERNEL, Averages, Static
from .layout import ChannelsLast
from .synchronized import Replicas

__all__ = ["TORCH", "Limits", "Pair", "Result", "State", "Step", "batch_norm", "is_small", "normalize", "sequence_mask"]

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
    mask: Tensor | None = None,
    skip_nonfinite: bool = False,
    synchronized: bool = False,
    process_group: Any = None,
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
        virtual_batch_size: Samples in each virtual batch of training, at most, or None for the whole batch. Sample i is
            in virtual batch i mod ⌈N / virtual_batch_size⌉.
        adjustment: Scale a and bias b that broadcast to the input, applied in training, or None.
        fused: None or True for the fastest kernel that can serve, False for PyTorch's composed operations.
        mask: What counts, one value for each position: booleans, or weights that are not negative; of the input's shape
            without the feature axes, or with size 1 on them. What weighs nothing is not looked at, and 0 in the output.
        skip_nonfinite: Whether a feature whose m or v is not finite keeps its averages.
        synchronized: Whether m and v are those of all values in a process group of `torch.distributed`, if there is
            one. All its processes call this, one with an empty batch too.
        process_group: That group, or None for the default one.

    Returns:
        Tensor of the shape, type and memory format of `input`.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, shapes that do not fit, a single value for each feature in training, or
            options that exclude each other.

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
    if torch.is_tensor(eps):
        raise TypeError(f"eps must be a number; {received(eps)}.")
    weight_of_new("momentum", momentum)
    weight_of_new("renorm_momentum", renorm_momentum)
    options = Options(
        axis=axis,
        decay=1 - momentum,
        epsilon=eps,
        center=bias is not None,
        scale=weight is not None,
        renorm=renorm_mean is not None,
        renorm_clipping=Clipping.of(renorm_clipping),
        renorm_decay=1 - renorm_momentum,
        virtual_batch_size=virtual_batch_size,
        adjustment=None if adjustment is None else lambda shape: adjustment,
        fused=fused,
        skip_nonfinite=skip_nonfinite,
        synchronized=synchronized,
    )
    checks.process_group(process_group, options.synchronized)
    return normalize(
        input,
        geometry.counted_axes(options.feature_axis, input.shape),
        options,
        State(running_mean, running_var, renorm_mean, renorm_stddev, weight, bias),
        Step(momentum, eps, options.renorm_clipping, renorm_momentum),
        training=training,
        mask=mask,
        process_group=process_group,
    ).y


def sequence_mask(lengths: Tensor, size: int) -> Tensor:
    """A mask of sequences that are filled up to a size: True at position i where i < length.

    Args:
        lengths: Lengths, ints of any shape.
        size: Positions of each sequence.

    Returns:
        Booleans, of the shape of `lengths` and one axis more.

    Raises:
        TypeError: If the lengths are no tensor of ints.

    >>> sequence_mask(torch.tensor([1, 3]), 3)
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be a tensor of ints; received {getattr(lengths, 'dtype', lengths)!r}.")
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


class State(NamedTuple):
    """The tensors of a layer, and None for what it does not have."""

    running_mean: Tensor | None
    running_var: Tensor | None
    renorm_mean: Tensor | None
    renorm_stddev: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def averages(self) -> dict[str, Tensor | None]:
        """What moves, by name."""
        return dict(zip(checks.STATISTICS, self, strict=False))


class Step(NamedTuple):
    """The numbers of a step, as they are at this moment, and whether the averages move in training.

    Where they do not, renorm corrects by its own as they stand.
    """

    momentum: float | Tensor
    eps: float
    clipping: Clipping
    renorm_momentum: float
    moves: bool = True


class Result(NamedTuple):
    """What a call gives: the output, the name of the kernel that served, and whether an average has moved."""

    y: Tensor
    kernel: str
    moved: bool | Tensor = True


def normalize(
    x: Tensor,
    axes: tuple[int, ...],
    options: Options,
    state: State,
    step: Step,
    *,
    training: bool,
    mask: Tensor | None = None,
    process_group: Any = None,
) -> Result:
    """Normalize, and move what is to be moved. Nothing moves if anything is wrong.

    Of `options` only what PyTorch's own layer does not have is read; the rest is in `step`.
    """
    x = layout.canonical(x)
    if not training:
        return _evaluate(x, axes, options, state, step.eps, mask)
    momentum, eps, _, _, moves = step
    replicas = synchronized.replicas(x, options.synchronized, process_group)
    traced, transformed = layout.is_traced(), layout.is_transformed()
    size = options.virtual_batch_size
    plain = axes == (1,) and state.renorm_mean is None and size is None and options.adjustment is None
    plain = plain and mask is None and not options.skip_nonfinite and replicas is None
    if traced and layout.is_exported():
        if not plain or options.fused is False or torch.is_tensor(momentum):
            raise NotImplementedError(
                "A training step with an option or with momentum=None cannot be exported or recorded: whoever moves "
                "the program to evaluation would not find it there, and it would go on training. Call model.eval() "
                "first, or batchnorm.torch.revert(model)."
            )
        return _train_torch(x, state, step)
    readable = not traced and cpu.can_read(x, tuple([x.shape[axis] for axis in axes]), state)
    if not readable:
        wrong = checks.misfit(x, axes, state._asdict())
        if plain and (wrong or not checks.is_torch_s_mix(x, state)):  # PyTorch says what is wrong
            return _train_torch(x, state, step)
        if wrong:
            raise wrong
    plan, count = checks.training_plan(x, axes, size, eps, single=mask is not None or replicas is not None)
    weights = None if mask is None else checks.weights(mask, x, plan)
    adjustment, by_feature = (None, True) if options.adjustment is None else checks.adjustment(options, x, plan)
    if plain and not readable and not traced:  # PyTorch's operator would move a copy of such a view
        plain = not any(value is not None and value.is_neg() for value in state.averages.values())
    able = by_feature and (readable or traced or cpu.are_plain((*state, *(adjustment or ()))))
    # An empty batch takes the path of the other replicas; a graph fuses the passes around its collectives.
    able = able and (x.numel() > 0 if replicas is None else not traced)
    kernel = _select(x, plan, options.fused, momentum, plain, able, traced, transformed)
    if kernel == TORCH:
        return _train_torch(x, state, step)
    if moves and not traced and not (readable and kernel == KERNEL):
        checks.moved(state.averages)
    batch = Batch(x, plan, count, adjustment, weights, replicas)
    if kernel == KERNEL:
        return _train_kernels(batch, options, state, step, traced, readable)
    return _train_composed(batch, options, state, step, eager=not (traced or transformed))


class Batch(NamedTuple):
    """What a training step goes over, after all checks, and who else takes part.

    Attributes:
        x: The input.
        plan: Its geometry.
        least: Values of each feature in the smallest virtual batch.
        adjustment: a and b, or None.
        weights: What each position counts, or None.
        replicas: Who else has a part of the batch, or None.
    """

    x: Tensor
    plan: Geometry
    least: int
    adjustment: Pair | None
    weights: Tensor | None
    replicas: Replicas | None


def _train_torch(x: Tensor, state: State, step: Step) -> Result:
    """Train plainly by PyTorch's own operator, which moves the averages, too."""
    running_mean, running_var = state[:2] if step.moves else (None, None)
    momentum = float(step.momentum) if torch.is_tensor(step.momentum) else step.momentum
    y = torch.nn.functional.batch_norm(x, running_mean, running_var, state.weight, state.bias, True, momentum, step.eps)
    return Result(y, TORCH)


def _train_kernels(batch: Batch, options: Options, state: State, step: Step, traced: bool, readable: bool) -> Result:
    """Train by the CPU kernels, which move the averages, too, where these are such that they can."""
    form = layout.memory_format(batch.x)
    x = layout.in_format(batch.x, form)
    if x is not batch.x:
        batch = batch._replace(x=x)
    # Of replicas each would have its features in an order of its own.
    last = layout.channels_last(batch.x, batch.plan) if batch.replicas is None else None
    direct = step.moves and readable and last is None and not torch.is_tensor(step.momentum)
    if last is None:
        y, moments, counts, moved = _call_kernels(batch, options, state, step, traced, direct)
        y = layout.in_format(y, form)
    else:
        there = State(*(None if value is None else last.parameter(value) for value in state))
        y, moments, counts, moved = _call_kernels(_seen(batch, last), options, there, step, traced, direct)
        y = y.movedim(-1, 1)
    if not step.moves:
        return Result(y, KERNEL)
    if direct:
        return Result(y, KERNEL, moved)
    found = Moments(moments[0], moments[1], batch.least)
    if counts is not None:
        found = found._replace(count=counts[0].unsqueeze(1), square_count=counts[1].unsqueeze(1))
    averaged = core.average(xp, found, 0, state.renorm_mean is None)
    if last is None:
        averaged = algebra.reshaped(xp, averaged, batch.plan.feature_sizes)
    else:
        averaged = last.back(algebra.reshaped(xp, averaged, last.plan.feature_sizes))
    return Result(y, KERNEL, _move(averaged, state, step, options.skip_nonfinite))


def _seen(batch: Batch, last: ChannelsLast) -> Batch:
    """A batch in the format channels last as it lies."""
    adjustment, weights = batch.adjustment, batch.weights
    if adjustment is not None:
        adjustment = last.values(adjustment[0]), last.values(adjustment[1])
    return batch._replace(
        x=last.values(batch.x),
        plan=last.plan,
        adjustment=adjustment,
        weights=None if weights is None else last.values(weights),
    )


def _call_kernels(
    batch: Batch, options: Options, state: State, step: Step, traced: bool, direct: bool
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Call the kernels, in a graph or now, and let them move the averages where that is `direct`.

    Returns:
        What `autograd.forward` does.
    """
    x, plan, _, adjustment, weights, replicas = batch
    static = Static(step.eps, plan.axes, plan.virtual_batch_size)
    renorm = _renorm(state, step)
    if traced:
        factor, offset = core.fold(xp, state.weight, state.bias, autograd.flat(x, plan, adjustment))
        return *operators.forward(x, factor, offset, renorm, weights, static), True
    averages = None
    if direct:
        running = state.running_mean, state.running_var
        averages = Averages(running, float(step.momentum), step.renorm_momentum, options.skip_nonfinite)
    later = averages is not None and _may_yet_raise(x)
    old, limits = (None, None) if renorm is None else (renorm[:2], cpu.limits(renorm.clipping))
    call = Call(static, plan, old, limits, weights, None if later else averages, replicas)
    y, moments, counts, moved = autograd.forward(x, state.weight, state.bias, adjustment, call)
    if averages is not None and later:
        moved = cpu.move(x, moments, counts, old, static, averages)
    return y, moments, counts, moved


def _train_composed(batch: Batch, options: Options, state: State, step: Step, eager: bool) -> Result:
    """Train by PyTorch's operations, one after the other."""
    x, plan, _, adjustment, weights, replicas = batch
    form = layout.memory_format(x)
    if eager:  # else a gradient comes from elsewhere, and its layout is nothing to insist on
        x = layout.with_gradients_in_format(x, form)
    trained = core.train(
        xp,
        x.to(layout.accumulation_dtype(x.dtype)),
        plan,
        step.eps,
        gamma=state.weight,
        beta=state.bias,
        adjustment=adjustment,
        renorm=_renorm(state, step),
        weights=weights,
        masked="zero",
        unbiased=state.renorm_mean is None,
        merge=None if replicas is None else replicas.merge_of(x, weights is not None),
    )
    y = trained.y.to(x.dtype).contiguous(memory_format=form)
    if not step.moves:
        return Result(y, passes.COMPOSED)
    averaged = algebra.reshaped(xp, trained.averaged, plan.feature_sizes)
    return Result(y, passes.COMPOSED, _move(averaged, state, step, options.skip_nonfinite))


def _renorm(state: State, step: Step) -> Renorm | None:
    if state.renorm_mean is None or state.renorm_stddev is None:
        return None
    return Renorm(state.renorm_mean, state.renorm_stddev, step.clipping)


def _select(
    x: Tensor,
    plan: Geometry,
    fused: bool | None,
    momentum: float | Tensor,
    plain: bool,
    able: bool,
    traced: bool,
    transformed: bool,
) -> str:
    """Choose who serves a training step; PyTorch's operator goes first where it is the faster one, or is wanted."""
    if transformed:  # of which PyTorch's operator has wrong second derivatives, and the kernels know nothing
        return passes.COMPOSED
    serves = {
        KERNEL: able and cpu.serves(x, plan, traced),
        TORCH: plain and not (torch.is_tensor(momentum) and torch.compiler.is_compiling()),
    }
    if not traced and is_small(x):
        serves = {TORCH: serves.pop(TORCH), **serves}
    return passes.select(fused, serves)


@torch.no_grad()
def _move(moments: Moments, state: State, step: Step, skip_nonfinite: bool) -> bool | Tensor:
    """Move the averages, and tell whether one has moved."""
    names = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    averages = {names.get(name, name): value for name, value in state.averages.items() if value is not None}
    new, moves = algebra.track(
        xp,
        averages,
        moments,
        step.eps,
        rate=step.momentum,
        renorm_rate=step.renorm_momentum,
        skip_nonfinite=skip_nonfinite,
    )
    for name, value in new.items():
        averages[name].copy_(value)
    return moves.any() if torch.is_tensor(moves) else True  # an empty batch is counted, as by PyTorch's own layer


def _evaluate(
    x: Tensor, axes: tuple[int, ...], options: Options, state: State, eps: float, mask: Tensor | None
) -> Result:
    kernel = passes.select(options.fused, {TORCH: axes == (1,)})
    if kernel != TORCH and eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    mean, variance, _, _, weight, bias = state
    plan = weights = None
    if mask is not None:
        plan = layout.plan(x, axes, None)
        weights = checks.weights(mask, x, plan)
    if kernel == TORCH or mean is None or variance is None:
        if weights is not None:  # what is masked is not looked at, nor its gradient
            x = torch.where(weights > 0, x, 0)
        y = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        return Result(y if weights is None else torch.where(weights > 0, y, 0), TORCH)
    with layout.known_sizes() if layout.is_recorded() else contextlib.nullcontext():
        if wrong := checks.misfit(x, axes, state._replace(renorm_mean=None, renorm_stddev=None)._asdict()):
            raise wrong
        form = layout.memory_format(x)
        plan = plan or layout.plan(x, axes, None)
    if layout.is_eager():
        x = layout.with_gradients_in_format(x, form)
    y = core.infer(
        xp,
        x.to(layout.accumulation_dtype(x.dtype)),
        plan,
        eps,
        mean,
        variance,
        gamma=weight,
        beta=bias,
        weights=weights,
        masked="zero",
    )
    return Result(y.to(x.dtype).contiguous(memory_format=form), kernel)


def _may_yet_raise(x: Tensor) -> bool:
    """Tell whether a call can fail after the kernels: when an inference tensor is to be saved, or in a user's hook."""
    return x.is_inference() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
