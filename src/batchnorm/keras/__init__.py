"""Batch normalization for Keras 3: one layer on TensorFlow, JAX and PyTorch, with every option.

>>> import numpy as np
>>> layer = BatchNormalization(renorm=True, virtual_batch_size=4)
>>> y = layer(np.ones((30, 5), "float32"), training=True)
>>> tuple(y.shape)
(30, 5)
"""

from batchnorm.core.schedules import ClippingSchedule

from .conversion import convert, revert
from .layer import BatchNormalization
from .saving import load_model

__all__ = ["BatchNormalization", "ClippingSchedule", "convert", "load_model", "revert"]
