"""Models that use the layer: every way to train, compile, copy, wrap, distribute and export them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.core.passes import COMPOSED
from batchnorm.cpu import KERNEL
from batchnorm.keras import BatchNormalization, ClippingSchedule, backends

from .support import BACKEND, STOCK_RENORM, array, averages, numpy_of

SHAPE = (4, 4, 3)
SCHEDULE = ClippingSchedule(1, rmax_end=5, dmax_end=4)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 2.0, "dmax": 0.5}},
    "schedule and virtual batches": {"renorm": True, "renorm_clipping": SCHEDULE, "virtual_batch_size": 5},
    "axes": {"axis": [1, 3]},
    "composed": {"fused": False, "virtual_batch_size": 5},
    "skip": {"skip_nonfinite": True},
}
only = {name: pytest.mark.skipif(name != BACKEND, reason=f"of {name}") for name in ("tensorflow", "jax", "torch")}


def data(samples: int = 40) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (samples, *SHAPE)).astype("float32"), rng.normal(size=(samples, 1)).astype("float32")


def head(layer: Any) -> Any:
    return keras.Sequential([keras.Input(SHAPE), layer, keras.layers.Flatten(), keras.layers.Dense(1)])


class Subclass(keras.Model):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.flatten, self.dense = layer, keras.layers.Flatten(), keras.layers.Dense(1)

    def call(self, inputs: Any, training: Any = None) -> Any:
        return self.dense(self.flatten(self.norm(inputs, training=training)))


def functional(layer: Any) -> Any:
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(layer(inputs))))


AUTO = BACKEND == "jax"  # what Keras takes "auto" for, without a GPU
COMPILED = (
    ("schedule and virtual batches",) if BACKEND == "torch" else ("plain", "schedule and virtual batches", "composed")
)


@pytest.mark.parametrize(
    ("options", "jit"),
    [*((name, "auto") for name in OPTIONS), *((name, not AUTO) for name in COMPILED)],
)
def test_fit_reaches_the_statistics_of_the_reference_and_predicts_by_them(options: str, jit: Any) -> None:
    layer = BatchNormalization(momentum=0.8, **OPTIONS[options])
    reference = numpy_of(layer)
    model = head(layer)
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit)
    x, target = data()
    model.fit(x, target, batch_size=16, epochs=2, shuffle=False, verbose=0)
    assert layer.supports_jit
    assert model.jit_compile == (AUTO if jit == "auto" else jit)
    for at in range(6):
        if layer.steps is not None:
            limits = type(reference.options.renorm_clipping)(**SCHEDULE(at))
            reference.options = type(reference.options)(**{**vars(reference.options), "renorm_clipping": limits})
        begin = at % 3 * 16
        reference(x[begin : begin + 16].astype(np.float64), training=True)
    for name, value in averages(layer).items():
        if name != "steps":
            np.testing.assert_allclose(value, reference.variables[name].reshape(-1), rtol=1e-4, atol=1e-4)
    expected = reference(x.astype(np.float64)).reshape(40, -1) @ array(model.layers[-1].kernel.value)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-3, atol=1e-3)
    loss = model.evaluate(x, target, verbose=0)
    assert loss == pytest.approx(float(((expected - target) ** 2).mean()), rel=1e-3)
    before = layer.get_weights()
    model.predict(x, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


def test_fit_under_xla_reaches_the_weights_that_keras_own_layer_reaches() -> None:
    x, target = data(44)  # in batches of 16, 16 and 12
    weights = np.linspace(0.5, 1.5, 44)

    def made(kind: Any) -> Any:
        keras.utils.set_random_seed(1)
        limits = {"rmax": 2.0, "dmax": 0.5}
        corrected = {"renorm": True, "renorm_clipping": limits, "renorm_momentum": 0.8} if STOCK_RENORM else {}
        model = keras.Sequential(
            [
                keras.Input(SHAPE),
                keras.layers.Dense(4),
                kind(momentum=0.8, gamma_regularizer="l2"),
                keras.layers.Activation("tanh"),
                keras.layers.Dense(5),
                kind(momentum=0.8, **corrected),
                keras.layers.Activation("tanh"),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=BACKEND != "torch")  # which would take a minute
        return model

    models = [made(kind) for kind in (BatchNormalization, keras.layers.BatchNormalization)]
    before = models[0].get_weights()
    options = {"sample_weight": weights, "batch_size": 16, "epochs": 3, "shuffle": False, "verbose": 0}
    found, expected = (model.fit(x, target, **options).history["loss"] for model in models)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    kernel = KERNEL if BACKEND == "torch" or compiles_kernels() else COMPOSED
    assert [models[0].layers[at].kernel for at in (1, 4)] == [kernel] * 2
    values = (model.get_weights() for model in models)
    for weight, one, other, first in zip(models[0].weights, *values, before, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5, err_msg=weight.path)
        if weight.path.rpartition("/")[2] != "bias":  # of Dense, which a mean takes away again
            assert np.abs(one - first).max() > 1e-3, weight.path
    one, other = (model.predict(x, verbose=0) for model in models)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [head, functional, Subclass])
def test_a_model_of_any_kind_trains(kind: Any) -> None:
    layer = BatchNormalization(renorm=True, virtual_batch_size=4)
    model = kind(layer)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x, target = data(16)
    first = model.train_on_batch(x, target)
    for _ in range(30):
        last = model.train_on_batch(x, target)
    assert last < 0.5 * first
    assert not np.array_equal(layer.get_weights()[0], np.ones(3))
    assert layer.kernel in (KERNEL, COMPOSED)


def compiles_kernels() -> bool:
    """Whether what a model compiles can call the kernels; the XLA of TensorFlow up to 2.20 cannot."""
    if BACKEND != "tensorflow":
        return True
    from batchnorm.tensorflow import xla

    return xla.available()


def test_the_kernels_serve_wherever_a_framework_runs_them() -> None:
    x, target = data(16)
    for jit in (False, True):
        for options in ({}, {"renorm": True}, {"axis": [1, 2]}, {"virtual_batch_size": 4}):
            layer = BatchNormalization(**options)
            model = head(layer)
            model.compile("sgd", "mse", jit_compile=jit)
            model.fit(x, target, batch_size=16, verbose=0)
            assert layer.kernel == (KERNEL if not jit or compiles_kernels() else COMPOSED), options


def test_stateless_calls_return_what_has_moved_and_leave_the_layer_alone() -> None:
    layer = BatchNormalization(renorm=True, renorm_clipping=SCHEDULE)
    x, _ = data(8)
    layer.build(x.shape)
    before = layer.get_weights()
    trained, state = ([w.value for w in group] for group in (layer.trainable_variables, layer.non_trainable_variables))
    y, moved = layer.stateless_call(trained, state, ops.convert_to_tensor(x), training=True)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))
    np.testing.assert_allclose(array(layer(x, training=True)), array(y), atol=1e-6)
    for one, other in zip(moved, layer.non_trainable_variables, strict=True):
        np.testing.assert_allclose(array(one), array(other.value), atol=1e-6)


def test_wrapped_in_time_distributed_it_normalizes_over_time_as_keras_layer() -> None:
    x = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype("float32")
    ours, theirs = (
        keras.layers.TimeDistributed(kind()) for kind in (BatchNormalization, keras.layers.BatchNormalization)
    )
    for layer in (ours, theirs):
        layer.build(x.shape)
    np.testing.assert_allclose(array(ours(x, training=True)), array(theirs(x, training=True)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.get_weights()[2], theirs.get_weights()[2], rtol=1e-4, atol=1e-6)


def test_masks_of_masking_and_embedding_count_and_go_on() -> None:
    x = np.random.default_rng(0).normal(2, 1, (6, 5, 3)).astype("float32")
    x[2:, 3:] = 0
    tokens = np.random.default_rng(0).integers(0, 4, (6, 5))
    cases = ((keras.layers.Masking(), x), (keras.layers.Embedding(4, 3, mask_zero=True), tokens))
    for first, given in cases:
        layer = BatchNormalization()
        made = keras.Sequential([first, layer])
        y = made(ops.convert_to_tensor(given), training=True)
        kept = np.any(x != 0, -1) if given is x else tokens != 0
        values = array(first(ops.convert_to_tensor(given)))[kept]
        np.testing.assert_allclose(averages(layer)["moving_mean"], 0.01 * values.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(array(y._keras_mask), kept)


def test_a_layer_that_is_used_twice_moves_twice() -> None:
    layer = BatchNormalization(renorm=True, renorm_clipping=SCHEDULE)
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(layer(layer(inputs)))))
    model.compile("sgd", "mse")
    x, target = data(16)
    model.fit(x, target, batch_size=8, verbose=0)
    assert int(array(layer.steps.value)) == 4


def test_frozen_in_a_model_it_is_inference() -> None:
    layer = BatchNormalization(trainable=False)
    model = head(layer)
    model.compile("sgd", "mse")
    before = layer.get_weights()
    x, target = data(16)
    model.fit(x, target, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


@keras.saving.register_keras_serializable("tests")
class Noise:
    """An adjustment that draws a scale and an offset for each sample."""

    def __init__(self, seed: int) -> None:
        self.seed, self.generator = seed, keras.random.SeedGenerator(seed)

    def __call__(self, shape: Any) -> tuple[Any, Any]:
        size = (shape[0], *[1] * (len(shape) - 1))
        return tuple(keras.random.uniform(size, low, low + 0.4, seed=self.generator) for low in (0.8, -0.2))

    def get_config(self) -> dict[str, int]:
        return {"seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, int]) -> Noise:
        return cls(**config)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch's compiler asks
@pytest.mark.parametrize("jit", [False, True])
def test_a_random_adjustment_draws_anew_at_each_step(jit: bool, tmp_path: Path) -> None:
    layer = BatchNormalization(adjustment=Noise(3))
    model = head(layer)
    model.compile("sgd", "mse", jit_compile=jit)
    x, target = data(24)
    states = []
    for _ in range(3):
        model.fit(x, target, batch_size=8, verbose=0)
        states.append(array(layer.adjustment.generator.state.value).tolist())
    assert len({tuple(state) for state in states}) == 3
    ones = ops.convert_to_tensor(x)
    assert not np.allclose(array(layer(ones, training=True)), array(layer(ones, training=True)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].adjustment.seed == 3


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("jit", [False, True])
def test_mixed_precision_keeps_statistics_in_float32(policy: str, jit: bool) -> None:
    layer = BatchNormalization(renorm=True, dtype=policy)
    model = head(layer)
    model.compile("sgd", "mse", jit_compile=jit)
    x, target = data(16)
    model.fit(x * 1000, target, batch_size=8, verbose=0)
    assert {str(weight.dtype) for weight in layer.weights} == {"float32"}
    assert all(np.isfinite(value).all() for value in averages(layer).values())
    assert layer.compute_dtype == policy.removeprefix("mixed_")


@only["tensorflow"]
def test_a_loop_under_tf_function_and_the_exported_model(tmp_path: Path) -> None:
    import tensorflow as tf

    layer = BatchNormalization(renorm=True, virtual_batch_size=5)
    model, optimizer = head(layer), keras.optimizers.SGD(0.0)
    reference = numpy_of(layer)
    x, target = data(12)

    @tf.function(input_signature=[tf.TensorSpec([None, *SHAPE]), tf.TensorSpec([None, 1])])
    def train(x: Any, target: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - target) ** 2)
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    for samples in (10, 12, 7, 1):
        train(x[:samples], target[:samples])
        reference(x[:samples].astype(np.float64), training=True)
    for name, value in averages(layer).items():
        np.testing.assert_allclose(value, reference.variables[name].reshape(-1), rtol=1e-4, atol=1e-5)
    model.export(str(tmp_path / "model"), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_allclose(loaded.serve(x), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    graph = loaded.signatures["serving_default"].graph
    assert not [op.type for op in graph.get_operations() if op.type.startswith("Batchnorm")]


@only["tensorflow"]
def test_under_a_strategy_each_replica_normalizes_by_its_own_batch() -> None:
    import tensorflow as tf

    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        layer = BatchNormalization(renorm=True)
        model = head(layer)
        model.compile("sgd", "mse")
    x, target = data(16)
    model.fit(x, target, batch_size=8, verbose=0)
    assert layer.kernel == KERNEL
    assert not np.array_equal(averages(layer)["moving_mean"], np.zeros(3))


@only["torch"]
def test_a_compiled_step_is_one_graph_and_evaluation_can_be_exported() -> None:
    import torch

    layer = BatchNormalization(renorm=True, renorm_clipping=SCHEDULE)
    eager = BatchNormalization(renorm=True, renorm_clipping=SCHEDULE)
    x = torch.as_tensor(data(8)[0])
    for made in (layer, eager):
        made.build(x.shape)

    graphs = 0

    def counting(module: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(lambda x: layer(x, training=True), backend=counting, fullgraph=True)
    for at in range(3):  # Keras' own state is as it stays after the first call of any layer
        expected = eager(x + at, training=True)
        torch.testing.assert_close(compiled(x + at), expected)
    assert graphs == 1
    for one, other in zip(layer.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    model = head(layer).eval()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@only["torch"]
@pytest.mark.filterwarnings("ignore")  # of PyTorch's older exporter, which is Keras'
@pytest.mark.parametrize("options", OPTIONS)
def test_a_model_exported_to_onnx_predicts_for_any_batch(options: str, tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    model = head(BatchNormalization(**OPTIONS[options]))
    model.compile("sgd", "mse")
    x, target = data(16)
    model.fit(x, target, batch_size=8, verbose=0)
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    program = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for samples in (16, 3):
        (y,) = program.run(None, {program.input_names[0]: x[:samples]})
        np.testing.assert_allclose(y, model.predict(x[:samples], verbose=0), rtol=1e-4, atol=1e-5)


@only["torch"]
def test_compiled_under_a_mask_the_operators_give_what_the_kernels_give() -> None:
    import torch

    layer, eager = (BatchNormalization(renorm=True) for _ in range(2))
    x = torch.as_tensor(data(8)[0])
    dy = x.flip(0)
    for made in (layer, eager):
        made.build(x.shape)

    def train(layer: Any, x: Any) -> Any:
        return layer.call(x, training=True, mask=x[..., 0] > 2)  # Keras hangs masks on tensors, where graphs break

    compiled = torch.compile(functools.partial(train, layer), backend="eager", fullgraph=True)
    for at in range(2):
        found, expected = (x + at).requires_grad_(), (x + at).requires_grad_()
        y, right = compiled(found), train(eager, expected)
        torch.testing.assert_close(y, right)
        for result in (y, right):
            result.backward(dy)
        torch.testing.assert_close(found.grad, expected.grad)
    assert layer.kernel == eager.kernel == KERNEL
    for one, other in zip(layer.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@only["jax"]
def test_under_data_parallel_the_statistics_are_those_of_all_devices_and_nothing_is_gathered() -> None:
    import jax

    devices = jax.devices()
    assert len(devices) == 8
    x, target = data(32)

    def trained() -> tuple[Any, Any]:
        keras.utils.set_random_seed(1)
        layer = BatchNormalization(renorm=True)
        model = head(layer)
        model.compile(keras.optimizers.SGD(0.01), "mse")
        model.fit(x, target, batch_size=16, epochs=2, shuffle=False, verbose=0)
        return model, layer

    alone, _ = trained()
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu"))
    keras.distribution.set_distribution(distribution)
    try:
        spread, layer = trained()
        for one, other in zip(alone.get_weights(), spread.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
        mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))
        trainable = [weight.value for weight in layer.trainable_variables]
        state = [weight.value for weight in layer.non_trainable_variables]

        def loss(trainable: Any, x: Any) -> Any:
            y, moved = layer.stateless_call(trainable, state, x, training=True)
            return (y**3).sum(), moved

        text = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(trainable, sharded).compile().as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text
        assert "custom-call" not in text or "batchnorm" not in text
    finally:
        keras.distribution.set_distribution(None)


def test_the_backend_has_a_namespace_of_its_own() -> None:
    assert backends.xp.__name__ == f"batchnorm.{BACKEND}.namespace"
