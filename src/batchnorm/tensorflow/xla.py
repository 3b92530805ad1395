"""The CPU kernels inside of programs that XLA compiles for TensorFlow.

XLA calls them through its foreign function interface, as it does for JAX. A call gets into a program of TensorFlow as a
small StableHLO module, by the operation XlaCallModule; in that sizes may be unknown until XLA compiles. TensorFlow
promises none of this, so it is tried before it is used, and where it does not work everything is composed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tf2xla  # nothing public makes an XlaCallModule,
from tensorflow.python.ops import control_flow_util  # or tells whether XLA compiles what is traced

from batchnorm import cpu
from batchnorm.core.geometry import View

__all__ = ["as_operand", "available", "backward", "compiles", "forward"]

Tensor = Any
TYPES = {"bool": "i1", "int64": "i64", "float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
"""The names of types in StableHLO."""
VERSION = 9
"""Of XlaCallModule, with sizes that are refined where a module asks for it."""


class _Size(NamedTuple):
    """A size that is not known yet: that of an axis of an operand."""

    operand: int
    axis: int


class _Result(NamedTuple):
    """Type and shape of a result."""

    dtype: Any
    shape: Sequence[int | _Size]

    @property
    def known(self) -> list[int | None]:
        """The shape as far as it is known."""
        return [None if isinstance(size, _Size) else size for size in self.shape]


# ---- Whether there is a way to the kernels.


def _register() -> bool:
    """Give the kernels to the XLA of this TensorFlow.

    At import, so that programs which were saved with calls of the kernels run wherever this package is imported.
    """
    path = cpu.binding("xla")
    if path is None:
        return False
    try:
        table = ctypes.CDLL("libtensorflow_framework.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD).XLA_FFI_GetApi
    except (AttributeError, OSError):  # TensorFlow up to 2.20 keeps the interface to itself
        return False
    library = ctypes.CDLL(path)
    table.restype = ctypes.c_void_p
    library.batchnorm_register.argtypes, library.batchnorm_register.restype = [ctypes.c_void_p], ctypes.c_char_p
    refusal = library.batchnorm_register(table())
    if refusal is not None:
        _warn(refusal.decode())
        return False
    cpu.share_threads(path)  # its pool is its own
    return True


def _warn(reason: object) -> None:
    warnings.warn(
        f"batchnorm: this TensorFlow does not take the CPU kernels into XLA, which computes everything there: {reason}",
        stacklevel=3,
    )


_registered = _register()


def compiles() -> bool:
    """Tell whether XLA compiles what is traced."""
    if tf.executing_eagerly():
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


@functools.cache
def available() -> bool:
    """Tell whether XLA can call the kernels; the first call tries it, on samples of a number that is not known."""
    if not _registered:
        return False
    with tf.init_scope():
        if not tf.executing_eagerly():  # within a graph of TensorFlow 1 nothing can be tried
            return False
        try:
            trial = tf.function(_trial, input_signature=[tf.TensorSpec([None, 2], tf.float32)], jit_compile=True)
            found = trial(tf.constant([[1.0, 5.0], [3.0, 9.0]])).numpy().tolist()
        except Exception as error:
            _warn(error)
            return False
    if found != [[-1.0, -1.0], [1.0, 1.0]]:
        _warn(f"it gives {found}")
        return False
    return True


def _trial(x: Tensor) -> Tensor:
    nothing = tf.zeros(0)
    return forward(x, View(tf.shape(x)[0], 1, 1, 2, 1), tf.zeros(0, tf.bool), *[nothing] * 5, epsilon=0.0)[0]


# ---- The kernels.


def as_operand(view: View) -> Any:
    """Six numbers that tell the kernels a view; some may be known only when the program runs."""
    if not any(map(tf.is_tensor, view)):
        return np.array(view, np.int64)
    return tf.stack([tf.cast(number, tf.int64) for number in view])


def forward(
    x: Tensor,
    view: View,
    weights: Tensor,
    factor: Tensor,
    offset: Tensor,
    renorm_mean: Tensor,
    renorm_stddev: Tensor,
    limits: Tensor,
    *,
    epsilon: float,
) -> list[Tensor]:
    """Normalize a batch in training; an operand without elements is absent.

    Returns:
        y, mean, variance, rest, count, r and d. The mean is mean + rest, each of the type of the arithmetic.
    """
    operands = [x, weights, factor, offset, renorm_mean, renorm_stddev, limits, as_operand(view)]
    dtype, hints = factor.dtype, []
    groups: int | _Size = view.groups
    batches: int | _Size = view.virtual_batches
    if tf.is_tensor(groups):  # then XLA learns it from the size of an operand more
        hints = [tf.zeros([groups, 0])]
        groups = batches = _Size(len(operands), 0)
    statistics = _Result(dtype, [groups, view.features])
    correction = _Result(dtype, renorm_mean.shape.as_list())
    results = [_like(x), *[statistics] * 3, _Result(dtype, [batches]), correction, correction]
    return _call("batchnorm_forward", operands, hints, results, epsilon)


def backward(
    x: Tensor,
    dy: Tensor,
    view: View,
    weights: Tensor,
    mean: Tensor,
    variance: Tensor,
    rest: Tensor,
    count: Tensor,
    factor: Tensor,
    r: Tensor,
    d: Tensor,
    *,
    epsilon: float,
) -> list[Tensor]:
    """Differentiate `forward`, of whose operands and results these are.

    Returns:
        dx, and what the gradients of factor and offset are where there are any.
    """
    operands = [x, dy, weights, mean, variance, rest, count, factor, r, d, as_operand(view)]
    parameter = _Result(factor.dtype, [view.parameters])
    return _call("batchnorm_backward", operands, [], [_like(x), parameter, parameter], epsilon)


def _like(x: Tensor) -> _Result:
    """A result of the type and shape of x, the first operand."""
    sizes = x.shape.as_list()
    return _Result(x.dtype, [_Size(0, axis) if size is None else size for axis, size in enumerate(sizes)])


def _call(
    name: str, operands: list[Tensor], hints: list[Tensor], results: list[_Result], epsilon: float
) -> list[Tensor]:
    """Call a kernel; it does not see the hints, of which only the sizes matter."""
    operands = [tf.convert_to_tensor(operand) for operand in operands]
    operation = tf2xla.call_module(
        [*operands, *hints],
        version=VERSION,
        module=_module(name, operands, hints, results, epsilon),
        Tout=[result.dtype for result in results],
        Sout=[result.known for result in results],
        platforms=["CPU"],
    )
    return list(operation)


def _module(name: str, operands: list[Tensor], hints: list[Tensor], results: list[_Result], epsilon: float) -> str:
    """The text of a StableHLO module that hands its operands to a kernel.

    Where a size of a result is not known, the shapes of all of them are operands, too, until XLA has refined them.
    """
    types = [_type(value.dtype, value.shape.as_list()) for value in (*operands, *hints)]
    found = [_type(result.dtype, result.known) for result in results]
    names = [f"%operand{i}" for i in range(len(types))]
    arguments = ", ".join(f"{operand}: {type_}" for operand, type_ in zip(names, types, strict=True))
    given, given_types = names[: len(operands)], types[: len(operands)]
    layouts = [_layout(value.shape.rank) for value in operands]
    lines: list[str] = []
    attributes = [
        "api_version = 4 : i32",
        f"backend_config = {{epsilon = 0x{struct.unpack('<Q', struct.pack('<d', epsilon))[0]:016X} : f64}}",
    ]
    if any(None in result.known for result in results):
        shapes = [_shape(f"%shape{i}", result, types, lines) for i, result in enumerate(results)]
        at = [len(operands) + i for i in range(len(results))]
        attributes.append(f"indices_of_shape_operands = dense<{at}> : tensor<{len(at)}xi64>")
        given = [*given, *(f"%shape{i}" for i in range(len(results)))]
        given_types, layouts = [*given_types, *shapes], [*layouts, *[_layout(1)] * len(results)]
    attributes.append(f"operand_layouts = [{', '.join(layouts)}]")
    attributes.append(f"result_layouts = [{', '.join(_layout(len(result.shape)) for result in results)}]")
    returned = ", ".join(f"%found#{i}" for i in range(len(results)))
    body = "\n    ".join(
        [
            *lines,
            f"%found:{len(results)} = stablehlo.custom_call @{name}({', '.join(given)}) {{{', '.join(attributes)}}} : "
            f"({', '.join(given_types)}) -> ({', '.join(found)})",
            f"func.return {returned} : {', '.join(found)}",
        ]
    )
    return f"""module @batchnorm attributes {{jax.uses_shape_polymorphism = true}} {{
  func.func public @main({arguments}) -> ({", ".join(found)}) {{
    {body}
  }}
}}
"""


def _shape(name: str, result: _Result, types: list[str], lines: list[str]) -> str:
    """Write what gives the shape of a result, and return its type."""
    sizes = []
    for axis, size in enumerate(result.shape):
        at = f"{name}_{axis}"
        if isinstance(size, _Size):
            operand, type_ = f"%operand{size.operand}", types[size.operand]
            lines.append(
                f"{at}s = stablehlo.get_dimension_size {operand}, dim = {size.axis} : ({type_}) -> tensor<i32>"
            )
            lines.append(f"{at} = stablehlo.reshape {at}s : (tensor<i32>) -> tensor<1xi32>")
        else:
            lines.append(f"{at} = stablehlo.constant dense<{size}> : tensor<1xi32>")
        sizes.append(at)
    types_of_sizes = ", ".join(["tensor<1xi32>"] * len(sizes))
    shape = f"tensor<{len(sizes)}xi32>"
    lines.append(f"{name} = stablehlo.concatenate {', '.join(sizes)}, dim = 0 : ({types_of_sizes}) -> {shape}")
    return shape


def _type(dtype: Any, sizes: Sequence[int | None]) -> str:
    return "tensor<" + "".join(f"{'?' if size is None else size}x" for size in sizes) + f"{TYPES[dtype.name]}>"


def _layout(rank: int) -> str:
    """The order of the axes in memory: as NumPy has it by default."""
    return f"dense<{list(reversed(range(rank)))}> : tensor<{rank}xindex>"
