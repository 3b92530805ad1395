"""The layer on NumPy arrays: the readable reference, and inference anywhere.

>>> import numpy as np
>>> layer = BatchNormalization(renorm=True, virtual_batch_size=4)
>>> x = np.random.default_rng(0).normal(3.0, 2.0, (32, 5))
>>> layer(x, training=True).shape
(32, 5)
>>> y = layer(x[:3])  # inference: any batch size
"""

from .compute import Gradients
from .layer import BatchNormalization

__all__ = ["BatchNormalization", "Gradients"]
