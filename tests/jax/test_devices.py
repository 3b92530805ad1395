"""Several devices, simulated in a process of their own: sharded by the compiler, by `shard_map` and by `pmap`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import functools, os, warnings
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from batchnorm.jax import batch_norm, init, primitives

rng = np.random.default_rng(0)
x = rng.normal(3.0, 2.0, (32, 5, 3)).astype(np.float32)
mask = rng.random((32, 5, 1)) < np.linspace(0.0, 0.9, 32)[:, None, None]
parameters, statistics = init(3, renorm=True)
mesh = Mesh(np.array(jax.devices()), ("d",))
batches = NamedSharding(mesh, P("d"))

def step(x, parameters, statistics, mask=None, **options):
    def loss(x, parameters):
        y, moved = batch_norm(x, parameters, statistics, training=True, mask=mask, **options)
        return (y ** 3).sum(), (y, moved)
    gradients, (y, moved) = jax.grad(loss, (0, 1), has_aux=True)(x, parameters)
    return y, moved, gradients

def close(found, right):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)

# By the compiler: as on one device, and nothing is gathered.
for options in ({}, {"fused": False}):
    whole = jax.jit(functools.partial(step, **options))
    compiled = whole.lower(jax.device_put(x, batches), parameters, statistics).compile()
    assert "all-gather" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()
    assert not any(target in compiled.as_text() for target in primitives.TARGETS.values())
    close(compiled(jax.device_put(x, batches), parameters, statistics), whole(x, parameters, statistics))

# By shard_map: each shard by itself on the kernels, or all together under a name; statistics come out replicated.
def sharded(check, **options):
    specs = dict(mesh=mesh, in_specs=(P("d"), P(), P(), P("d")), check_vma=check)
    def forward(x, parameters, statistics, mask):
        return batch_norm(x, parameters, statistics, training=True, mask=mask, axis_name="d", **options)
    mapped = jax.shard_map(forward, out_specs=(P("d"), P()), **specs)
    def loss(x, parameters):
        y, moved = mapped(x, parameters, statistics, mask)
        return (y ** 3).sum(), (y, moved)
    gradients, (y, moved) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, parameters)
    return y, moved, gradients

for check in (True, False):
    close(sharded(check), step(x, parameters, statistics, mask))

alone = jax.shard_map(lambda x: batch_norm(x, parameters, statistics, training=True)[0], mesh=mesh, in_specs=P("d"),
                      out_specs=P("d"))
close(jax.jit(alone)(x), np.concatenate(
    [batch_norm(part, parameters, statistics, training=True)[0] for part in np.split(x, 8)]))
if primitives.available():
    assert primitives.TARGETS["forward"] in jax.jit(alone).lower(x).as_text()

# The same under a mask, in uneven virtual batches, and backward.
def apart(x, mask):
    return batch_norm(x, parameters, statistics, training=True, mask=mask, virtual_batch_size=3)[0]

spread = jax.jit(jax.grad(lambda x: (jax.shard_map(
    apart, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))(x, mask) ** 3).sum()))
parts = zip(np.split(x, 8), np.split(mask, 8))
close(spread(x), np.concatenate([jax.grad(lambda x: (apart(x, m) ** 3).sum())(part) for part, m in parts]))
if primitives.available():
    assert all(target in spread.lower(x).as_text() for target in primitives.TARGETS.values())

# By pmap, whole and in groups of four.
shards, masks = x.reshape(8, 4, 5, 3), mask.reshape(8, 4, 5, 1)
for groups, parts in ((None, [range(8)]), ([[0, 1, 2, 3], [4, 5, 6, 7]], [range(4), range(4, 8)])):
    mapped = jax.pmap(lambda x, m: batch_norm(
        x, parameters, statistics, training=True, mask=m, axis_name="i", axis_index_groups=groups), axis_name="i")
    y, moved = mapped(shards, masks)
    for part in parts:
        part = list(part)
        size = 4 * len(part)
        right, averages = batch_norm(
            shards[part].reshape(size, 5, 3), parameters, statistics, training=True,
            mask=masks[part].reshape(size, 5, 1))
        close(y[np.array(part)].reshape(size, 5, 3), right)
        for device in part:
            close(jax.tree.map(lambda value: value[device], moved), averages)
print("all right")
"""


@pytest.mark.slow
def test_several_devices_give_what_one_gives() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "all right"
