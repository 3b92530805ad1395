"""Checkpoints go both ways between the layer and the original, by variable name; older ones are converted."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import batchnorm.numpy
import batchnorm.tensorflow as ours
from batchnorm.tensorflow import BatchNormalization, modernize_checkpoint

v1 = tf.compat.v1
OPTIONS: list[dict[str, Any]] = [
    {},
    {"center": False},
    {"scale": False},
    {"axis": 1},
    {"axis": [1, 3]},
    {"virtual_batch_size": 2},
    {"virtual_batch_size": 2, "axis": [1, 2]},
    {"renorm": True},
    {"renorm": True, "virtual_batch_size": 2},
    {"renorm": True, "axis": [1, 2], "center": False},
    {"name": "mine"},
    {"trainable": False},
]
X = np.random.default_rng(0).normal(2.0, 3.0, (4, 3, 3, 5)).astype(np.float32)


def session_results(module: Any, options: dict[str, Any], path: str, restore: bool) -> list[Any]:
    """Save variables that training has moved, or restore them; return them and an inference."""
    with tf.Graph().as_default(), v1.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the original's own deprecations
        x = v1.placeholder(tf.float32, [None, 3, 3, 5])
        with v1.variable_scope("network"):
            layer = module.BatchNormalization(**options)
            layer(x, training=True)
            y = layer(x, training=False)
        saver = v1.train.Saver()
        if restore:
            saver.restore(session, path)
        else:
            random = np.random.default_rng(1)
            session.run(v1.global_variables_initializer())
            for variable in v1.global_variables():
                variable.load(random.uniform(0.5, 2.0, variable.shape.as_list()), session)
            saver.save(session, path)
        return [*session.run(v1.global_variables()), session.run(y, {x: X})]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("direction", ["from the original", "to the original"])
def test_checkpoints_by_name_load_both_ways(
    options: dict[str, Any], direction: str, original: Any, tmp_path: pathlib.Path
) -> None:
    writer, reader = (original, ours) if direction == "from the original" else (ours, original)
    path = str(tmp_path / "model")
    written = session_results(writer, options, path, restore=False)
    for one, other in zip(session_results(reader, options, path, restore=True), written, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"axis": [1, 2]}], ids=lambda options: "+".join(options))
def test_checkpoints_of_objects_load_both_ways(options: dict[str, Any], original: Any, tmp_path: pathlib.Path) -> None:
    for number, (writer, reader) in enumerate([(original, ours), (ours, original)]):
        first, second = writer.BatchNormalization(**options), reader.BatchNormalization(**options)
        first(X, training=True)
        path = tf.train.Checkpoint(layer=first).save(str(tmp_path / f"{number}"))
        status = tf.train.Checkpoint(layer=second).restore(path)
        second(X)
        status.assert_existing_objects_matched()
        for one, other in zip(second.variables, first.variables, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def older_checkpoint(path: str, weight: float) -> dict[str, Any]:
    """What the first versions of the original saved: averages from zero, with the sums of their weights beside."""
    random = np.random.default_rng(2)
    values = {
        "gamma": random.uniform(0.5, 2, 5),
        "beta": random.normal(size=5),
        "moving_mean": random.normal(size=5),
        "moving_variance": random.uniform(0.5, 2, 5),
        "renorm_mean": weight * random.normal(size=5),
        "renorm_mean_weight": np.array(weight),
        "renorm_stddev": weight * random.uniform(0.5, 2, 5),
        "renorm_stddev_weight": np.array(weight),
    }
    with tf.Graph().as_default(), v1.Session() as session:
        for name, value in values.items():
            v1.get_variable(f"network/batch_normalization/{name}", initializer=value.astype(np.float32))
        v1.get_variable("other", initializer=7.0)
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, path)
    return values


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_checkpoints_of_the_older_renorm_load_after_conversion(weight: float, tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    values = older_checkpoint(str(old), weight)
    assert modernize_checkpoint(old, new) == 1
    results = session_results(ours, {"renorm": True}, str(new), restore=True)
    names = ["gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]
    loaded = dict(zip(names, results, strict=False))
    sigma = np.sqrt(values["moving_variance"] + 1e-3)
    expected = {name: values[name] for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    expected["moving_stddev"] = sigma
    expected["renorm_mean"] = values["renorm_mean"] / weight if weight else values["moving_mean"]
    expected["renorm_stddev"] = values["renorm_stddev"] / weight if weight else sigma
    for name in names:
        np.testing.assert_allclose(loaded[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert tf.train.load_variable(str(new), "other") == 7.0
    # The layer on NumPy takes the same checkpoint as it is.
    layer = batchnorm.numpy.BatchNormalization(renorm=True)
    prefix = "network/batch_normalization/"
    reader = tf.train.load_checkpoint(str(old))
    layer.load({name: reader.get_tensor(prefix + name) for name in values})
    np.testing.assert_allclose(layer(X), results[-1], atol=1e-5)


def test_a_checkpoint_of_today_is_copied(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "today")
    written = session_results(ours, {"renorm": True}, path, restore=False)
    assert modernize_checkpoint(path, tmp_path / "copy") == 0
    for one, other in zip(
        session_results(ours, {"renorm": True}, str(tmp_path / "copy"), restore=True), written, strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_conversion_refuses_to_write_onto_its_source(tmp_path: pathlib.Path) -> None:
    older_checkpoint(str(tmp_path / "old"), 0.5)
    with pytest.raises(ValueError, match="target must differ"):
        modernize_checkpoint(tmp_path / "old", str(tmp_path / "old"))
    with pytest.raises(tf.errors.NotFoundError):
        modernize_checkpoint(tmp_path / "none", tmp_path / "new")
    with pytest.raises(ValueError, match=r"epsilon must be finite and at least 0; received -1\.0"):
        modernize_checkpoint(tmp_path / "old", tmp_path / "new", epsilon=-1.0)
    assert not list(tmp_path.glob("new*"))


def test_initial_weights_and_checkpoints_serve_inference_without_tensorflow(tmp_path: pathlib.Path) -> None:
    layer = BatchNormalization(renorm=True)
    layer(X, training=True)
    np.savez(
        tmp_path / "layer.npz", **{v.name.rpartition("/")[2].removesuffix(":0"): v.numpy() for v in layer.variables}
    )
    plain = batchnorm.numpy.BatchNormalization(renorm=True)
    plain.load(np.load(tmp_path / "layer.npz"))
    np.testing.assert_allclose(plain(X), layer(X), atol=1e-5)
