"""Batch normalization for Flax NNX: `flax.nnx.BatchNorm` with every option, on CPU kernels of our own.

The layer for Flax linen is `batchnorm.flax.linen.BatchNorm`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers

from batchnorm.core.options import flag
from batchnorm.core.options import sizes as checked_sizes
from batchnorm.core.schedules import ClippingSchedule
from batchnorm.jax import batch_norm
from batchnorm.jax.functional import checked_options

__all__ = ["BatchNorm", "ClippingSchedule"]

Array = Any
ZEROS, ONES = initializers.zeros_init(), initializers.ones_init()


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with batch renormalization, virtual batches, adjustment and several axes.

    Without an option it gives what Flax's layer gives, but for rounding: moments are right also where the mean is large
    beside the spread. Arguments, defaults, variables and the modes are those of Flax's layer, whose subclass this is.

    In training y = (((x − m)/σ·r + d)·a + b)·scale + bias with σ = sqrt(v + epsilon), where m and v are the mean and
    the biased variance of each feature over the batch, or over each virtual batch.

    Args:
        num_features: Size of the feature axis, or of each of several, in the order of the input's axes.
        use_running_average: Whether to normalize by ``mean`` and ``var``; the call may say so, too.
        axis: The feature axis, or several.
        momentum: Weight of the old value in the averages.
        epsilon: Added to the variance.
        dtype: Type of the result; by default that of input and parameters together.
        param_dtype: Type of the parameters.
        use_bias: Whether there is a ``bias``.
        use_scale: Whether there is a ``scale``.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: The mapped axis over which moments are taken together.
        axis_index_groups: Groups of indices of that axis, each with moments of its own.
        use_fast_variance: Taken as by Flax's layer, and without a meaning here: the exact variance is the fast one.
        promote_dtype: Function that promotes input, statistics and parameters to one type.
        rngs: Random numbers for the initializers.
        bias_metadata: Metadata of the bias.
        scale_metadata: Metadata of the scale.
        renorm: Whether to correct by batch renormalization (Ioffe, 2017); its averages are ``renorm_mean`` and
            ``renorm_stddev``.
        renorm_clipping: Limits of the correction, a mapping with any of the keys rmin, rmax and dmax, to numbers or
            scalar arrays; or a function of the number of steps to one, such as `ClippingSchedule`. The number is kept
            in ``steps``.
        renorm_momentum: Weight of the old value in renorm's averages; by default `momentum`.
        virtual_batch_size: Samples in each virtual batch at most, or None for the whole batch.
        adjustment: Function of the input's shape to a pair (a, b) that broadcasts to the input, applied in training.
        skip_nonfinite: Whether features with moments that are not finite keep their averages in that step.
        fused: None or True for the CPU kernels where they can serve, False for operations of XLA's only.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or options that exclude each other.

    Source: Ioffe and Szegedy (2015); Ioffe, Batch Renormalization (2017); Hoffer et al. (2017).

    >>> import jax.numpy as jnp
    >>> layer = BatchNorm(3, renorm=True, virtual_batch_size=8, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((32, 3)))
    >>> layer.eval()
    >>> layer(jnp.ones((5, 3))).shape
    (5, 3)
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        axis: int | tuple[int, ...] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Any] = ZEROS,
        scale_init: Callable[..., Any] = ONES,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] | None = None,
        scale_metadata: Mapping[str, Any] | None = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | Callable[[Array], Mapping[str, Any]] | None = None,
        renorm_momentum: float | None = None,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[Any], tuple[Array, Array]] | None = None,
        skip_nonfinite: bool = False,
        fused: bool | None = None,
    ) -> None:
        sizes = checked_sizes("num_features", num_features)
        renorm_momentum = momentum if renorm_momentum is None else renorm_momentum
        axis = checked_options(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            skip_nonfinite=skip_nonfinite,
            fused=fused,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            num_features=sizes,
        ).feature_axis

        def of_sizes(initializer: Callable[..., Any]) -> Callable[..., Any]:
            return lambda key, _, dtype: initializer(key, sizes, dtype)

        metadata = {"bias_metadata": bias_metadata or {}, "scale_metadata": scale_metadata or {}}
        known = inspect.signature(nnx.BatchNorm.__init__).parameters  # older versions of Flax have no metadata
        super().__init__(
            sizes[0],
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=of_sizes(bias_init),
            scale_init=of_sizes(scale_init),
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            **{name: value for name, value in metadata.items() if name in known},
        )
        if len(sizes) > 1:
            self.mean = nnx.BatchStat(jnp.zeros(sizes, jnp.float32))
            self.var = nnx.BatchStat(jnp.ones(sizes, jnp.float32))
        if renorm:
            self.renorm_mean = nnx.BatchStat(jnp.zeros(sizes, jnp.float32))
            self.renorm_stddev = nnx.BatchStat(jnp.ones(sizes, jnp.float32))
        if renorm and callable(renorm_clipping):
            self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.num_features = num_features
        self.renorm = flag("renorm", renorm)
        self.renorm_clipping = nnx.static(renorm_clipping)
        self.renorm_momentum = renorm_momentum
        self.virtual_batch_size = virtual_batch_size
        self.adjustment = adjustment
        self.skip_nonfinite = skip_nonfinite
        self.fused = fused

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None, update: bool = True
    ) -> Array:
        """Normalize a batch.

        Args:
            x: The batch, of any rank with the feature axes.
            use_running_average: Whether to normalize by ``mean`` and ``var``, before what the constructor said.
            mask: Which values count in the moments: booleans, or weights of at least 0, that broadcast to x.
            update: Whether the averages move in training.

        Returns:
            An array of the shape of x.
        """
        running = use_running_average if use_running_average is not None else self.use_running_average
        if running is None:
            raise ValueError(
                "No `use_running_average` argument was provided to BatchNorm. Pass it to the constructor or to the "
                "call, or make a view of the model by nnx.view(model, use_running_average=True/False)."
            )
        names = ("mean", "var", "renorm_mean", "renorm_stddev", "steps")
        variables = {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}
        statistics = {name: variable[...] for name, variable in variables.items()}
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        x, _, _, scale, bias = self.promote_dtype(
            (x, statistics["mean"], statistics["var"], scale, bias), dtype=self.dtype
        )
        y, moved = batch_norm(
            x,
            {"scale": scale, "bias": bias},
            statistics,
            training=not running,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            renorm_clipping=self.renorm_clipping if self.renorm else None,
            renorm_momentum=self.renorm_momentum,
            virtual_batch_size=self.virtual_batch_size,
            adjustment=None if running or self.adjustment is None else self.adjustment(x.shape),
            skip_nonfinite=self.skip_nonfinite,
            fused=self.fused,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            update=update,
        )
        if not running and update:
            for name, variable in variables.items():
                variable[...] = moved[name]
        return y
