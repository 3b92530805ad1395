"""The layer for NNX: as Flax's own without an option, and under NNX's ways of running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from batchnorm.flax import BatchNorm, ClippingSchedule
from batchnorm.jax import batch_norm, init, with_renorm

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (16, 4, 5)).astype(np.float32)
ALL: dict[str, Any] = {"renorm": True, "renorm_clipping": ClippingSchedule(1, 3.0, 3, 5.0, 3), "virtual_batch_size": 4}


def layer(features: Any = 5, **options: Any) -> BatchNorm:
    return BatchNorm(features, rngs=nnx.Rngs(0), **options)


def three_rngs() -> nnx.Rngs:
    return nnx.Rngs(0).split(3) if hasattr(nnx.Rngs, "split") else nnx.Rngs(0).fork(split=3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_type", [jnp.float32, jnp.bfloat16])
def test_without_an_option_it_gives_what_flax_s_layer_gives(x_type: Any, dtype: Any, masked: bool) -> None:
    x = jnp.asarray(X, x_type)
    mask = None
    if masked:
        mask = jnp.asarray(RNG.random((16, 4, 1)) < 0.6)
        x = jnp.where(mask, x, jnp.nan)
    ours, theirs = layer(dtype=dtype), nnx.BatchNorm(5, dtype=dtype, rngs=nnx.Rngs(0))
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    for running in (False, True):
        y, right = ours(x, running, mask=mask), theirs(x, running, mask=mask)
        assert y.dtype == right.dtype
        coarse = 0.07 if y.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(y.astype(jnp.float32), right.astype(jnp.float32), atol=coarse)
    np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=1e-5)


def test_where_the_mean_is_large_beside_the_spread_it_is_right_and_flax_s_layer_is_not() -> None:
    x = RNG.normal(1e4, 1.0, (256, 5)).astype(np.float32)
    wide = x.astype(np.float64)
    right = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    for fused in (None, False):
        np.testing.assert_allclose(layer(fused=fused)(x), right, atol=1e-5)
    assert np.abs(np.asarray(nnx.BatchNorm(5, rngs=nnx.Rngs(0))(x)) - right).max() > 1


def test_every_option_gives_what_the_function_gives() -> None:
    pair = jnp.linspace(0.9, 1.1, 5), jnp.linspace(-0.1, 0.1, 5)
    every: tuple[dict[str, Any], ...] = (
        ALL,
        {"adjustment": lambda shape: pair},
        {"renorm": True, "renorm_momentum": 0.5},
    )
    for options in every:
        norm = layer(momentum=0.9, **options)
        parameters, statistics = init(5, renorm="renorm" in options, steps=options is ALL)
        for _ in range(3):
            y, moved = batch_norm(
                X,
                parameters,
                statistics,
                training=True,
                momentum=0.9,
                renorm_momentum=options.get("renorm_momentum", 0.9),
                renorm_clipping=options.get("renorm_clipping"),
                virtual_batch_size=options.get("virtual_batch_size"),
                adjustment=pair if "adjustment" in options else None,
            )
            np.testing.assert_allclose(norm(X), y, atol=1e-6)
            statistics = moved
        for name, value in statistics.items():
            np.testing.assert_allclose(getattr(norm, name)[...], value, rtol=1e-6)


def test_it_trains_under_jit_and_changes_modes_and_moves_nothing_where_none_is_asked_for() -> None:
    model = nnx.Sequential(nnx.Linear(5, 5, rngs=nnx.Rngs(0)), layer(**ALL))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda model: (model(X) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    norm = model.layers[1]
    assert all(np.isfinite(float(step(model, optimizer))) for _ in range(4))
    assert bool((norm.scale[...] < 1).all())  # the loss is the size of the output
    assert int(norm.steps[...]) == 4
    model.eval()
    before = nnx.state(model, nnx.BatchStat)
    y = model(X)
    model.train()
    assert norm(X, update=False).shape == X.shape
    np.testing.assert_array_equal(nnx.view(model, use_running_average=True)(X), y)
    for one, other in zip(jax.tree.leaves(nnx.state(model, nnx.BatchStat)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)
    model.eval()
    np.testing.assert_array_equal(nnx.merge(*nnx.split(model))(X), y)


def test_critics_by_vmap_are_one_layer_over_two_axes() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def critics(rngs: nnx.Rngs) -> BatchNorm:
        return BatchNorm(5, renorm=True, rngs=rngs)

    apart = critics(three_rngs())
    together = layer((3, 5), axis=(0, 2), renorm=True)
    x = RNG.normal(1.0, 2.0, (3, 16, 5)).astype(np.float32)
    for _ in range(2):
        y = nnx.vmap(lambda norm, x: norm(x))(apart, x)
        np.testing.assert_allclose(together(x), y, atol=1e-5)
    for name in ("mean", "var", "renorm_mean", "renorm_stddev"):
        np.testing.assert_allclose(getattr(together, name)[...], getattr(apart, name)[...], rtol=1e-5)


def test_layers_that_a_scan_repeats_keep_statistics_of_their_own() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(nnx.Linear(5, 5, rngs=rngs), BatchNorm(5, virtual_batch_size=4, rngs=rngs))

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(block: Any, x: Any) -> Any:
        return block(x)

    blocks = stack(three_rngs())
    graph, state = nnx.split(blocks)
    alone = [nnx.merge(graph, jax.tree.map(lambda value, at=at: value[at], state)) for at in range(3)]
    x = X[:, 0]
    y = forward(blocks, x)
    for block in alone:
        x = block(x)
    np.testing.assert_allclose(y, x, atol=1e-5)
    for name in ("mean", "var"):
        right = [getattr(block.layers[1], name)[...] for block in alone]
        np.testing.assert_allclose(getattr(blocks.layers[1], name)[...], right, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_donated_layer_trains_as_one_that_is_kept() -> None:
    def step(norm: BatchNorm, x: Any) -> Any:
        return norm(x)

    kept, donated = layer(**ALL), layer(**ALL)
    compiled = nnx.jit(step, donate_argnums=0)
    for _ in range(3):
        np.testing.assert_allclose(compiled(donated, X), kept(X), atol=1e-6)
    for name in ("mean", "var", "renorm_mean", "renorm_stddev", "steps"):
        np.testing.assert_allclose(getattr(donated, name)[...], getattr(kept, name)[...], rtol=1e-6)


def test_variables_of_flax_s_layer_load_and_go_back() -> None:
    theirs = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    theirs(X)
    for options in ({}, {"renorm": True}):
        ours = layer(**options)
        nnx.update(ours, nnx.state(theirs))
        np.testing.assert_allclose(ours(X, True), theirs(X, True), atol=1e-6)
    started = with_renorm({"mean": theirs.mean[...], "var": theirs.var[...]})
    ours.renorm_stddev[...] = started["renorm_stddev"]
    ours(X)
    back = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    for name in ("scale", "bias", "mean", "var"):
        getattr(back, name)[...] = getattr(ours, name)[...]
    np.testing.assert_allclose(back(X, True), ours(X, True), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_checkpoints_of_orbax_hold_all_of_it(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    norm, new = layer(**ALL), layer(**ALL)
    norm(X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "norm", nnx.to_pure_dict(nnx.state(norm)))
        checkpointer.wait_until_finished()
        nnx.update(new, checkpointer.restore(tmp_path / "norm", nnx.to_pure_dict(nnx.state(new))))
    assert int(new.steps[...]) == 1
    np.testing.assert_array_equal(new(X), norm(X))
    for one, other in zip(jax.tree.leaves(nnx.state(new)), jax.tree.leaves(nnx.state(norm)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis": (0, 2)}, ValueError, r"num_features must have one size for each axis; received \(\d+,\) and axis"),
        ({"axis": 1.5}, TypeError, "axis must be an int or a list or tuple of distinct ints; received 1.5"),
        ({"features": 3.5}, TypeError, "num_features must be an int.*received 3.5"),
        ({"features": -3}, ValueError, "num_features must be an int.*received -3"),
        ({"momentum": 2.0}, ValueError, "momentum must be in"),
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be None or at least 1"),
        ({"renorm": "yes"}, TypeError, "renorm must be True or False"),
        ({"virtual_batch_size": 2, "adjustment": lambda shape: (1, 0)}, ValueError, "cannot be used together"),
    ],
)
def test_bad_options_are_refused_at_construction(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(**options)


def test_a_mode_that_nobody_gave_is_asked_for() -> None:
    with pytest.raises(ValueError, match="No `use_running_average` argument was provided"):
        layer(use_running_average=None)(X)
