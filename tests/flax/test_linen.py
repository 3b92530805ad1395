"""The layer for linen: as Flax's own without an option, with its collections, and under linen's transformations."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

from batchnorm.flax.linen import BatchNorm, ClippingSchedule
from batchnorm.jax import with_renorm, without_renorm

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (16, 4, 5)).astype(np.float32)
KEY = jax.random.key(0)


def step(layer: nn.Module, variables: Any, x: Any = X, **options: Any) -> tuple[Any, Any]:
    y, moved = layer.apply(variables, x, mutable=["batch_stats"], **options)
    return y, {**variables, **moved}


@pytest.mark.parametrize(
    "options", [{}, {"axis": (1, 2)}, {"axis": 1, "use_bias": False}, {"use_scale": False}], ids=str
)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("x_type", [jnp.float32, jnp.bfloat16])
def test_without_an_option_it_gives_what_flax_s_layer_gives(x_type: Any, dtype: Any, options: dict[str, Any]) -> None:
    x = jnp.asarray(X, x_type)
    mask = jnp.asarray(RNG.random(X.shape) < 0.6)
    x = jnp.where(mask, x, jnp.nan)
    ours, theirs = (make(use_running_average=False, dtype=dtype, **options) for make in (BatchNorm, nn.BatchNorm))
    variables = theirs.init(KEY, x, mask=mask)
    assert jax.tree.map(jnp.shape, ours.init(KEY, x, mask=mask)) == jax.tree.map(jnp.shape, variables)
    (y, moved), (right, expected) = (step(one, variables, x, mask=mask) for one in (ours, theirs))
    assert y.dtype == right.dtype
    coarse = 0.05 if y.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(y.astype(jnp.float32), right.astype(jnp.float32), atol=coarse)
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x: Any, training: bool, update: bool = True) -> Any:
        schedule = ClippingSchedule(1, 3.0, 1, 5.0, 1)
        norm = BatchNorm(use_running_average=not training, renorm=True, renorm_clipping=schedule)
        return nn.Dense(1)(nn.relu(norm(nn.Dense(5)(x), update=update)))


def test_critics_by_vmap_have_statistics_of_their_own_which_a_target_pass_leaves_alone() -> None:
    critics = nn.vmap(
        Critic,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=(None, None, None),
        axis_size=2,
    )()
    variables = critics.init(KEY, X[:, 0], True, True)
    kept = critics.apply(variables, X[:, 0], True, False)
    assert kept.shape == (2, 16, 1)
    y, moved = critics.apply(variables, X[:, 0], True, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, kept)
    statistics = moved["batch_stats"]["BatchNorm_0"]
    assert statistics["renorm_mean"].shape == (2, 5)
    np.testing.assert_array_equal(statistics["steps"], [1, 1])
    assert float(jnp.abs(statistics["mean"][0] - statistics["mean"][1]).max()) > 0


def test_layers_that_a_scan_repeats_keep_statistics_of_their_own() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
            return BatchNorm(use_running_average=False, virtual_batch_size=4)(nn.Dense(5)(x)), None

    stack = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)()
    variables = stack.init(KEY, X[:, 0], None)
    (y, _), moved = stack.apply(variables, X[:, 0], None, mutable=["batch_stats"])
    x = X[:, 0]
    for at in range(3):
        own = jax.tree.map(lambda value, at=at: value[at], variables)
        (x, _), alone = Block().apply(own, x, None, mutable=["batch_stats"])
        for one, other in zip(
            jax.tree.leaves(alone), jax.tree.leaves(jax.tree.map(lambda value, at=at: value[at], moved)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, x, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_train_state_carries_the_statistics_and_may_be_donated() -> None:
    class State(train_state.TrainState):
        batch_stats: Any

    class Model(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x: Any, training: bool) -> Any:
            return nn.Dense(1)(self.layer(use_running_average=not training)(nn.Dense(5)(x)))

    def step(state: State, x: Any) -> tuple[State, Any]:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            y, moved = state.apply_fn(variables, x, True, mutable=["batch_stats"])
            return ((y[:, 0] - x.sum(axis=1)) ** 2).mean(), moved["batch_stats"]

        (value, moved), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, batch_stats=moved), value

    found = []
    for layer in (functools.partial(BatchNorm, name="norm"), functools.partial(nn.BatchNorm, name="norm")):
        model = Model(layer)
        variables = model.init(KEY, X[:, 0], False)
        state = State.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=optax.sgd(0.1, 0.9),
            batch_stats=variables["batch_stats"],
        )
        compiled = jax.jit(step, donate_argnums=0)
        for _ in range(5):
            state, value = compiled(state, X[:, 0])
        y = model.apply({"params": state.params, "batch_stats": state.batch_stats}, X[:, 0], False)
        assert int(state.step) == 5
        found.append((value, y, state.params, state.batch_stats))
    ours, theirs = (jax.tree.leaves(one) for one in found)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_variables_of_flax_s_layer_load_and_go_back() -> None:
    theirs, ours = nn.BatchNorm(), BatchNorm(renorm=True)
    _, variables = step(theirs, theirs.init(KEY, X, False), use_running_average=False)
    taken = {**variables, "batch_stats": with_renorm(variables["batch_stats"])}
    _, moved = step(ours, taken, use_running_average=False)
    back = {**moved, "batch_stats": without_renorm(moved["batch_stats"])}
    np.testing.assert_allclose(
        theirs.apply(back, X, use_running_average=True), ours.apply(moved, X, use_running_average=True), atol=1e-6
    )


def test_bad_options_are_refused_before_variables_are_made() -> None:
    with pytest.raises(ValueError, match="momentum must be in"):
        BatchNorm(use_running_average=False, momentum=3.0).init(KEY, X)
    with pytest.raises(ValueError, match="axis must be in"):
        BatchNorm(use_running_average=False, axis=3).init(KEY, X)
