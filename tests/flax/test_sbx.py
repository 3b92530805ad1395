"""CrossQ's critics with our layer, and with the one that sbx trains them with."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batchnorm.flax.linen import BatchNorm, ClippingSchedule

N, WARM_UP, STEPS = 64, 150, 300
OURS = functools.partial(
    BatchNorm,
    epsilon=1e-3,
    renorm=True,
    renorm_clipping=ClippingSchedule(WARM_UP, rmax=3.0, rmax_end=WARM_UP, dmax=5.0, dmax_end=WARM_UP),
)


class Critic(nn.Module):
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        hidden = self.norm(use_running_average=False)(nn.Dense(32)(x))
        return nn.Dense(1)(nn.relu(hidden))[..., 0]


def train(norm: Callable[..., nn.Module]) -> Any:
    """Updates of two critics on a toy problem: one forward pass over this batch and the next, and no target network."""
    critics = nn.vmap(
        Critic, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
    )(norm)
    variables = jax.tree.map(jnp.asarray, critics.init(jax.random.key(0), jnp.zeros((2, 3))))
    optimizer = optax.adam(3e-3)

    def update(state: Any, key: jax.Array) -> Any:
        parameters, statistics, moments = state
        now, then = jax.random.normal(key, (2, N, 3))
        reward = jnp.sin(now).sum(axis=1)

        def loss(parameters: Any) -> Any:
            given = {"params": parameters, "batch_stats": statistics}
            both, moved = critics.apply(given, jnp.concatenate([now, then]), mutable=["batch_stats"])
            target = jax.lax.stop_gradient(reward + 0.5 * both[:, N:].min(axis=0))
            return ((both[:, :N] - target) ** 2).mean(), moved["batch_stats"]

        (value, moved), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        changes, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(parameters, changes), moved, moments), value

    begin = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    _, losses = jax.jit(lambda *given: jax.lax.scan(update, *given))(begin, jax.random.split(jax.random.key(1), STEPS))
    return losses


@pytest.fixture
def batch_renorm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a package that sbx imports
        return importlib.import_module("sbx.common.jax_layers").BatchRenorm


@pytest.mark.slow
def test_crossq_s_critics_learn_as_with_sbx_and_alike_until_renorm_begins(batch_renorm: Any) -> None:
    ours = train(OURS)
    theirs = train(functools.partial(batch_renorm, warmup_steps=WARM_UP))
    np.testing.assert_allclose(ours[:WARM_UP], theirs[:WARM_UP], rtol=1e-3)
    # From there on ours moves the standard deviation where theirs moves the variance.
    np.testing.assert_allclose(ours[WARM_UP:], theirs[WARM_UP:], rtol=0.2)
    assert abs(ours[WARM_UP:] - theirs[WARM_UP:]).max() > 1e-4
    assert ours[-20:].mean() < 0.5 * ours[:20].mean()
