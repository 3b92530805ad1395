"""Statistics of all replicas together: `replicas.py` in processes of their own, and what needs no replicas."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from batchnorm.tensorflow import BatchNormalization, batch_normalization
from tests.processes import outputs

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "tests.tensorflow.replicas"]


def free_ports(number: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [str(server.getsockname()[1]) for server in servers]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_of_one_process_give_what_one_gives_with_all_samples(replicas: int) -> None:
    (printed,) = outputs([*PROGRAM, "mirrored", str(replicas)], cwd=ROOT)
    assert "all right" in printed.splitlines(), printed[-3000:]


@pytest.mark.slow
def test_workers_give_what_one_process_gives_with_all_samples() -> None:
    ports = free_ports(2)
    for printed in outputs(*([*PROGRAM, "worker", str(index), *ports] for index in range(2)), cwd=ROOT):
        assert "all right" in printed.splitlines(), printed[-3000:]


@pytest.mark.parametrize("traced", [False, True])
def test_without_replicas_it_means_nothing(traced: bool) -> None:
    """Ours serves as before, and no operation waits for others."""
    plain, layer = BatchNormalization(renorm=True), BatchNormalization(renorm=True, synchronized=True)
    x = tf.constant(np.random.default_rng(0).normal(3.0, 2.0, (8, 5, 3)), tf.float32)
    for one in (plain, layer):
        one.build(x.shape)
    calls = [tf.function(one) if traced else one for one in (plain, layer)]
    for _ in range(2):
        first, second = (call(x, training=True) for call in calls)
        np.testing.assert_array_equal(first, second)
    for one, other in zip(plain.variables, layer.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    assert layer.kernel == plain.kernel


def test_virtual_batches_and_synchronized_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"synchronized.*virtual_batch_size=4"):
        BatchNormalization(synchronized=True, virtual_batch_size=4)
    layer = BatchNormalization(virtual_batch_size=4)
    with pytest.raises(ValueError, match=r"synchronized.*virtual_batch_size=4"):
        layer.synchronized = True
    assert layer.synchronized is False
    with tf.Graph().as_default(), pytest.raises(ValueError, match=r"synchronized.*virtual_batch_size=4"):
        batch_normalization(tf.zeros([4, 3]), synchronized=True, virtual_batch_size=4)


def test_the_configuration_has_it_where_it_was_asked_for() -> None:
    assert "synchronized" not in BatchNormalization().get_config()
    assert BatchNormalization.from_config(BatchNormalization(synchronized=True).get_config()).synchronized is True
