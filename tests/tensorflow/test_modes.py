"""One layer in every way of running TensorFlow: the results must not depend on it."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import batchnorm.tensorflow
from batchnorm.tensorflow import BatchNormalization, batch_normalization, xla

v1 = tf.compat.v1
OPTIONS: list[dict[str, Any]] = [
    {},
    {"fused": False},
    {"renorm": True, "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}},
    {"virtual_batch_size": 2},
    {"renorm": True, "virtual_batch_size": 4},
    {"adjustment": lambda shape: (tf.fill(shape[-1:], 1.1), tf.fill(shape[-1:], 0.3))},
    {"axis": [1, 3]},
    {"axis": 1},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
BATCHES = [np.random.default_rng(step).normal(step, 2.0, (8, 3, 3, 4)).astype(np.float32) for step in range(3)]


def assert_close(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=2e-5)


def eager_results(options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    layer = BatchNormalization(**options)
    outputs = [layer(batch, training=True) for batch in BATCHES] + [layer(BATCHES[0][:5])]
    return outputs, layer.variables


@every_option
@pytest.mark.parametrize("compiled", [False, True], ids=["function", "xla"])
def test_functions_equal_eager_execution(options: dict[str, Any], compiled: bool) -> None:
    layer = BatchNormalization(**options)
    train = tf.function(lambda x: layer(x, training=True), jit_compile=compiled)
    infer = tf.function(layer, jit_compile=compiled)
    outputs = [train(batch) for batch in BATCHES]
    served = layer.kernel
    outputs.append(infer(BATCHES[0][:5]))
    expected, variables = eager_results(options)
    assert_close(outputs, expected)
    assert_close(layer.variables, variables)
    assert (served == "cpu") == ((not compiled or xla.available()) and options.get("fused") is not False)


@pytest.mark.slow
def test_exported_inference_needs_no_operation_but_tensorflow_s_own(tmp_path: pathlib.Path) -> None:
    expected = []
    for index, options in enumerate(OPTIONS):
        layer = BatchNormalization(**options)
        layer(BATCHES[0], training=True)
        module = tf.Module()
        module.layer = layer
        module.infer = tf.function(layer, input_signature=[tf.TensorSpec([None, 3, 3, 4])])
        tf.saved_model.save(module, str(tmp_path / str(index)))
        expected.append(layer(BATCHES[1][:5]))
    code = (
        "import sys, numpy, tensorflow as tf\n"
        "x, y, *folders = sys.argv[1:]\n"
        "x = numpy.load(x)\n"
        "models = [tf.saved_model.load(folder) for folder in folders]\n"
        "numpy.save(y, [model.infer(x) for model in models])\n"
        "assert 'batchnorm' not in sys.modules\n"
    )
    np.save(tmp_path / "x.npy", BATCHES[1][:5])
    paths = [str(tmp_path / name) for name in ("x.npy", "y.npy", *map(str, range(len(OPTIONS))))]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    assert_close(np.load(tmp_path / "y.npy"), expected)


@every_option
def test_one_function_serves_any_batch_size_and_either_mode(options: dict[str, Any]) -> None:
    layer = BatchNormalization(**options)

    @tf.function(input_signature=[tf.TensorSpec([None, 3, 3, 4]), tf.TensorSpec([], tf.bool)])
    def apply(x: Any, training: Any) -> Any:
        return layer(x, training=training)

    outputs = [apply(batch, True) for batch in BATCHES] + [apply(BATCHES[0][:5], False)]
    expected, variables = eager_results(options)
    assert_close(outputs, expected)
    assert_close(layer.variables, variables)


def operations(graph: Any) -> set[str]:
    """The types of all operations of a graph and of the functions in it."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return {node.op for node in nodes}


