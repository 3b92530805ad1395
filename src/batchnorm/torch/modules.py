"""The modules: PyTorch's batch normalization layers with every option."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._jit_internal import is_scripting
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.core import algebra, geometry
from batchnorm.core.options import Clipping, Options, received, small_number, weight

from . import checks, functional, layout
from . import namespace as xp
from .functional import Limits, Pair

__all__ = ["OPTIONS", "BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Layer"]

Adjustment = Callable[[torch.Size], Pair] | None
Schedule = Callable[[Tensor], Limits]

OPTIONS = {
    "renorm": False,
    "renorm_clipping": None,
    "renorm_momentum": 0.01,
    "virtual_batch_size": None,
    "adjustment": None,
    "fused": None,
    "skip_nonfinite": False,
    "synchronized": False,
    "process_group": None,
}
"""The options that PyTorch's own layers do not have, with their defaults."""
RENORM = ("renorm_mean", "renorm_stddev")
STATE = (*OPTIONS, "_given", "_asked", "_plain", "_simple", "_torch_evaluates", "kernel")
"""What a layer keeps beside what PyTorch's own does."""


class Layer(_BatchNorm):
    """What the modules of this package have in common.

    Attributes:
        kernel: Who served the last call: ``"cpu"``, ``"torch"`` (its own operator) or ``"composed"``.
        renorm_mean: renorm's average of the batches' means, or None without renorm.
        renorm_stddev: renorm's average of sqrt(v + eps), or None without renorm.
    """

    __jit_unused_properties__ = ("options",)
    if TYPE_CHECKING:  # the compiler of scripts would read these
        axis: int | tuple[int, ...] = 1
        renorm_mean: Tensor | None
        renorm_stddev: Tensor | None
        renorm_momentum: float
        kernel: str | None
    else:
        axis = 1

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        renorm: bool = False,
        renorm_clipping: Limits | Schedule = None,
        renorm_momentum: float = 0.01,
        virtual_batch_size: int | None = None,
        adjustment: Adjustment = None,
        fused: bool | None = None,
        skip_nonfinite: bool = False,
        synchronized: bool = False,
        process_group: Any = None,
    ) -> None:
        given = {
            "renorm": renorm,
            "renorm_clipping": renorm_clipping,
            "renorm_momentum": renorm_momentum,
            "virtual_batch_size": virtual_batch_size,
            "adjustment": adjustment,
            "fused": fused,
            "skip_nonfinite": skip_nonfinite,
            "synchronized": synchronized,
            "process_group": process_group,
        }
        checked(given, axis=self.axis, eps=eps, momentum=momentum, track_running_stats=track_running_stats)
        super().__init__(
            num_features,  # type: ignore[arg-type]  # several axes have several sizes
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
        )
        if not bias:  # an argument of PyTorch's own layers only since its newest versions
            self.register_parameter("bias", None)
        self.configure(given)
        self.reset_renorm()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; an option, eps or momentum is checked, and takes effect at the next call."""
        if "_given" not in self.__dict__ or name not in (*OPTIONS, "eps", "momentum"):
            super().__setattr__(name, value)
        elif name in OPTIONS:
            self.configure(self._given | {name: value})
        else:
            checked(self._given, **self._own() | {name: value})
            super().__setattr__(name, value)

    @property
    def options(self) -> Options:
        """All that is asked for at this moment, under the names of `batchnorm.core`."""
        return dataclasses.replace(
            checked(self._given, **self._own()), center=self.bias is not None, scale=self.weight is not None
        )

    def _own(self) -> dict[str, Any]:
        tracked = self.running_mean is not None  # also while `hold` says that they do not move
        return {"axis": self.axis, "eps": self.eps, "momentum": self.momentum, "track_running_stats": tracked}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but a process group, which is of this process alone."""
        state = self.__dict__.copy()
        if state.get("process_group") is not None:
            warnings.warn(
                "process_group is not pickled: the layer will be synchronized over the default group until it is set.",
                stacklevel=2,
            )
            state["process_group"] = None
            state["_given"] = state["_given"] | {"process_group": None}
        return state

    def __copy__(self) -> Layer:
        new: Layer = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        """Copy all but the process group, which the copy has, too."""
        new: Layer = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def configure(self, given: dict[str, Any]) -> None:
        """Take over options; renorm's averages are made, or go."""
        asked = checked(given, **self._own())
        self._asked, self._given = asked, given
        self._plain = Options(axis=self.axis, fused=asked.fused)  # of evaluation
        named = (asked.renorm, asked.virtual_batch_size, asked.adjustment, asked.skip_nonfinite, asked.synchronized)
        self._simple = named == (False, None, None, False, False) and self.axis == 1 and asked.fused is not False
        self._torch_evaluates = self.axis == 1 and asked.fused is not False
        for name, value in given.items():
            super().__setattr__(name, value)
        if asked.renorm:
            assert self.running_mean is not None
            assert self.running_var is not None
            if getattr(self, "renorm_mean", None) is None:
                with torch.no_grad():
                    self.register_buffer("renorm_mean", self.running_mean.clone())
                    self.register_buffer("renorm_stddev", algebra.stddev(xp, self.running_var, self.eps))
        else:
            for name in RENORM:
                self.register_buffer(name, None)
        self.kernel = None

    def reset_renorm(self) -> None:
        """Begin renorm's averages anew, at mean 0 and standard deviation 1."""
        if self.renorm_mean is not None and self.renorm_stddev is not None:
            self.renorm_mean.zero_()
            self.renorm_stddev.fill_(1)

    def reset_parameters(self) -> None:
        """Set parameters, running statistics and renorm's averages to what they are at first."""
        super().reset_parameters()
        if getattr(self, "renorm_mean", None) is not None:
            self.reset_renorm()

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize a batch; in training by itself, moving the statistics.

        Args:
            input: Batch.
            mask: What counts, one value for each position: booleans, or weights that are not negative; of the input's
                shape without the feature axes, or with size 1 on them. What weighs nothing is not looked at, and 0 in
                the output.
        """
        if is_scripting():  # which compiles this branch alone, and comes here in evaluation
            assert mask is None
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.0, self.eps
            )
        else:  # noqa: RET505  # the compiler of scripts takes a branch as it stands
            return self._forward(input, mask)

    def _forward(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            return self._record(input, mask)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        state = self._state()
        mean, variance, _, _, weight, bias = state
        if self._simple and mask is None and self.training and layout.is_eager() and functional.is_small(input):
            return self._forward_small(input, state)
        if mask is None and not self.training and self._torch_evaluates and mean is not None:
            y = nn.functional.batch_norm(layout.canonical(input), mean, variance, weight, bias, False, 0.0, self.eps)
            if not torch.compiler.is_compiling():
                self.__dict__["kernel"] = functional.TORCH
            return y
        batches, momentum = self._counted()
        renorm = self.training and mean is not None
        y, kernel, moved = functional.normalize(
            input,
            self.axes(input),
            self._asked if self.training else self._plain,
            state if renorm else state._replace(renorm_mean=None, renorm_stddev=None),
            functional.Step(
                momentum,
                self.eps,
                self._clipping() if renorm else Clipping(),
                self.renorm_momentum,
                self.track_running_stats,
            ),
            training=self.training or (mean is None and variance is None),
            mask=mask,
            process_group=self.process_group,
        )
        if batches is not None:
            batches.add_(1 if moved is True else moved)  # a bool takes microseconds longer
        if not torch.compiler.is_compiling():
            self.__dict__["kernel"] = kernel  # by itself setting an attribute of a module takes microseconds
        return y

    def _forward_small(self, input: Tensor, state: functional.State) -> Tensor:
        """Train plainly on few values, where microseconds count, as `functional.normalize` would."""
        batches, momentum = self._counted()
        mean, variance, _, _, weight, bias = state
        if not self.track_running_stats:
            mean = variance = None
        y = nn.functional.batch_norm(
            layout.canonical(input), mean, variance, weight, bias, True, float(momentum), self.eps
        )
        if batches is not None:
            batches.add_(1)
        self.__dict__["kernel"] = functional.TORCH
        return y

    def _state(self) -> functional.State:
        """The tensors of the layer; each would take half a microsecond as an attribute, which a module searches for."""
        found = {} if torch.compiler.is_compiling() else {**self._parameters, **self._buffers}
        names = functional.State._fields  # and a parametrized one is an attribute only
        return functional.State(*[found[name] if name in found else getattr(self, name) for name in names])

    def _counted(self) -> tuple[Tensor | None, Any]:
        """The counter of batches where it is to move, and the weight of the new value: with None, a plain average's."""
        batches = self.num_batches_tracked if self.training and self.track_running_stats else None
        compiling = torch.compiler.is_compiling()
        if batches is not None and not compiling and batches.is_inference():
            checks.moved({"num_batches_tracked": batches})
        if self.momentum is not None:
            return batches, self.momentum
        if batches is None:
            return None, 0.0
        at_hand = batches.is_cpu and not compiling  # a graph cannot look at it, and from elsewhere it would take a wait
        return batches, 1.0 / ((float(batches) if at_hand else batches) + 1)

    def __prepare_scriptable__(self) -> Layer:
        """Say what `torch.jit.script` cannot do, before it tries."""
        if self.training or self.axis != 1:
            raise NotImplementedError(
                f"torch.jit.script compiles these layers in evaluation and with axis=1; received a layer with "
                f"training={self.training} and axis={self.axis}. Call model.eval() first, or use torch.jit.trace."
            )
        return self

    def _record(self, input: fx.Proxy, mask: Any) -> Any:
        """Put a call of this module into a graph of `torch.fx`, as it does with PyTorch's own layers."""
        try:
            name = input.tracer.path_of_module(self)  # type: ignore[attr-defined]
        except NameError:
            name = ""
        if not name:
            raise TypeError(
                f"{type(self).__name__} cannot be traced by itself, as it stays one call in a graph; trace a module "
                f"that holds it, such as torch.nn.Sequential."
            )
        return input.tracer.create_proxy("call_module", name, (input,), {} if mask is None else {"mask": mask})

    def axes(self, input: Tensor) -> tuple[int, ...]:
        """Count the feature axes of an input from the start."""
        return (1,)

    def _clipping(self) -> Clipping:
        if not callable(self.renorm_clipping):
            return self._asked.renorm_clipping
        return Clipping.of(self.renorm_clipping(self.num_batches_tracked))

    def extra_repr(self) -> str:
        """Describe the layer as PyTorch does, and the options that are not at their defaults."""
        others = [
            f"{name}={getattr(self, name)!r}" for name, default in OPTIONS.items() if getattr(self, name) != default
        ]
        return ", ".join([super().extra_repr(), *others])  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # What was trained without renorm begins it where convert() does.
        mean, variance = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        known = any(prefix + name in state_dict for name in RENORM)
        if self.renorm_mean is not None and not known and mean is not None and variance is not None:
            state_dict[prefix + "renorm_mean"] = mean.clone()
            state_dict[prefix + "renorm_stddev"] = algebra.stddev(xp, variance, self.eps)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def checked(
    given: dict[str, Any], *, axis: int | tuple[int, ...], eps: Any, momentum: Any, track_running_stats: bool
) -> Options:
    """Check everything that a layer is asked for, before it has changed; a schedule of limits is left for later."""
    if torch.is_tensor(eps):
        raise TypeError(f"eps must be a number; {received(eps)}.")
    small_number("eps", eps)
    for name, value in (("momentum", momentum), ("renorm_momentum", given["renorm_momentum"])):
        if value is not None or name != "momentum":
            weight(name, value)
    clipping = given["renorm_clipping"]
    options = Options(
        axis=axis,
        decay=Options.decay if momentum is None else 1 - momentum,
        epsilon=eps,
        renorm=given["renorm"],
        renorm_clipping=Clipping.of(None if callable(clipping) else clipping),
        renorm_decay=1 - given["renorm_momentum"],
        virtual_batch_size=given["virtual_batch_size"],
        adjustment=given["adjustment"],
        fused=given["fused"],
        skip_nonfinite=given["skip_nonfinite"],
        cumulative=momentum is None,
        synchronized=given["synchronized"],
    )
    checks.process_group(given["process_group"], options.synchronized)
    if options.renorm and not track_running_stats:
        raise ValueError("track_running_stats must be True with renorm=True; received False.")
    return options


