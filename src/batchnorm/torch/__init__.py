"""Batch normalization for PyTorch: `torch.nn.BatchNorm*d` with every option, for any axes, on native CPU kernels."""

from batchnorm.core.schedules import ClippingSchedule

from .control import freeze, hold, recalibrate, unfreeze
from .conversion import convert, revert
from .functional import batch_norm, sequence_mask
from .modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ClippingSchedule",
    "batch_norm",
    "convert",
    "freeze",
    "hold",
    "recalibrate",
    "revert",
    "sequence_mask",
    "unfreeze",
]
