"""Batch normalization for Flax linen: `flax.linen.BatchNorm` with every option, on CPU kernels of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import dtypes
from flax.linen.module import merge_param

from batchnorm.core import geometry
from batchnorm.core.schedules import ClippingSchedule
from batchnorm.jax import batch_norm
from batchnorm.jax.functional import checked_options

__all__ = ["BatchNorm", "ClippingSchedule"]

Array = Any


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` with batch renormalization, virtual batches and adjustment.

    Without an option it gives what Flax's layer gives, but for rounding: moments are right also where the mean is large
    beside the spread. Arguments, defaults and collections are those of Flax's layer, whose subclass this is; what it
    has and this list has not means the same. ``use_fast_variance`` and ``force_float32_reductions`` have no meaning
    here: the exact variance is the fast one, and statistics are always float32 or wider.

    In training y = (((x − m)/σ·r + d)·a + b)·scale + bias with σ = sqrt(v + epsilon), where m and v are the mean and
    the biased variance of each feature over the batch, or over each virtual batch.

    Attributes:
        axis: The feature axis, or several.
        renorm: Whether to correct by batch renormalization (Ioffe, 2017); its averages are ``renorm_mean`` and
            ``renorm_stddev`` in ``batch_stats``.
        renorm_clipping: Limits of the correction, a mapping with any of the keys rmin, rmax and dmax, to numbers or
            scalar arrays; or a function of the number of steps to one, such as `ClippingSchedule`. The number is kept
            in ``steps`` in ``batch_stats``.
        renorm_momentum: Weight of the old value in renorm's averages; by default `momentum`.
        virtual_batch_size: Samples in each virtual batch at most, or None for the whole batch.
        adjustment: Function of the input's shape to a pair (a, b) that broadcasts to the input, applied in training.
        skip_nonfinite: Whether features with moments that are not finite keep their averages in that step.
        fused: None or True for the CPU kernels where they can serve, False for operations of XLA's only.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, or options that exclude each other.

    Source: Ioffe and Szegedy (2015); Ioffe, Batch Renormalization (2017); Hoffer et al. (2017).

    >>> import jax, jax.numpy as jnp
    >>> layer = BatchNorm(use_running_average=False, renorm=True)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((32, 3)))
    >>> y, moved = layer.apply(variables, jnp.ones((32, 3)), mutable=["batch_stats"])
    >>> sorted(moved["batch_stats"])
    ['mean', 'renorm_mean', 'renorm_stddev', 'var']
    """

    axis: int | tuple[int, ...] = -1
    renorm: bool = False
    renorm_clipping: Mapping[str, Any] | Callable[[Array], Mapping[str, Any]] | None = None
    renorm_momentum: float | None = None
    virtual_batch_size: int | None = None
    adjustment: Callable[[Any], tuple[Array, Array]] | None = None
    skip_nonfinite: bool = False
    fused: bool | None = None

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None, update: bool = True
    ) -> Array:
        """Normalize a batch. While variables are initialized, nothing moves and no axis needs to be there.

        Args:
            x: The batch, of any rank with the feature axes.
            use_running_average: Whether to normalize by ``mean`` and ``var``.
            mask: Which values count in the moments: booleans, or weights of at least 0, that broadcast to x.
            update: Whether the averages move in training.

        Returns:
            An array of the shape of x.
        """
        running = merge_param("use_running_average", self.use_running_average, use_running_average)
        renorm_momentum = self.momentum if self.renorm_momentum is None else self.renorm_momentum
        x = jnp.asarray(x)
        axis = checked_options(
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            renorm=self.renorm,
            renorm_clipping=self.renorm_clipping,
            renorm_momentum=renorm_momentum,
            virtual_batch_size=self.virtual_batch_size,
            adjustment=self.adjustment,
            skip_nonfinite=self.skip_nonfinite,
            fused=self.fused,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        ).feature_axis
        sizes = geometry.plan(x.shape, axis, None).feature_sizes
        firsts: dict[str, Callable[[], Array]] = {
            "mean": lambda: jnp.zeros(sizes, jnp.float32),
            "var": lambda: jnp.ones(sizes, jnp.float32),
        }
        if self.renorm:
            firsts |= {"renorm_mean": firsts["mean"], "renorm_stddev": firsts["var"]}
        if self.renorm and callable(self.renorm_clipping):
            firsts["steps"] = lambda: jnp.zeros((), jnp.int32)
        variables = {name: self.variable("batch_stats", name, first) for name, first in firsts.items()}
        scale = self.param("scale", self.scale_init, sizes, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, sizes, self.param_dtype) if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        y, moved = batch_norm(
            x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.promote_types(x.dtype, jnp.float32)),
            {"scale": scale, "bias": bias},
            {name: variable.value for name, variable in variables.items()},
            training=not running,
            axis=axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            renorm_clipping=self.renorm_clipping if self.renorm else None,
            renorm_momentum=renorm_momentum,
            virtual_batch_size=self.virtual_batch_size,
            adjustment=None if running or self.adjustment is None else self.adjustment(x.shape),
            skip_nonfinite=self.skip_nonfinite,
            fused=self.fused,
            mask=mask,
            axis_name=None if self.is_initializing() else self.axis_name,
            axis_index_groups=None if self.is_initializing() else self.axis_index_groups,
            update=update,
            dtype=dtype,
        )
        if not running and update and not self.is_initializing():
            for name, variable in variables.items():
                variable.value = moved[name]
        return y
