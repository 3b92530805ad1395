"""What a bug report needs: versions, what was found, and which kernels serve which options."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

from . import __version__, cpu

__all__ = ["lines"]

FRAMEWORKS = ("numpy", "tensorflow", "tensorflow-cpu", "tf_keras", "keras", "torch", "jax", "flax")
AGAIN = "pip install --force-reinstall --no-cache-dir --no-deps batchnorm"
"""The cure of an installation without kernels; pip would else take the wheel that it has kept."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True},
    "virtual batches": {"virtual_batch_size": 2},
    "several axes, side by side": {"axis": [1, 2]},
    "several axes, apart": {"axis": [1, 3]},
    "fused=False": {"fused": False},
}


def lines() -> Iterator[str]:
    """Say everything, a line at a time."""
    yield f"batchnorm {__version__}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    for name in FRAMEWORKS:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    if cpu.library is None:
        if cpu.binding("tensorflow") is None:
            yield "CPU kernels: not built; the composed path serves everything"
            yield "To have them, install GCC or Clang, and the headers of Python (python3-dev or the like), and then"
        else:
            yield "CPU kernels: for TensorFlow only; elsewhere the composed path serves everything"
            yield "To have them everywhere, install the headers of Python (python3-dev or the like), and then"
        yield f"  {AGAIN}"
    else:
        variables = [
            f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "BATCHNORM_ISA") if name in os.environ
        ]
        told = f" ({', '.join(variables)})" if variables else ""
        yield f"CPU kernels: {cpu.instruction_set()}, {cpu.num_threads()} threads{told}"
    yield from _served("NumPy", _numpy_kernel)
    if importlib.util.find_spec("tensorflow") is not None:
        yield from _served("TensorFlow", _tensorflow_kernel)
    if importlib.util.find_spec("keras") is not None:
        yield from _served("Keras", _keras_kernel)
    if importlib.util.find_spec("jax") is not None:
        yield from _served("JAX", _jax_kernel)
    if importlib.util.find_spec("torch") is not None:
        yield from _served("PyTorch", _torch_kernel)
        few = (_torch_kernel({}, training, size=2) for training in (True, False))
        yield _row("plain, few values", *few)


def _served(framework: str, kernel: Callable[[dict[str, Any], bool], str | None]) -> Iterator[str]:
    yield f"{framework}, inputs of rank 4, served in training and in inference by:"
    for title, options in OPTIONS.items():
        yield _row(title, kernel(options, True), kernel(options, False))


def _row(title: str, training: str | None, inference: str | None) -> str:
    return f"  {title:<28}{training:<20}{inference}"


def _numpy_kernel(options: dict[str, Any], training: bool) -> str | None:
    import numpy as np

    from .numpy import BatchNormalization

    layer = BatchNormalization(**options)
    layer(np.ones((4, 2, 2, 3), np.float32), training=training)
    return layer.kernel


def _tensorflow_kernel(options: dict[str, Any], training: bool) -> str | None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    from .tensorflow import BatchNormalization

    layer = BatchNormalization(**options)
    layer(tf.ones([4, 2, 2, 3]), training=training)
    return layer.kernel


def _keras_kernel(options: dict[str, Any], training: bool) -> str | None:
    import numpy as np

    from .core.passes import COMPOSED
    from .keras import BatchNormalization

    layer = BatchNormalization(**options)
    layer(np.ones((4, 2, 2, 3), np.float32), training=True)
    return layer.kernel if training else COMPOSED


def _jax_kernel(options: dict[str, Any], training: bool) -> str | None:
    import jax
    import jax.numpy as jnp

    from .core.passes import COMPOSED
    from .jax import batch_norm, init, primitives

    options = dict(options)
    axis = tuple(options.pop("axis", [-1]))
    parameters, statistics = init((4,) * len(axis), renorm=options.pop("renorm", False))
    x = jax.device_put(jnp.ones((4, 4, 4, 4)), jax.devices("cpu")[0])
    step = jax.jit(lambda x: batch_norm(x, parameters, statistics, training=training, axis=axis, **options))
    return cpu.KERNEL if primitives.TARGETS["forward"] in step.lower(x).as_text() else COMPOSED


def _torch_kernel(options: dict[str, Any], training: bool, size: int = 16) -> str | None:
    import torch

    from .torch import BatchNorm

    axis = tuple(options.get("axis", [1]))
    layer = BatchNorm((size,) * len(axis), **options | {"axis": axis}).train(training)
    layer(torch.ones(size, size, size, size))
    return layer.kernel
