"""Batch normalization, complete: renormalization, virtual batches, adjustment and several axes.

Import the layer in the dialect of your framework::

    from batchnorm.tensorflow import BatchNormalization
    from batchnorm.keras import BatchNormalization
    from batchnorm.torch import BatchNorm2d
    from batchnorm.flax import BatchNorm
    from batchnorm.jax import batch_norm
    from batchnorm.numpy import BatchNormalization

This module itself imports no framework.
"""

from .cpu import num_threads, set_num_threads

__all__ = ["__version__", "num_threads", "set_num_threads"]

__version__ = "0.1.0"
