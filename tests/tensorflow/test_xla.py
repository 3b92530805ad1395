"""The kernels inside of programs that XLA compiles: where they serve, what they give, and how they step aside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from batchnorm import cpu
from batchnorm.core.passes import COMPOSED
from batchnorm.cpu import KERNEL
from batchnorm.tensorflow import BatchNormalization, xla

SHAPE = (6, 4, 3, 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no parameters": {"scale": False, "center": False},
    "features first": {"axis": 1},
    "two axes": {"axis": [1, 3]},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 2.0, "dmax": 1.0}},
    "virtual batches": {"virtual_batch_size": 2, "renorm": True},
    "adjustment": {"adjustment": lambda shape: (2 * tf.ones(shape[-1]), tf.ones(shape[-1]))},
}
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(3, 2, SHAPE).astype("float32") for _ in range(2))
needs_xla = pytest.mark.skipif(not xla.available(), reason="this TensorFlow lets nobody call from XLA")


def test_the_kernels_are_there_where_they_were_built_and_tensorflow_lets_them() -> None:
    release = tuple(int(part) for part in tf.__version__.split(".")[:2])
    assert xla.available() == (cpu.binding("xla") is not None and release >= (2, 21))


def _steps(
    options: dict[str, Any], jit: bool, dtype: str = "float32", sizes: Any = SHAPE, mask: Any = None
) -> tuple[list[Any], BatchNormalization, Any]:
    """Train for two steps."""
    layer = BatchNormalization(**options, dtype=dtype)
    layer.build(SHAPE)
    call = {} if mask is None else {"mask": tf.constant(mask)}

    def step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, **call)
        return [y, *tape.gradient(y, [x, *layer.trainable_variables], dy)]

    compiled = tf.function(step, input_signature=[tf.TensorSpec(sizes, dtype)] * 2, jit_compile=jit)
    x, dy = tf.cast(X, dtype), tf.cast(DY, dtype)
    compiled(x, dy)
    found = compiled(x + 1, dy)
    program = compiled.experimental_get_compiler_ir(x, dy)(stage="optimized_hlo") if jit else ""
    return [tf.cast(value, "float64").numpy() for value in (*found, *layer.variables)], layer, program


@needs_xla
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", [SHAPE, (None, *SHAPE[1:])], ids=["known", "unknown"])
def test_xla_calls_the_kernels_and_gives_what_operations_give(name: str, sizes: Any) -> None:
    expected, _, _ = _steps(OPTIONS[name], jit=False)
    found, layer, program = _steps(OPTIONS[name], jit=True, sizes=sizes)
    assert layer.kernel == KERNEL
    assert 'custom_call_target="batchnorm_forward"' in program
    assert 'custom_call_target="batchnorm_backward"' in program
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@needs_xla
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_type_is_served(dtype: str) -> None:
    expected, _, _ = _steps({}, jit=False, dtype=dtype)
    found, layer, _ = _steps({}, jit=True, dtype=dtype)
    assert layer.kernel == KERNEL
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@needs_xla
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_masks_and_weights_are_served(kind: str) -> None:
    mask = (RNG.random(SHAPE[:-1]) < 0.6).astype(kind)
    expected, _, _ = _steps({}, jit=False, mask=mask)
    found, layer, _ = _steps({}, jit=True, mask=mask, sizes=(None, *SHAPE[1:]))
    assert layer.kernel == KERNEL
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@needs_xla
def test_second_derivatives_equal_those_of_the_composed_layer() -> None:
    def second(fused: bool | None, jit: bool) -> list[Any]:
        layer = BatchNormalization(fused=fused)
        layer.build(SHAPE)

        def of(x: Any) -> Any:
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    total = tf.reduce_sum(layer(x, training=True) ** 3)
                square = tf.reduce_sum(inner.gradient(total, x) ** 2)
            return outer.gradient(square, [x, layer.gamma])

        return [value.numpy() for value in tf.function(of, jit_compile=jit)(tf.constant(X))]

    for one, other in zip(second(None, True), second(False, False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


@needs_xla
def test_gradients_may_be_taken_outside_of_what_is_compiled() -> None:
    found = []
    for jit in (False, True):
        layer = BatchNormalization()
        layer.build(SHAPE)
        call = tf.function(lambda x, layer=layer: layer(x, training=True), jit_compile=jit)
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        found.append(tape.gradient(y, x, tf.constant(DY)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


@needs_xla
def test_an_empty_batch_moves_no_average_to_nan() -> None:
    layer = BatchNormalization()
    layer.build(SHAPE)
    signature = [tf.TensorSpec((None, *SHAPE[1:]), tf.float32)]
    call = tf.function(lambda x: layer(x, training=True), input_signature=signature, jit_compile=True)
    assert call(tf.constant(X[:0])).shape == (0, *SHAPE[1:])
    assert layer.kernel == KERNEL
    assert np.isfinite(layer.moving_mean.numpy()).all()


@pytest.fixture
def anew() -> Iterator[None]:
    """Whether XLA can call the kernels is asked again, before and after."""
    xla.available.cache_clear()
    yield
    xla.available.cache_clear()


@pytest.mark.usefixtures("anew")
def test_without_the_interface_xla_composes_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "_registered", False)
    expected, _, _ = _steps({}, jit=False)
    found, layer, program = _steps({}, jit=True)
    assert layer.kernel != KERNEL
    assert "batchnorm_forward" not in program
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@needs_xla
@pytest.mark.usefixtures("anew")
def test_an_xla_that_refuses_the_calls_composes_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "VERSION", 10**6)  # of XlaCallModule, which no TensorFlow has
    with pytest.warns(UserWarning, match="does not take the CPU kernels into XLA"):
        _, layer, _ = _steps({"virtual_batch_size": 2}, jit=True)
    assert layer.kernel == COMPOSED