@every_option
@pytest.mark.parametrize("control_flow", [1, 2])
def test_a_graph_that_trains_and_infers_has_the_operations_of_the_original(
    options: dict[str, Any], control_flow: int, original: Any
) -> None:
    def types(module: Any, **more: Any) -> tuple[set[str], Any]:
        with tf.Graph().as_default() as graph, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the original's own deprecations
            x, training = v1.placeholder(tf.float32, [None, 3, 3, 4]), v1.placeholder(tf.bool, [])
            layer = module.BatchNormalization(**{**options, **more})
            tf.gradients(layer(x, training=training), [x])
            return operations(graph), layer

    (v1.enable_control_flow_v2 if control_flow == 2 else v1.disable_control_flow_v2)()
    try:
        ours, layer = types(batchnorm.tensorflow)
        assert not {operation for operation in ours if operation.startswith("Batchnorm")}
        if "virtual_batch_size" not in options:  # where the original has nothing right to compare with
            assert ("FusedBatchNormV3" in ours) == ("FusedBatchNormV3" in types(original)[0])
        assert layer.kernel == ("FusedBatchNormV3" if options in ({}, {"axis": 1}) else "composed")
        if options.get("fused") is not False:
            ours, layer = types(batchnorm.tensorflow, fused=True)
            assert {"BatchnormForward", "BatchnormBackward"} <= ours
            assert layer.kernel == "cpu"
    finally:
        v1.enable_control_flow_v2()


