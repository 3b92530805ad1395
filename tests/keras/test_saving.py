"""Configurations, files and weights: every option comes back, and what cannot be saved says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.keras import BatchNormalization, ClippingSchedule

from .support import STOCK_RENORM, array

SHAPE = (8, 4, 3)


@keras.saving.register_keras_serializable("tests")
def halved(shape: Any) -> tuple[Any, Any]:
    """Half of everything."""
    return ops.ones(()) * 0.5, ops.zeros(())


@keras.saving.register_keras_serializable("tests")
class Scaled:
    """An adjustment, or limits, with a number."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, given: Any) -> Any:
        return ops.ones(()) * self.by, ops.zeros(())

    def get_config(self) -> dict[str, float]:
        return {"by": self.by}

    @classmethod
    def from_config(cls, config: dict[str, float]) -> Scaled:
        return cls(**config)


@keras.saving.register_keras_serializable("tests")
def growing(steps: Any) -> dict[str, Any]:
    """Limits by the number of steps."""
    return {"dmax": ops.cast(steps, "float32") * 0.1}


def unregistered(given: Any) -> Any:
    return ops.ones(()), ops.zeros(())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "numbers": {"momentum": 0.5, "epsilon": 1e-5, "center": False, "scale": False, "trainable": False, "name": "norm"},
    "functions": {
        "beta_initializer": "random_normal",
        "gamma_initializer": keras.initializers.Constant(2.0),
        "moving_mean_initializer": "ones",
        "moving_variance_initializer": keras.initializers.Constant(3.0),
        "beta_regularizer": keras.regularizers.L2(0.1),
        "gamma_regularizer": "l1",
        "beta_constraint": "non_neg",
        "gamma_constraint": keras.constraints.MaxNorm(3),
    },
    "dtype": {"dtype": "mixed_bfloat16"},
    "renorm": {"renorm": True, "renorm_momentum": 0.9},
    "limits": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "dmax": 5}},
    "limits without renorm": {"renorm_clipping": {"rmin": 0.5}, "renorm_momentum": 0.5},
    "tensors": {"renorm": True, "renorm_clipping": {"rmax": ops.convert_to_tensor(3.0)}},
    "schedule": {"renorm": True, "renorm_clipping": ClippingSchedule(3, rmax_end=9, dmax_end=7)},
    "function of the steps": {"renorm": True, "renorm_clipping": growing},
    "axes": {"axis": [1, -1]},
    "virtual batches": {"virtual_batch_size": 3},
    "virtual batches and renorm": {"virtual_batch_size": 3, "renorm": True},
    "adjustment": {"adjustment": halved},
    "adjustment by an object": {"adjustment": Scaled(0.25)},
    "composed": {"fused": False},
    "fused": {"fused": True},
    "skip": {"skip_nonfinite": True},
}
by_options = pytest.mark.parametrize("options", OPTIONS)


def of(options: str) -> Any:
    return BatchNormalization(**OPTIONS[options])


def same(one: Any, other: Any) -> None:
    """Assert that two models are of layers alike, in what they say and in what they do."""
    assert one.layers[0].get_config() == other.layers[0].get_config()
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    x = np.random.default_rng(5).normal(1, 2, SHAPE).astype("float32")
    for training in (False, True, False):
        np.testing.assert_allclose(array(one(x, training=training)), array(other(x, training=training)), atol=1e-6)
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@by_options
def test_a_configuration_makes_the_same_layer(options: str) -> None:
    layer = of(options)
    again = BatchNormalization.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    for name in ("axis", "fused", "skip_nonfinite", "virtual_batch_size", "renorm", "renorm_momentum", "momentum"):
        assert getattr(again, name) == getattr(layer, name)
    assert type(again.renorm_clipping) is type(layer.renorm_clipping)
    assert again.renorm_clipping == layer.renorm_clipping or options == "tensors"
    assert again.adjustment == layer.adjustment or options == "adjustment by an object"


@by_options
def test_models_and_weights_come_back_from_their_files(options: str, tmp_path: Path) -> None:
    layer = of(options)
    model = keras.Sequential([keras.Input(SHAPE[1:]), layer])
    x = np.random.default_rng(0).normal(3, 2, SHAPE).astype("float32")
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is BatchNormalization
    other = keras.models.clone_model(model)
    assert other.layers[0].adjustment is layer.adjustment or options == "adjustment by an object"
    other.load_weights(tmp_path / "model.weights.h5")
    written = keras.models.model_from_json(model.to_json())
    written.set_weights(model.get_weights())
    for again in (loaded, other, written):
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        same(copy, again)


