"""The layer of TensorFlow 1, back on today's TensorFlow.

>>> import tensorflow as tf
>>> layer = BatchNormalization(renorm=True, virtual_batch_size=4)
>>> layer(tf.random.normal([32, 5]), training=True).shape.as_list()
[32, 5]
"""

from .checkpoints import modernize_checkpoint
from .layer import InputSpec, Layer
from .normalization import BatchNormalization, batch_normalization
from .restoring import restore

__all__ = [
    "BatchNormalization",
    "InputSpec",
    "Layer",
    "batch_normalization",
    "modernize_checkpoint",
    "restore",
]
