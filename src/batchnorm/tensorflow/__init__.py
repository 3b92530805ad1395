"""The layer of TensorFlow 1, back on today's TensorFlow.

>>> import tensorflow as tf
>>> layer = BatchNormalization(renorm=True, virtual_batch_size=4)
>>> layer(tf.random.normal([32, 5]), training=True).shape.as_list()
[32, 5]
"""

from .base import InputSpec, Layer
from .checkpoints import modernize_checkpoint
from .installing import install
from .layer import BatchNorm, BatchNormalization, batch_norm, batch_normalization

__all__ = [
    "BatchNorm",
    "BatchNormalization",
    "InputSpec",
    "Layer",
    "batch_norm",
    "batch_normalization",
    "install",
    "modernize_checkpoint",
]
