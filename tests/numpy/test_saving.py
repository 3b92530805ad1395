"""Variables saved, loaded, copied and pickled, and checkpoints of both generations."""

from __future__ import annotations

import copy
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from batchnorm.numpy import BatchNormalization
from tests.oracle import Oracle

from .cases import NAMES, Case, cases, near, same_state


def save(path: Path, layer: BatchNormalization) -> None:
    arrays: dict[str, Any] = layer.variables
    np.savez(path, **arrays)


@given(case=cases(sizes=(1, 2, 3), steps=3, most=60))
def test_a_saved_layer_goes_on_from_where_it_was(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("saved") / "layer.npz"
    first, second, third = case.shapes
    layer = case.layer()
    layer(case.x(first, 0), training=True)
    save(path, layer)
    other = case.layer()
    with np.load(path) as saved:
        other.load(saved)
    x, then = case.x(second, 1), case.x(third, 2)
    assert other(x, training=True).tobytes() == layer(x, training=True).tobytes()
    assert other(then).tobytes() == layer(then).tobytes()
    for name, value in layer.variables.items():
        assert other.variables[name].tobytes() == value.tobytes()
    assert list(other.variables) == list(layer.variables)


def test_a_saved_layer_is_a_plain_archive_of_its_variables_by_name(tmp_path: Path) -> None:
    layer = BatchNormalization(renorm=True)
    layer(np.ones((2, 3)), training=True)
    save(tmp_path / "layer.npz", layer)
    assert zipfile.ZipFile(tmp_path / "layer.npz").namelist() == [f"{name}.npy" for name in NAMES]


@pytest.mark.parametrize("again", [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "initializer", [0.5, [0.5, 1.0, 2.0], np.full(3, 0.5), "ones", np.ones], ids=lambda part: str(part)[:12]
)
def test_a_pickled_or_copied_layer_goes_on_by_itself(initializer: Any, steps: int, again: Any) -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (8, 3))
    layer = BatchNormalization(
        gamma_initializer=initializer,
        moving_variance_initializer=initializer,
        renorm=True,
        renorm_clipping={"rmax": 3.0},
        virtual_batch_size=2,
        dtype=np.float32,
    )
    for _ in range(steps):
        layer(x, training=True)
    other = again(layer)
    alone = other(x, training=True)
    assert layer(x, training=True).tobytes() == alone.tobytes()
    assert layer(x).tobytes() == other(x).tobytes()
    for name, value in layer.variables.items():
        assert other.variables[name].tobytes() == value.tobytes()
        assert not np.shares_memory(other.variables[name], value)


def test_loading_copies() -> None:
    mine = {"gamma": np.ones(2), "beta": np.zeros(2), "moving_mean": np.zeros(2), "moving_variance": np.ones(2)}
    layer = BatchNormalization(momentum=0.5)
    layer.load(mine)
    layer(np.full((3, 2), 8.0), training=True)
    layer.variables["gamma"][...] = 5.0
    assert mine["moving_mean"].tolist() == [0.0, 0.0]
    assert mine["gamma"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("built", [False, True])
def test_loaded_whole_numbers_are_averaged_as_the_floats_that_they_are(built: bool) -> None:
    layer = BatchNormalization(momentum=0.5)
    if built:
        layer.build((None, 1), np.float64)
    layer.load({"gamma": [2], "beta": [1], "moving_mean": [0], "moving_variance": [4]})
    layer(np.array([[1.0], [2.0]]), training=True)
    assert layer.moving_mean.tolist() == [0.75]
    assert layer.moving_variance.tolist() == [2.125]


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3)])
def test_a_renorm_checkpoint_of_the_older_generation_is_converted(built: bool, shape: tuple[int, ...]) -> None:
    older = {
        "gamma": np.ones(3),
        "beta": np.zeros(3),
        "moving_mean": np.array([1.0, 2.0, 3.0]),
        "moving_variance": np.array([0.25, 1.0, 4.0]),
        "renorm_mean": np.array([0.5, 1.0, -2.0]),
        "renorm_mean_weight": np.array(0.5),
        "renorm_stddev": np.array([0.5, 0.25, 1.0]),
        "renorm_stddev_weight": np.array(0.25),
    }
    layer = BatchNormalization(renorm=True, epsilon=0.25)
    if built:
        layer.build((None, 3), np.float64)
    layer.load(older)
    oracle = Oracle.build((1, 3), renorm=True, epsilon=0.25)
    oracle.variables |= {
        "moving_mean": older["moving_mean"].copy(),
        "moving_variance": older["moving_variance"].copy(),
        "moving_stddev": np.sqrt([0.5, 1.25, 4.25]),
        "renorm_mean": np.array([1.0, 2.0, -4.0]),
        "renorm_stddev": np.array([2.0, 1.0, 4.0]),
    }
    same_state(layer, oracle, 2, "float64")
    x = np.random.default_rng(0).normal(size=shape)
    near(layer(x), oracle.infer(x), "float64")
    near(layer(x, training=True), oracle.train(x), "float64")
    same_state(layer, oracle, 2, "float64")


def test_a_renorm_checkpoint_serves_a_layer_without_renorm() -> None:
    layer = BatchNormalization(renorm=True)
    x = np.random.default_rng(0).normal(size=(4, 3))
    layer(x, training=True)
    plain = BatchNormalization()
    plain.load(layer.variables)
    assert list(plain.variables) == ["gamma", "beta", "moving_mean", "moving_variance"]
    assert plain(x).tolist() == layer(x).tolist()


@pytest.mark.parametrize("name", ["gamma", "beta", "moving_mean", "moving_variance"])
def test_a_missing_variable_is_named_and_nothing_is_taken_over(name: str) -> None:
    layer = BatchNormalization()
    layer.build((None, 2))
    before = dict(layer.variables)
    with pytest.raises(KeyError, match=f"missing.*{name}"):
        layer.load({key: np.full(2, 9.0) for key in before if key != name})
    assert all(layer.variables[key] is value for key, value in before.items())


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance", "renorm_mean_weight", "renorm_stddev"])
def test_what_an_older_checkpoint_lacks_is_named_too(name: str) -> None:
    older = {
        "gamma": 1.0,
        "beta": 0.0,
        "moving_mean": 0.0,
        "moving_variance": 1.0,
        "renorm_mean": 0.0,
        "renorm_mean_weight": 1.0,
        "renorm_stddev": 1.0,
        "renorm_stddev_weight": 1.0,
    }
    with pytest.raises(KeyError, match=f"variables must hold.*{name}"):
        BatchNormalization(renorm=True).load({key: np.array([value]) for key, value in older.items() if key != name})


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_of_another_shape_is_refused_by_name_before_anything_is_changed(name: str) -> None:
    layer = BatchNormalization(renorm=True)
    layer.build((None, 2))
    before = dict(layer.variables)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2,\); received shape \(3,\)"):
        layer.load({key: np.full(3 if key == name else 2, 9.0) for key in before})
    assert all(layer.variables[key] is value for key, value in before.items())


def test_a_variable_loaded_before_building_is_checked_at_the_first_call_which_builds_nothing() -> None:
    layer = BatchNormalization()
    layer.load({name: np.ones(3) for name in NAMES})
    with pytest.raises(ValueError, match=r"must have shape \(2,\); received shape \(3,\)"):
        layer(np.ones((4, 2)), training=True)
    assert {value.tolist()[0] for value in layer.variables.values()} == {1.0}
    assert layer(np.ones((4, 3))).shape == (4, 3)
