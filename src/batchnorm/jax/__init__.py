"""Batch normalization for JAX: a pure function with every option, on CPU kernels of our own."""

from batchnorm.core.schedules import ClippingSchedule

from .functional import batch_norm, init, with_renorm, without_renorm

__all__ = ["ClippingSchedule", "batch_norm", "init", "with_renorm", "without_renorm"]