@every_option
@pytest.mark.parametrize("fused", [None, True])
def test_a_graph_that_trains_and_infers_equals_eager_execution(options: dict[str, Any], fused: bool | None) -> None:
    options = {"fused": fused, **options}
    layer = BatchNormalization(**options)
    layer.build([None, 3, 3, 4])
    start = layer.get_weights()

    def gradients(x: Any, training: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
            loss = tf.reduce_sum(y**3)
        return y, *tape.gradient(loss, [x, layer.gamma, layer.beta])

    specs = [tf.TensorSpec([None, 3, 3, 4]), tf.TensorSpec([], tf.bool)]
    calls = [(BATCHES[0], True), (BATCHES[1], True), (BATCHES[2][:5], False), (BATCHES[2][:0], True)]
    found = []
    for function in (tf.function(gradients, input_signature=specs), gradients):
        layer.set_weights(start)
        found.append([[value.numpy() for value in function(tf.constant(x), training)] for x, training in calls])
        found[-1].append(layer.get_weights())
    for one, other in zip(*found, strict=True):
        for ours, expected in zip(one, other, strict=True):
            bound = 1e-4 * max(1.0, float(np.abs(expected).max(initial=0)))
            np.testing.assert_allclose(ours, expected, rtol=0, atol=bound)


@pytest.mark.slow
def test_a_graph_that_trains_and_infers_loads_where_this_package_is_not(tmp_path: pathlib.Path) -> None:
    feed = {"x": BATCHES[0]}
    expected = []
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 3, 3, 4], name="x")
        training = v1.placeholder_with_default(False, [])
        y = x
        for options in OPTIONS:
            if "virtual_batch_size" not in options:  # whose inference takes any batch, but not their training
                y = batch_normalization(y, training=training, **options)
        session.run(v1.global_variables_initializer())
        session.run([y, v1.get_collection(v1.GraphKeys.UPDATE_OPS)], {x: feed["x"], training: True})
        expected.append(session.run(y, {x: feed["x"]}))
        v1.saved_model.simple_save(session, str(tmp_path / "model"), {"x": x}, {"y": y})
    code = (
        "import sys, numpy, tensorflow as tf\n"
        "served = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "y = served(tf.constant(numpy.load(sys.argv[2])))['y']\n"
        "assert 'batchnorm' not in sys.modules\n"
        "numpy.save(sys.argv[3], y)\n"
    )
    np.save(tmp_path / "x.npy", feed["x"])
    paths = [str(tmp_path / name) for name in ("model", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    assert_close([np.load(tmp_path / "y.npy")], expected)


@every_option
def test_gradients_in_xla_equal_eager_ones(options: dict[str, Any]) -> None:
    layer = BatchNormalization(**options)
    layer.build([None, 3, 3, 4])

    def gradients(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        return tape.gradient(loss, [x, layer.gamma, layer.beta])

    start = layer.get_weights()
    compiled = [g.numpy() for g in tf.function(gradients, jit_compile=True)(tf.constant(BATCHES[0]))]
    layer.set_weights(start)
    for one, other in zip(compiled, gradients(tf.constant(BATCHES[0])), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-4 * max(1.0, float(np.abs(other).max())))


@pytest.mark.slow
@every_option
def test_saved_models_train_and_infer_like_the_layer(options: dict[str, Any], tmp_path: pathlib.Path) -> None:
    class Model(tf.Module):
        def __init__(self) -> None:
            self.normalize = BatchNormalization(**options)

        @tf.function(input_signature=[tf.TensorSpec([None, 3, 3, 4])])
        def infer(self, x: Any) -> Any:
            return self.normalize(x)

        @tf.function(input_signature=[tf.TensorSpec([None, 3, 3, 4])])
        def train(self, x: Any) -> Any:
            return self.normalize(x, training=True)

    model = Model()
    model.train(BATCHES[0])
    tf.saved_model.save(model, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    assert_close([loaded.train(BATCHES[1])], [model.train(BATCHES[1])])
    assert_close([loaded.infer(BATCHES[2][:3])], [model.infer(BATCHES[2][:3])])
    assert len(model.variables) == len(model.normalize.variables)


@every_option
def test_checkpoints_of_modules_restore_before_and_after_building(
    options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    layer = BatchNormalization(**options)
    layer(BATCHES[0], training=True)
    path = tf.train.Checkpoint(layer=layer).save(str(tmp_path / "checkpoint"))
    for build_first in (False, True):
        other = BatchNormalization(**options)
        if build_first:
            other(BATCHES[1], training=True)
        status = tf.train.Checkpoint(layer=other).restore(path)
        other(BATCHES[2])
        status.assert_consumed()
        assert_close(other.variables, layer.variables)


@pytest.mark.slow
@every_option
@pytest.mark.parametrize("built_by", ["scope", "replicas"])
def test_replicas_keep_their_own_statistics_and_share_parameters(options: dict[str, Any], built_by: str) -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer, other = BatchNormalization(**options), BatchNormalization(**options)
        if built_by == "scope":
            layer.build([None, 3, 3, 4])

    def halves(batch: Any) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(np.split(batch, 2)[context.replica_id_in_sync_group])
        )

    @tf.function
    def step(batch: Any) -> Any:
        def replica(x: Any) -> Any:
            with tf.GradientTape() as tape:
                y = layer(x, training=True)
                loss = tf.reduce_sum(y**3)
            return y, tape.gradient(loss, layer.trainable_variables)

        return strategy.run(replica, (batch,))

    twins = [BatchNormalization(**options) for _ in range(2)]
    for batch in BATCHES:
        y, gradients = step(halves(batch))
        expected = [twin(half, training=True) for twin, half in zip(twins, np.split(batch, 2), strict=True)]
        assert_close(strategy.experimental_local_results(y), expected)
        assert len(gradients) == 2
    # Read outside of the replicas, a statistic is the mean of theirs.
    for name in ("moving_mean", "moving_variance"):
        mean = np.mean([getattr(twin, name).numpy() for twin in twins], axis=0)
        np.testing.assert_allclose(getattr(layer, name).numpy(), mean, atol=2e-5)
    strategy.run(lambda x: other(x, training=True), (halves(BATCHES[0]),)) if built_by == "replicas" else None
    if built_by == "replicas":
        assert other.moving_mean is not layer.moving_mean


def test_an_empty_replica_changes_nothing() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = BatchNormalization(momentum=0.5)
        layer.build([None, 2])
    sizes = [4, 0]
    batch = strategy.experimental_distribute_values_from_function(
        lambda context: tf.ones([sizes[context.replica_id_in_sync_group], 2])
    )
    tf.function(lambda x: strategy.run(lambda one: layer(one, training=True), (x,)))(batch)
    values = [value.numpy().tolist() for value in strategy.experimental_local_results(layer.moving_mean)]
    assert values == [[0.5, 0.5], [0.0, 0.0]]


def test_wrapped_functions_find_updates_and_penalties_in_collections() -> None:
    def model(x: Any) -> Any:
        y = batch_normalization(x, training=True, momentum=0.5, gamma_regularizer=tf.nn.l2_loss)
        with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
            return tf.identity(y), v1.get_collection(v1.GraphKeys.REGULARIZATION_LOSSES)

    wrapped = v1.wrap_function(model, [tf.TensorSpec([None, 1])])
    _, (penalty,) = wrapped(tf.constant([[1.0], [3.0]]))
    moved = {variable.name.rpartition("/")[2]: variable.numpy().tolist() for variable in wrapped.variables}
    assert penalty.numpy() == 0.5
    assert moved["moving_mean:0"] == [1.0]


@pytest.mark.parametrize("fused", [None, False], ids=["cpu", "composed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"virtual_batch_size": 3},
        {"adjustment": lambda shape: (tf.constant([0.7, 1.3], tf.float64), tf.constant([0.1, 0.2], tf.float64))},
        {"axis": 0},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_second_derivatives_are_right(options: dict[str, Any], fused: bool | None) -> None:
    """Against finite differences; the original stops a gradient in its variance, and so gets these wrong."""
    x = np.random.default_rng(0).normal(size=(6, 2))
    weights = np.random.default_rng(1).normal(size=(6, 2))
    layer = BatchNormalization(dtype="float64", fused=fused, gamma_initializer=v1.constant_initializer(1.5), **options)

    def gradient(point: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(point)
            loss = tf.reduce_sum(weights * layer(point, training=True) ** 2)
        return tape.gradient(loss, point)

    point = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(point)
        total = tf.reduce_sum(weights * gradient(point))
    second = tape.gradient(total, point).numpy()
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-5
        difference = np.sum(weights * (gradient(tf.constant(x + step)) - gradient(tf.constant(x - step)))) / 2e-5
        np.testing.assert_allclose(second[at], difference, rtol=1e-4, atol=1e-6)
    assert layer.kernel == ("composed" if fused is False else "cpu")


@pytest.mark.parametrize(
    "options", [{}, {"scale": False}, {"virtual_batch_size": 3}, {"renorm": True}, {"axis": [0, 2]}],
    ids=lambda options: "+".join(options) or "plain",
)  # fmt: skip
@pytest.mark.parametrize("size", [6, None])
def test_second_derivatives_in_graphs_equal_eager_ones(options: dict[str, Any], size: int | None) -> None:
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 2, 3)))
    layer = BatchNormalization(dtype="float64", **options)
    layer.build(x.shape)
    start = layer.get_weights()

    def second(x: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(tf.tanh(layer(x, training=True)) ** 3)
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(penalty, [x, *layer.trainable_variables])

    expected = [value.numpy() for value in second(x)]
    assert layer.kernel == "cpu"
    layer.set_weights(start)
    shape = x.shape if options.get("axis") else [size, 2, 3]
    found = tf.function(second, input_signature=[tf.TensorSpec(shape, tf.float64)])(x)
    for ours, eager in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, eager, rtol=1e-9, atol=1e-9)


def test_second_derivatives_reach_the_parameters_too() -> None:
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 2)))
    found = []
    for fused in (None, False):
        layer = BatchNormalization(dtype="float64", fused=fused)
        layer.build([None, 2])
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 3)
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        found.append([g.numpy() for g in outer.gradient(penalty, [layer.gamma, layer.beta])])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)