def test_keys_that_keras_layer_of_an_older_version_lacks_are_written_only_if_they_matter() -> None:
    layer = BatchNormalization()
    stock = keras.layers.BatchNormalization(name=layer.name)
    known = set(stock.get_config()) - {"renorm", "renorm_clipping", "renorm_momentum"}
    assert set(layer.get_config()) == known
    for name in known:
        assert layer.get_config()[name] == stock.get_config()[name], name
    again = keras.layers.BatchNormalization.from_config(layer.get_config())
    assert again.get_config() == stock.get_config()
    written = {name: set(of(name).get_config()) - known for name in OPTIONS}
    assert written["renorm"] == {"renorm", "renorm_momentum"}
    assert written["virtual batches"] == {"virtual_batch_size"}
    assert written["adjustment"] == {"adjustment"}
    assert written["composed"] == {"fused"}
    assert written["skip"] == {"skip_nonfinite"}
    for name in ("virtual batches", "adjustment", "composed", "skip"):
        with pytest.raises((TypeError, ValueError), match="nrecognized keyword"):
            keras.layers.BatchNormalization.from_config(of(name).get_config())
    with pytest.raises((TypeError, ValueError), match="invalid keys" if STOCK_RENORM else "nrecognized keyword"):
        keras.layers.BatchNormalization.from_config(of("schedule").get_config())


def test_ours_reads_the_configurations_of_keras_layer() -> None:
    renorm = {"renorm": True, "renorm_clipping": {"rmax": 2.0}} if STOCK_RENORM else {}
    for options in ({}, renorm, {"axis": 1, "momentum": 0.7}):
        config = keras.layers.BatchNormalization(**options).get_config()
        layer = BatchNormalization.from_config(config)
        assert {name: layer.get_config()[name] for name in options} == options


@pytest.mark.parametrize("function", [unregistered, lambda shape: unregistered(shape)], ids=["function", "lambda"])
def test_a_function_that_is_not_registered_is_kept_by_copies_and_refused_by_files(
    function: Any, tmp_path: Path
) -> None:
    for options in ({"adjustment": function}, {"renorm": True, "renorm_clipping": function}):
        (argument,) = options.keys() - {"renorm"}
        model = keras.Sequential([keras.Input(SHAPE[1:]), BatchNormalization(**options)])
        copy = keras.models.clone_model(model)
        assert getattr(copy.layers[0], argument) is function
        for save in (lambda model=model: model.save(tmp_path / "model.keras"), model.to_json):
            with pytest.raises(ValueError, match=f"{argument} must be registered by keras.saving.register"):
                save()
        model.save_weights(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("options", ["plain", "renorm"] if STOCK_RENORM else ["plain"])
def test_weights_files_of_keras_layer_load_into_ours_and_back(options: str, tmp_path: Path) -> None:
    def model(layer: Any) -> Any:
        return keras.Sequential([keras.Input(SHAPE[1:]), keras.layers.Dense(5), layer, keras.layers.Dense(2)])

    x = np.random.default_rng(0).normal(3, 2, SHAPE).astype("float32")
    ours, theirs = (model(kind(**OPTIONS[options])) for kind in (BatchNormalization, keras.layers.BatchNormalization))
    for one, other in ((ours, theirs), (theirs, ours)):
        one(x, training=True)
        one.save_weights(tmp_path / "model.weights.h5")
        other.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_allclose(array(one(x)), array(other(x)), rtol=1e-4, atol=1e-5)


def test_hdf5_files_come_back(tmp_path: Path) -> None:
    layer = BatchNormalization(renorm=True, virtual_batch_size=3, axis=1)
    model = keras.Sequential([keras.Input(SHAPE[1:]), layer])
    model(np.random.default_rng(0).normal(3, 2, SHAPE).astype("float32"), training=True)
    model.save(tmp_path / "model.h5")
    loaded = keras.saving.load_model(tmp_path / "model.h5")
    assert loaded.layers[0].get_config() == layer.get_config()
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
