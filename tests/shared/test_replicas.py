"""Two replicas of every engine, each in processes of its own, beside one process in float64: equal numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import batchnorm.numpy
from tests.processes import outputs

CLIPPING = {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}
AVERAGES = {"plain": ("moving_mean", "moving_variance"), "renorm": ("moving_mean", "renorm_mean", "renorm_stddev")}
"""Those that every dialect keeps alike."""

COMMON = """
import os, sys
import numpy as np
data = np.load("data.npz")
xs, dys = data["x"], data["dy"]  # [step][sample][...]
found = {}

def keep(case, step, **values):
    found.update({f"{case} {name} {step}": np.asarray(value) for name, value in values.items()})
"""

END = 'np.savez("found.npz", **found)'

TENSORFLOW = """
import tensorflow as tf
import keras
import batchnorm.keras
from batchnorm.tensorflow import BatchNormalization

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
local = strategy.experimental_local_results

def distributed(array):
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(np.split(array, 2)[context.replica_id_in_sync_group]))

with strategy.scope():
    options = {"momentum": 0.75, "synchronized": True}
    layers = {
        "plain": BatchNormalization(**options),
        "renorm": BatchNormalization(renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.75, **options),
        "keras plain": batchnorm.keras.BatchNormalization(**options),
        "keras renorm": batchnorm.keras.BatchNormalization(
            renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.75, **options),
        "peer": keras.layers.BatchNormalization(**options),
    }
    for layer in layers.values():
        layer.build((None, *xs.shape[2:]))

for case, layer in layers.items():
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, dy)

    run = tf.function(lambda x, dy: strategy.run(step, [x, dy]))
    for number, arrays in enumerate(zip(xs, dys)):
        y, dx = (np.concatenate(local(value)) for value in run(*map(distributed, arrays)))
        averages = {name: getattr(layer, name) for name in AVERAGES["renorm" if "renorm" in case else "plain"]}
        keep(case, number, y=y, dx=dx, **{name: tf.convert_to_tensor(value) for name, value in averages.items()})
"""

JAX = """
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from batchnorm.flax import linen
from batchnorm.jax import batch_norm, init

mesh = Mesh(np.array(jax.devices()), ("batch",))
TO_OURS = {"mean": "moving_mean", "var": "moving_variance"}
options = {"momentum": 0.75, "epsilon": 1e-3}

def function(x, statistics, **extra):
    return batch_norm(x, init(3)[0], statistics, training=True, renorm_clipping=CLIPPING, renorm_momentum=0.75,
                      **options, **extra)

def module(x, statistics):
    layer = linen.BatchNorm(use_running_average=False, axis_name="batch", renorm="renorm_mean" in statistics,
                            renorm_clipping=CLIPPING, renorm_momentum=0.75, **options)
    y, moved = layer.apply({"params": init(3)[0], "batch_stats": statistics}, x, mutable=["batch_stats"])
    return y, moved["batch_stats"]

def mapped(layer):
    return jax.shard_map(layer, mesh=mesh, in_specs=(P("batch"), P()), out_specs=(P("batch"), P()))

ENGINES = {
    "shard_map": mapped(lambda x, statistics: function(x, statistics, axis_name="batch")),
    "jit": function,
    "linen": mapped(module),
}
for engine, layer in ENGINES.items():
    for case in ("plain", "renorm"):
        @jax.jit
        def step(x, dy, statistics):
            y, pullback, moved = jax.vjp(lambda x: layer(x, statistics), x, has_aux=True)
            return y, pullback(dy)[0], moved

        statistics = init(3, renorm=case == "renorm")[1]
        for number, (x, dy) in enumerate(zip(xs, dys)):
            x, dy = jax.device_put((x, dy), NamedSharding(mesh, P("batch")))
            y, dx, statistics = step(x, dy, statistics)
            averages = {TO_OURS.get(name, name): value for name, value in statistics.items()}
            keep(f"{engine} {case}", number, y=y, dx=dx, **{name: averages[name] for name in AVERAGES[case]})
