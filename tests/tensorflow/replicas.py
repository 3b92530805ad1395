"""What tests of synchronized statistics run, in processes of their own, for each has one number of replicas for good.

    python -m tests.tensorflow.replicas mirrored 3               three devices of one process
    python -m tests.tensorflow.replicas worker INDEX PORT PORT   one of two workers

Every step of every case is compared with `batchnorm.numpy` in float64, over the samples of all replicas together.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import batchnorm.numpy
from batchnorm.tensorflow import BatchNormalization

SPLITS: dict[int, list[tuple[int, ...]]] = {2: [(5, 7), (6, 0), (0, 0), (1, 1)], 3: [(5, 0, 7), (4, 4, 4), (1, 0, 0)]}
"""How many samples each replica has in each step."""
CLIPPING = {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}


def by_feature(shape: Any) -> Any:
    return np.linspace(0.5, 1.5, 3), np.linspace(-1.0, 1.0, 3)


def by_position(shape: Any) -> Any:
    return np.linspace(0.5, 1.5, 12).reshape(4, 1, 3), np.linspace(-1.0, 1.0, 4).reshape(4, 1, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, and how it is called."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (4, 2, 3)
    mask: str = ""
    dtype: str = "float64"
    mean: float = 3.0
    tolerance: float = 1e-10
    traced: bool = True
    tensor: bool = False
    unbiased: bool = False
    layer: type[BatchNormalization] = BatchNormalization


class Measuring(BatchNormalization):
    """A subclass that measures by hand."""

    def _calculate_mean_and_var(self, inputs: Any, reduction_axes: Any, keep_dims: bool, mask: Any = None) -> Any:
        count = tf.cast(tf.size(inputs) / 3, inputs.dtype)
        mean = tf.math.divide_no_nan(tf.reduce_sum(inputs, reduction_axes, keepdims=True), count)
        squares = tf.reduce_sum((inputs - mean) ** 2, reduction_axes, keepdims=keep_dims)
        return (mean if keep_dims else tf.squeeze(mean, reduction_axes)), tf.math.divide_no_nan(squares, count)


CASES = [
    Case("plain"),
    Case("plain, eagerly", traced=False),
    Case("renorm", {"renorm": True, "renorm_clipping": CLIPPING}),
    Case("renorm, eagerly", {"renorm": True}, traced=False),
    Case("renorm, whose training is a tensor", {"renorm": True, "renorm_clipping": CLIPPING}, tensor=True),
    Case("adjustment", {"adjustment": by_feature}),
    Case("adjustment by position, renorm", {"adjustment": by_position, "renorm": True}),
    Case("features first", {"axis": 1}, shape=(3, 2, 2)),
    Case("two axes, renorm", {"axis": [1, 3], "renorm": True}),
    Case("mask", mask="mask"),
    Case("mask, eagerly", mask="mask", traced=False),
    Case("weights, renorm, two axes", {"axis": [1, 3], "renorm": True}, mask="weights"),
    Case("weights, whose training is a tensor", mask="weights", tensor=True),
    Case("no parameters, momentum 0", {"center": False, "scale": False, "momentum": 0.0}),
    Case("measured by a subclass", layer=Measuring),
    Case("large mean", dtype="float32", mean=1e4, tolerance=2e-5, shape=(3,)),
    Case("large mean, renorm", {"renorm": True}, dtype="float32", mean=1e4, tolerance=2e-5, shape=(3,)),
    Case("large mean, the rule of the fused path", dtype="float32", mean=1e4, tolerance=2e-5, unbiased=True),
    Case("half precision", {"renorm": True}, dtype="float16", tolerance=4e-3, shape=(3,)),
]


def distributed(strategy: Any, parts: Sequence[Any]) -> Any:
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def run(strategy: Any, case: Case) -> Iterator[str]:
    """Train a layer on the replicas, and one in NumPy on all of their samples; tell where numbers differ."""
    local, rng = strategy.experimental_local_results, np.random.default_rng(0)

    replicas = [int(index) for index in local(distributed(strategy, range(strategy.num_replicas_in_sync)))]
    options = {"momentum": 0.75, "renorm_momentum": 0.5, **case.options}
    reference = batchnorm.numpy.BatchNormalization(fused=False, masked="normalized", **options)
    reference.build((None, *case.shape), np.float64)
    with strategy.scope():
        layer = case.layer(synchronized=True, dtype=case.dtype, **options)
        layer(tf.zeros([2, *case.shape], case.dtype), training=True)  # there is nobody to wait for, and nothing moves
    variables = {name: getattr(layer, name) for name in reference.variables}
    parameters = [name for name in ("gamma", "beta") if name in variables]
    for name in parameters:
        reference.variables[name][...] = rng.normal(1.0, 0.5, variables[name].shape).astype(np.float32)
        variables[name].assign(reference.variables[name])

    def step(x: Any, dy: Any, mask: Any, training: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training, mask=mask if case.mask else None)
        dx, *gradients = tape.gradient(y, [x, *(variables[name] for name in parameters)], dy)
        together = tf.distribute.get_replica_context().all_reduce("sum", gradients) if gradients else []
        return {
            "y": y,
            "dx": dx,
            **{f"gradient of {name}": value for name, value in zip(parameters, together, strict=True)},
            **{name: tf.identity(value) for name, value in variables.items() if name not in parameters},
        }

    def call(*arguments: Any) -> Any:
        return strategy.run(step, arguments)

    train = tf.function(call, reduce_retracing=True) if case.traced else call
    unbiased = np.ones(layer.moving_variance.shape)
    axes = [at % (len(case.shape) + 1) for at in np.atleast_1d(options.get("axis", -1))]
    for number, split in enumerate(SPLITS[strategy.num_replicas_in_sync]):
        ends, training = np.cumsum([0, *split]), not (case.tensor and number == 1)
        x = rng.normal(case.mean, 1.0, (ends[-1], *case.shape)).astype(case.dtype)
        x += np.linspace(0, 1, len(x), dtype=x.dtype).reshape(-1, *[1] * len(case.shape))  # replicas differ
        dy = rng.normal(size=x.shape).astype(case.dtype)
        drawn = rng.random([size for at, size in enumerate(x.shape) if at not in axes])
        mask: Any = np.where(drawn < 0.6, drawn, 0.0) if case.mask == "weights" else drawn < 0.6
        given = [distributed(strategy, np.split(array, ends[1:-1])) for array in (x, dy, mask)]
        found = train(*given, tf.constant(training) if case.tensor else training)

        y, gradient = reference.vjp(x.astype(np.float64), training, mask if case.mask and training else None)
        right = gradient(dy.astype(np.float64))
        expected = {f"gradient of {name}": getattr(right, name) for name in parameters}
        expected |= {name: value for name, value in reference.variables.items() if name not in parameters}
        if case.unbiased:
            if len(x):
                n = x.size // x.shape[-1]
                unbiased += 0.25 * (x.astype(np.float64).var(axis=tuple(range(x.ndim - 1))) * n / (n - 1) - unbiased)
            expected["moving_variance"] = unbiased
        for place, at in enumerate(replicas):
            mine = slice(ends[at], ends[at + 1])
            for what, value in (expected | {"y": y[mine], "dx": right.inputs[mine]}).items():
                got = np.asarray(local(found[what])[place], np.float64)
                if not np.allclose(got, value, rtol=case.tolerance, atol=case.tolerance):
                    far = abs(got - value).max()
                    yield f"{case.name}: {what} of replica {at} in step {number} of {split} samples, by {far:.1e}"


def count_collectives(strategy: Any) -> None:
    """One collective forward and one backward for each layer and replica, whatever its averages are."""
    with strategy.scope():
        layers = [BatchNormalization(synchronized=True, renorm=renorm) for renorm in (False, True)]
        for layer in layers:
            layer.build((None, 3))

    def forward(x: Any) -> Any:
        for layer in layers:
            x = layer(x, training=True)
        return x

    def both(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x) ** 2
        return tape.gradient(y, x)

    for step, number in ((forward, 1), (both, 2), (lambda x: layers[0](x), 0)):
        traced = tf.function(lambda x, step=step: strategy.run(step, [x]))
        graph = traced.get_concrete_function(tf.ones([4, 3])).graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        found = sum("Collective" in node.op or "Nccl" in node.op for node in nodes)
        assert found == number * len(layers) * len(strategy.extended.worker_devices), (number, found)


def second_derivatives(strategy: Any) -> None:
    """The gradient of the squares of a gradient, beside that of one process."""
    x, dy = np.random.default_rng(0).normal(3.0, 2.0, (2, 9, 3))
    ends = [*range(1, strategy.num_replicas_in_sync), len(x)]  # the last one has most
    with strategy.scope():
        layer = BatchNormalization(synchronized=True, dtype="float64", fused=False)
        layer.build((None, 3))

    def derivative(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = layer(x, training=True)
            penalty = tf.reduce_sum(inner.gradient(y, x, dy) ** 2)
        return outer.gradient(penalty, x)

    alone = BatchNormalization(dtype="float64", fused=False)
    given = [distributed(strategy, np.split(array, ends)) for array in (x, dy)]
    found = strategy.experimental_local_results(tf.function(lambda *given: strategy.run(derivative, given))(*given))
    layer = alone
    right = np.split(derivative(tf.constant(x), tf.constant(dy)).numpy(), ends)
    index = strategy.cluster_resolver.task_id if len(found) == 1 else 0
    for value, expected in zip(found, right[index:], strict=False):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)


def refuse_graphs(strategy: Any) -> None:
    """In a graph of TensorFlow 1 there is no derivative; that is said, and no variable made."""
    with tf.Graph().as_default(), strategy.scope():
        layer = BatchNormalization(synchronized=True)
        with pytest.raises(ValueError, match="synchronized must be False"):
            strategy.run(lambda: layer(tf.zeros([2, 3]), training=True))
        assert layer.variables == []


def main(kind: str, number: str, *ports: str) -> None:
    if kind == "worker":
        cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(number)}})
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * int(number))
        strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(int(number))])
    cases = CASES[::3] if kind == "worker" else CASES  # between workers only the collectives are others
    wrong = [line for case in cases for line in run(strategy, case)]
    count_collectives(strategy)
    second_derivatives(strategy)
    refuse_graphs(strategy)
    print("\n".join(wrong) or "all right", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
