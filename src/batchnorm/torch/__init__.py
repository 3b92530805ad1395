"""Batch normalization for PyTorch: `torch.nn.BatchNorm*d` with every option, for any axes, on native CPU kernels."""

from .conversion import convert
from .functional import batch_norm
from .modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .schedules import ClippingSchedule

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "ClippingSchedule", "batch_norm", "convert"]