"""

PYTORCH = """
rank = int(os.fork() == 0)  # before PyTorch has threads

os.environ["KERAS_BACKEND"] = "torch"
import torch
import torch.distributed as dist
import batchnorm.keras
from batchnorm.torch import BatchNorm

dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meeting"), rank=rank, world_size=2)

def together(mine):
    parts = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)

renorm = {"renorm": True, "renorm_clipping": CLIPPING, "renorm_momentum": 0.25}
for case, options in (("plain", {}), ("renorm", renorm)):
    layer = BatchNorm(3, axis=-1, eps=1e-3, momentum=0.25, synchronized=True, **options)
    for number, arrays in enumerate(zip(xs, dys)):
        x, dy = (torch.from_numpy(np.split(array, 2)[rank]) for array in arrays)
        y = layer(x.requires_grad_())
        y.backward(dy)
        keep(case, number, y=together(y.detach()), dx=together(x.grad), moving_mean=layer.running_mean.clone())
        if case == "renorm":
            keep(case, number, renorm_mean=layer.renorm_mean.clone(), renorm_stddev=layer.renorm_stddev.clone())
        else:  # which is the unbiased one, of 48 values
            began = 0.75 ** (number + 1)
            keep(case, number, moving_variance=(layer.running_var - began) * 47 / 48 + began)

for case, options in (("plain", {}), ("renorm", renorm | {"renorm_momentum": 0.75})):
    layer = batchnorm.keras.BatchNormalization(momentum=0.75, synchronized=True, **options)
    for number, arrays in enumerate(zip(xs, dys)):
        x, dy = (torch.from_numpy(np.split(array, 2)[rank]) for array in arrays)
        y = layer(x.requires_grad_(), training=True)
        y.backward(dy)
        averages = {name: getattr(layer, name).value.detach().clone() for name in AVERAGES[case]}
        keep(f"keras {case}", number, y=together(y.detach()), dx=together(x.grad), **averages)
dist.destroy_process_group()
if rank:
    os._exit(0)
assert os.wait()[1] == 0
"""

ENGINES = {"tensorflow": TENSORFLOW, "jax": JAX, "pytorch": PYTORCH}
"""Programs; each keeps y, dx and the averages of every step of its cases, whose names end in what they are."""


def expected(xs: Any, dys: Any) -> dict[str, Any]:
    """What one process has with the samples of all replicas."""
    found: dict[str, Any] = {}
    for case in ("plain", "renorm"):
        options: dict[str, Any] = {"renorm_clipping": CLIPPING} if case == "renorm" else {}
        layer = batchnorm.numpy.BatchNormalization(
            momentum=0.75, renorm=case == "renorm", renorm_momentum=0.75, fused=False, **options
        )
        for number, (x, dy) in enumerate(zip(xs, dys, strict=True)):
            y, gradient = layer.vjp(x.astype(np.float64), training=True)
            found |= {f"{case} y {number}": y, f"{case} dx {number}": gradient(dy.astype(np.float64)).inputs}
            found |= {f"{case} {name} {number}": layer.variables[name] for name in AVERAGES[case]}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_replicas_of_every_engine_give_what_one_process_gives(engine: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    xs, dys = (rng.normal(mean, 1.5, (3, 12, 4, 3)).astype(np.float32) for mean in (3.0, 0.0))
    xs[:, :6] += 1  # replicas differ
    np.savez(tmp_path / "data.npz", x=xs, dy=dys)
    program = "\n".join([COMMON, f"{CLIPPING=}", f"{AVERAGES=}", ENGINES[engine], END])
    outputs([sys.executable, "-c", program], cwd=tmp_path, env={"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow"})
    right, found = expected(xs, dys), np.load(tmp_path / "found.npz")
    for name, value in found.items():
        *_, case, what, number = name.split()
        wanted = right[f"{'plain' if case == 'peer' else case} {what} {number}"]
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-5, err_msg=name)
    assert {" ".join(name.split()[-3:]) for name in found} >= set(right)
