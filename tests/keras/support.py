"""One training step, by any backend: what comes out, and every gradient."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

import batchnorm.numpy
from batchnorm.keras import BatchNormalization

__all__ = ["BACKEND", "DIFFERENTIATES", "STOCK_RENORM", "Step", "array", "averages", "numpy_of", "step"]

Array = npt.NDArray[Any]
BACKEND: str = keras.backend.backend()
DIFFERENTIATES = BACKEND != "numpy"
STOCK_RENORM = "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters
"""Whether Keras' own layer knows renorm, as from 3.14 on."""
COMPILED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Step(NamedTuple):
    """The output, and the gradients of the inputs and of each trainable weight by name."""

    y: Array
    dx: Array
    weights: dict[str, Array]


def array(value: Any) -> Array:
    """A tensor as NumPy has it; 16 bits as float32."""
    return np.asarray(ops.convert_to_numpy(ops.cast(value, "float32") if "16" in str(value.dtype) else value))


def step(layer: Any, x: Array, dy: Array, **call: Any) -> Step:
    """Call a layer in training, which moves its averages, and differentiate Σ y·dy."""
    if not layer.built:
        layer.build(x.shape)
    names = [weight.name for weight in layer.trainable_variables]
    call.setdefault("training", True)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        given = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(given)
            y = layer(given, **call)
            loss = tf.reduce_sum(tf.cast(y, given.dtype) * dy)
        dx, *found = tape.gradient(loss, [given, *(weight.value for weight in layer.trainable_variables)])
    elif BACKEND == "torch":
        import torch

        leaf = torch.as_tensor(x).requires_grad_()
        y = layer(leaf, **call)
        loss = (y.to(leaf.dtype) * torch.as_tensor(dy)).sum()
        dx, *found = torch.autograd.grad(loss, [leaf, *(weight.value for weight in layer.trainable_variables)])
    elif BACKEND == "jax":
        import jax
        import jax.numpy as jnp

        state = [weight.value for weight in layer.non_trainable_variables]

        def loss_of(trained: Any, x: Any, dy: Any, state: Any, mask: Any) -> Any:
            y, moved = layer.stateless_call(trained, state, x, **call | {"mask": mask})
            return (y.astype(x.dtype) * dy).sum(), (y, moved)

        compiled = COMPILED.setdefault(layer, {})
        if len(call) not in compiled:
            compiled[len(call)] = jax.jit(jax.grad(loss_of, (0, 1), has_aux=True))
        trained = [weight.value for weight in layer.trainable_variables]
        differentiate = compiled[len(call)]
        (found, dx), (y, moved) = differentiate(trained, jnp.asarray(x), jnp.asarray(dy), state, call.get("mask"))
        for weight, value in zip(layer.non_trainable_variables, moved, strict=True):
            weight.assign(value)
    else:
        y = layer(x, **call)
        return Step(array(y), np.zeros_like(x), {})
    return Step(array(y), array(dx), {name: array(value) for name, value in zip(names, found, strict=True)})


def averages(layer: Any) -> dict[str, Array]:
    """The averages of a layer, flat."""
    return {weight.name: array(weight.value).reshape(-1) for weight in layer.non_trainable_variables}


def numpy_of(layer: BatchNormalization, **options: Any) -> batchnorm.numpy.BatchNormalization:
    """The reference with the options of a layer."""
    own = layer.options
    return batchnorm.numpy.BatchNormalization(
        axis=own.axis if isinstance(own.axis, int) else list(own.axis),
        momentum=own.decay,
        epsilon=own.epsilon,
        center=own.center,
        scale=own.scale,
        renorm=own.renorm,
        renorm_clipping=layer.renorm_clipping if isinstance(layer.renorm_clipping, dict) else None,
        renorm_momentum=own.renorm_decay,
        virtual_batch_size=own.virtual_batch_size,
        skip_nonfinite=own.skip_nonfinite,
        fused=False,
        masked="normalized",
        **options,
    )