class BatchNorm1d(Layer, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with batch renormalization, virtual batches and adjustment; shapes (N, C) or (N, C, L).

    See `BatchNorm` for the mathematics and the arguments.

    >>> layer = BatchNorm1d(2, virtual_batch_size=2)
    >>> layer(torch.tensor([[0.0, 1.0], [0.0, 5.0], [2.0, 3.0], [4.0, 9.0]]))
    tensor([[-1.0000, -1.0000],
            [-1.0000, -1.0000],
            [ 1.0000,  1.0000],
            [ 1.0000,  1.0000]], grad_fn=<_ForwardBackward>)
    """


class BatchNorm2d(Layer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with batch renormalization, virtual batches and adjustment; shape (N, C, H, W).

    See `BatchNorm` for the mathematics and the arguments.

    >>> layer = BatchNorm2d(3, renorm=True)
    >>> layer(torch.rand(4, 3, 8, 8)).shape
    torch.Size([4, 3, 8, 8])
    """


class BatchNorm3d(Layer, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with batch renormalization, virtual batches and adjustment; shape (N, C, D, H, W).

    See `BatchNorm` for the mathematics and the arguments.

    >>> layer = BatchNorm3d(3, momentum=None)
    >>> layer(torch.rand(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """


class BatchNorm(Layer):
    """Batch normalization of any rank along any axis, or several.

    In training y = (((x − m)/σ·r + d)·a + b)·weight + bias with σ = sqrt(v + eps), where m and v are the mean and the
    biased variance of each feature over the batch, or over each virtual batch. With renorm

        r = clip(σ/s, rmin, rmax),  d = clip((m − renorm_mean)/s, −dmax, dmax),  s = max(renorm_stddev, sqrt(eps)),

    constants to the gradient, from before this batch; without it r = 1 and d = 0. (a, b) is the adjustment, or (1, 0).
    In evaluation m and v are the running statistics, and r, d, a, b are left out. Arguments not named here are those of
    `torch.nn.BatchNorm2d`, with the same defaults.

    Args:
        num_features: Size of the feature axis; for several axes a tuple of their sizes, ascending by axis. Parameters
            and statistics have that shape.
        axis: The feature axis, or several; negative ones count from the end.
        renorm: Whether to correct by batch renormalization. Then `running_var` follows from an average of σ.
        renorm_clipping: Limits of the correction: a mapping with any of the keys rmin, rmax and dmax to numbers or
            scalar tensors, or a function from the number of batches tracked (a tensor) to such a mapping, for instance
            a `ClippingSchedule`.
        renorm_momentum: Weight of the new value in renorm's averages.
        virtual_batch_size: Samples in each virtual batch of training, at most; of N samples, sample i is in virtual
            batch i mod ⌈N / virtual_batch_size⌉, so that their sizes differ by one at most. Running statistics move to
            the mean over virtual batches, by the number of samples.
        adjustment: Function of the input's shape to a pair (a, b) that broadcasts to it. Not with virtual batches.
        fused: None or True for the fastest kernel that can serve, False for PyTorch's composed operations.
        skip_nonfinite: Whether a feature whose m or v is not finite, in any virtual batch, keeps its averages in that
            step. Otherwise they are lost, and with renorm every later batch. Not with ``momentum=None``.
        synchronized: Whether m and v are those of all values in a process group of `torch.distributed`, if there is
            one: all its processes call the layer alike, each with a batch of any size, or an empty one. Not with
            virtual batches.
        process_group: That group, or None for the default one. A copy of the layer has it, too; a pickle has None, with
            a warning.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or for options that exclude each other.

    Source: Ioffe and Szegedy (2015); Ioffe, Batch Renormalization (2017), algorithm 1; Hoffer, Hubara and Soudry (2017)
    for virtual ("ghost") batches.

    >>> layer = BatchNorm((3, 5), axis=(1, -1), renorm=True)
    >>> layer(torch.rand(8, 3, 4, 5)).shape, layer.running_mean.shape
    (torch.Size([8, 3, 4, 5]), torch.Size([3, 5]))
    """

    def __init__(
        self, num_features: int | tuple[int, ...], axis: int | tuple[int, ...] = 1, *arguments: Any, **options: Any
    ) -> None:
        # Module's own attributes come with super().__init__(), plain ones may be set before.
        self.axis = tuple(axis) if isinstance(axis, (list, tuple)) else axis
        Options(axis=self.axis)  # checks it
        sizes = num_features if isinstance(num_features, (list, tuple)) else (num_features,)
        if len(sizes) != (len(self.axis) if isinstance(self.axis, tuple) else 1):
            raise ValueError(f"num_features must have one size for each axis of {axis}; {received(num_features)}.")
        super().__init__(num_features, *arguments, **options)

    def axes(self, input: Tensor) -> tuple[int, ...]:
        """Count the feature axes of an input from the start."""
        return geometry.counted_axes(self.axis, input.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        self.axes(input)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{super().extra_repr()}, axis={self.axis}"