def test_forward_mode_differentiation_agrees_with_backward_mode() -> None:
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 2)))
    direction = tf.constant(np.random.default_rng(1).normal(size=(6, 2)))
    layer = BatchNormalization(dtype="float64")
    layer.build([None, 2])
    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        y = layer(x, training=True)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, training=True) * direction)
    forward = tf.reduce_sum(accumulator.jvp(y) * direction)
    np.testing.assert_allclose(forward, tf.reduce_sum(tape.gradient(loss, x) * direction), rtol=1e-9)


def test_clips_may_be_a_schedule_of_variables() -> None:
    rmax, dmax = tf.Variable(1.0), tf.Variable(0.0)
    scheduled = BatchNormalization(renorm=True, renorm_clipping={"rmin": 1 / rmax, "rmax": rmax, "dmax": dmax})
    plain = BatchNormalization()
    x = BATCHES[1]
    # r = 1 and d = 0 are plain batch normalization.
    assert_close([scheduled(x, training=True)], [plain(x, training=True)])
    clipped = BatchNormalization(renorm=True, renorm_clipping={"rmin": 1.0, "rmax": 3.0, "dmax": 5.0})
    clipped(x, training=True)
    rmax.assign(3.0)
    dmax.assign(5.0)
    assert_close([scheduled(x, training=True)], [clipped(x, training=True)])


