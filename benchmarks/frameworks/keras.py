"""Keras: a training step of our layer and of Keras', as `fit` runs it with jit_compile off and on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

import batchnorm
from batchnorm.keras import BatchNormalization
from benchmarks.cases import Case

from . import Array, Contender

__all__ = ["KEEPS_MEMORY", "PEERS", "TITLE", "array", "configure", "contenders", "extras", "ours", "versions"]

BACKEND: str = keras.backend.backend()
TITLE = f"Keras on {BACKEND}"
KEEPS_MEMORY = BACKEND == "tensorflow"
PEERS = ("Keras",) if BACKEND == "jax" else ("Keras", "Keras, jit")
LIMITS = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}
DEFAULT = BACKEND == "jax"
"""Whether `fit` compiles by default on a CPU."""


def configure(threads: int) -> None:
    """Set the threads that the backend computes with."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
    elif BACKEND == "torch":
        import torch

        torch.set_num_threads(threads)
    else:
        batchnorm.set_num_threads(threads)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def versions() -> str:
    """Name Keras and its backend with their versions."""
    backend = __import__(BACKEND)
    return f"Keras {keras.__version__}, {BACKEND} {backend.__version__}"


def array(value: Any) -> Array:
    """Copy a tensor to NumPy."""
    return np.asarray(ops.convert_to_numpy(ops.cast(value, "float32")))


@functools.lru_cache(maxsize=2)  # cases of one shape follow each other
def _data(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=shape).astype("float32") for _ in range(2))
    return ops.cast(x * 2 + 0.5, dtype), ops.cast(dy, dtype)


def _options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {"axis": case.axis}
    if case.dtype == "bfloat16":
        options["dtype"] = "mixed_bfloat16"
    if "renorm" in case.option:
        options |= {"renorm": True, "renorm_clipping": LIMITS}
    if "virtual" in case.option:
        options["virtual_batch_size"] = min(8, case.shape[0])
    if case.option == "uneven virtual batches":
        options["virtual_batch_size"] = max(case.shape[0] // 4 - 1, 1)
    if case.option == "adjustment":
        features = case.shape[case.axis]
        by_feature = [1] * len(case.shape)
        by_feature[case.axis] = features
        scale = np.linspace(0.93, 1.07, features, dtype=np.float32).reshape(by_feature)
        options["adjustment"] = lambda shape: (scale, scale - 1)
    if case.option == "two axes":
        options["axis"] = [1, 2] if case.axis == -1 else [1, len(case.shape) - 1]
    return options


def _contender(name: str, layer: Any, case: Case, jit: bool) -> Contender:
    layer.build(case.shape)
    x, dy = _data(case.shape, case.dtype)
    call: dict[str, Any] = {"training": not case.mode.endswith("inference")}
    if case.mask is not None:
        call["mask"] = ops.convert_to_tensor(case.mask)
    steps = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    run = steps[BACKEND](layer, x, dy, call, case.mode.endswith("step"), jit)
    return Contender(name if jit == DEFAULT else f"{name}, jit", run, lambda: getattr(layer, "kernel", None))


def _tensorflow(layer: Any, x: Any, dy: Any, call: dict[str, Any], step: bool, jit: bool) -> Callable[[], list[Any]]:
    import tensorflow as tf

    @tf.function(jit_compile=jit)
    def run(x: Any, dy: Any) -> list[Any]:
        if not step:
            return [layer(x, **call)]
        parameters = [weight.value for weight in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **call)
        return [y, *tape.gradient(y, [x, *parameters], dy)]

    return lambda: list(run(x, dy))


def _jax(layer: Any, x: Any, dy: Any, call: dict[str, Any], step: bool, jit: bool) -> Callable[[], list[Any]]:
    import jax

    trained = [weight.value for weight in layer.trainable_variables]
    state = [weight.value for weight in layer.non_trainable_variables]

    def both(trained: Any, x: Any, state: Any, dy: Any) -> Any:
        if not step:
            return layer.stateless_call(trained, state, x, **call)
        y, vjp, moved = jax.vjp(lambda w, x: layer.stateless_call(w, state, x, **call), trained, x, has_aux=True)
        gradients, dx = vjp(dy)
        return [y, dx, *gradients], moved

    compiled = jax.jit(both) if jit else both

    def run() -> list[Any]:
        found, moved = compiled(trained, x, state, dy)
        jax.block_until_ready(moved)
        return list(jax.block_until_ready(found if step else [found]))

    return run


def _torch(layer: Any, x: Any, dy: Any, call: dict[str, Any], step: bool, jit: bool) -> Callable[[], list[Any]]:
    import torch

    parameters = [weight.value for weight in layer.trainable_variables]
    forward = torch.compile(lambda x: layer(x, **call)) if jit else lambda x: layer(x, **call)

    def run() -> list[Any]:
        if not step:
            with torch.no_grad():
                return [forward(x)]
        leaf = x.detach().requires_grad_()
        y = forward(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], dy)]

    return run


def ours(case: Case) -> Contender:
    """Make our layer on the data of a case, as `fit` compiles it by default."""
    return _contender("batchnorm", BatchNormalization(**_options(case)), case, jit=DEFAULT)


def contenders(case: Case) -> tuple[list[Contender], Contender]:
    """Make the contenders of a case, ours first, and the floor: what reading and writing the data takes alone."""
    options = _options(case)
    found = [ours(case)]
    modes = (DEFAULT,) if BACKEND == "jax" else (False, True)  # without jit JAX is not what anybody trains by
    found += [_contender("batchnorm", BatchNormalization(**options), case, jit) for jit in modes if jit != DEFAULT]
    if case.option in ("plain", "renorm", "mask of ones"):  # gradients of what is masked are others with Keras
        found += [_contender("Keras", keras.layers.BatchNormalization(**options), case, jit) for jit in modes]
    x, dy = _data(case.shape, case.dtype)

    def floor() -> list[Any]:  # a copy; and for the gradient, two read and one written
        results = [-x, x + dy] if case.mode.endswith("step") else [-x]
        if BACKEND == "jax":
            import jax

            jax.block_until_ready(results)
        return results

    return found, Contender("floor", floor)


def extras(quick: bool) -> list[tuple[Case, list[Contender]]]:
    """Make what is measured besides single layers: nothing."""
    return []