def test_momentum_may_be_a_tensor() -> None:
    momentum = tf.Variable(0.5)
    layer, same = BatchNormalization(momentum=momentum), BatchNormalization(momentum=0.5)
    assert_close([layer(BATCHES[0], training=True)], [same(BATCHES[0], training=True)])
    assert_close(layer.variables, same.variables)


SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tf_keras":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import numpy as np
import tensorflow.compat.v1 as tf
import batchnorm.tensorflow
tf.disable_v2_behavior()
batchnorm.tensorflow.install()

for options in OPTIONS:
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [None, 3, 3, 4])
    training = tf.placeholder_with_default(False, [])
    y = tf.layers.batch_normalization(x, training=training, name="bn", **options)
    gradient = tf.gradients(tf.reduce_sum(y ** 3), [x] + tf.trainable_variables())
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    assert all("_ref" in repr(variable) for variable in tf.global_variables())
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        outputs = [session.run([y, updates, gradient], {x: batch, training: True})[0] for batch in np.load(PATH)]
        before = session.run(tf.global_variables())
        session.run([y, updates], {x: np.load(PATH)[0][:5]})
        after = session.run(tf.global_variables())
        assert all(np.array_equal(one, other) for one, other in zip(before, after))
        results = {v.op.name.rpartition("/")[2]: value for v, value in zip(tf.global_variables(), before)}
        np.savez(f"{PATH}.{OPTIONS.index(options)}.npz", outputs=outputs, **results)
"""


@pytest.mark.slow
def test_reference_variables_without_tf_keras_equal_eager_execution(tmp_path: pathlib.Path) -> None:
    """TensorFlow 1 behavior holds for a whole process, so this runs in one of its own."""
    options = [one for one in OPTIONS if "adjustment" not in one]
    options += [{**one, "fused": True} for one in options if "fused" not in one]
    path = tmp_path / "batches.npy"
    np.save(path, BATCHES)
    script = tmp_path / "script.py"
    script.write_text(f"OPTIONS = {options!r}\nPATH = {str(path)!r}\n" + textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for index, one in enumerate(options):
        results = np.load(f"{path}.{index}.npz")
        layer = BatchNormalization(**one)
        assert_close(results["outputs"], [layer(batch, training=True) for batch in BATCHES])
        for variable in layer.variables:
            short = variable.name.rpartition("/")[2].removesuffix(":0")
            np.testing.assert_allclose(results[short], variable.numpy(), rtol=0, atol=2e-5, err_msg=short)
