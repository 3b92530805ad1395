"""Files of every generation of Keras, with stock layers, load as ours. `files/make.py` says what wrote them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization, load_model
from batchnorm.keras.configuration import read

from .support import STOCK_RENORM

FILES = Path(__file__).parent / "files"
NAMES = ("keras-3.3", "keras-3.13", "tf_keras", "axes", "virtual")
AXES: dict[str, list[Any]] = {"axes": [[1, 3]], "virtual": [1, 3], "tf_keras": [3, 1]}


def ours(model: Any) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, BatchNormalization)]


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_generation_load_as_ours_and_give_what_they_gave(name: str, kind: str, tmp_path: Path) -> None:
    path = FILES / f"{name}.{kind}"
    before = path.read_bytes()
    model = load_model(path, compile=False)
    assert path.read_bytes() == before
    layers = ours(model)
    assert len(layers) == len(model.layers) - 1
    assert [layer.get_config()["axis"] for layer in layers] == AXES.get(name, [-1, 1])
    with np.load(FILES / f"{name}.npz") as written:
        for layer in layers:
            for at, value in enumerate(layer.get_weights()):
                np.testing.assert_array_equal(value.reshape(-1), written[f"{layer.name} {at}"].reshape(-1))
        x, expected = written["x"], written["y"]
    tolerance = 2e-2 if layers[-1].compute_dtype == "float16" else 1e-5
    inputs = [x] if isinstance(model.input, list) else x  # as older generations write the structure of inputs
    y = keras.ops.convert_to_numpy(model(inputs, training=False))
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    if name == "virtual":
        first, second = layers
        assert (first.virtual_batch_size, second.virtual_batch_size) == (4, 4)
        assert first.renorm_clipping == {"rmax": 2.0, "dmax": 1.0}
        assert not second.renorm
    elif name != "axes":
        first, second = layers
        assert first.momentum == 0.9
        assert type(first.gamma_regularizer) is keras.regularizers.L2
        assert type(first.beta_constraint) is keras.constraints.NonNeg
        assert not second.scale
        assert not second.trainable
        assert second.compute_dtype == "float16"
    model(inputs, training=True)
    model.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_synchronized_layers_of_keras_2_are_synchronized_ones_of_ours() -> None:
    model = load_model(FILES / "synchronized.h5", compile=False)
    assert [layer.synchronized for layer in ours(model)] == [False, True]
    with np.load(FILES / "synchronized.npz") as written:
        y = keras.ops.convert_to_numpy(model([written["x"]], training=False))
        np.testing.assert_allclose(y, written["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tf_keras", "axes", "virtual"])
def test_what_keras_itself_does_not_read_or_reads_wrongly_is_why_there_is_a_loader(name: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(FILES / f"{name}.keras", compile=False)


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_files_of_this_keras_load_with_nested_and_compiled_models_as_they_were(kind: str, tmp_path: Path) -> None:
    options = {"renorm": True} if STOCK_RENORM else {}
    inner = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(**options)], name="inner")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), inner, keras.layers.BatchNormalization()])
    model.compile(keras.optimizers.SGD(0.1), keras.losses.MeanSquaredError())
    x = np.random.default_rng(0).normal(1, 2, (16, 4)).astype("float32")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / f"model.{kind}")
    loaded = load_model(str(tmp_path / f"model.{kind}"))
    assert type(loaded.layers[1].layers[0]) is BatchNormalization
    assert loaded.layers[1].layers[0].renorm is STOCK_RENORM
    assert type(loaded.layers[2]) is BatchNormalization
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    if kind == "keras":  # from HDF5 files Keras restores no optimizer of a model that is nested
        assert int(loaded.optimizer.iterations) == 1
        loaded.fit(x, x, verbose=0)


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_our_own_layers_load_with_every_axis_and_classes_of_the_user_s_stay(kind: str, tmp_path: Path) -> None:
    class Mine(keras.layers.BatchNormalization):
        pass

    several = BatchNormalization(axis=[1, -1], virtual_batch_size=4, name="several")
    model = keras.Sequential([keras.Input((3, 4, 5)), several, Mine(name="mine")])
    x = np.random.default_rng(0).normal(1, 2, (8, 3, 4, 5)).astype("float32")
    model(x, training=True)
    model.save(tmp_path / f"model.{kind}")
    loaded = load_model(tmp_path / f"model.{kind}", custom_objects={"Mine": Mine}, compile=False)
    assert [type(layer) for layer in loaded.layers] == [BatchNormalization, Mine]
    assert loaded.layers[0].get_config() == several.get_config()
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    for kind in ("keras", "h5"):
        (tmp_path / f"text.{kind}").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as archive:
        archive.writestr("other", json.dumps({}))
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    model.save_weights(tmp_path / "a.weights.h5")
    for name, error, said in (
        ("none.keras", FileNotFoundError, "no file at .*none"),
        ("model.pt", ValueError, r"filepath must end in \.keras, \.h5 or \.hdf5"),
        ("text.keras", ValueError, "text.keras must be an archive"),
        ("text.h5", ValueError, "text.h5 must be an HDF5 file"),
        ("empty.keras", ValueError, r"empty.keras must be an archive with config.json in it; received \['other'\]"),
        ("a.weights.h5", ValueError, "must hold a whole model; received weights alone"),
    ):
        with pytest.raises(error, match=said):
            load_model(tmp_path / name)
    with pytest.raises(TypeError, match="filepath must be a path; received 3 of type int"):
        load_model(3)  # type: ignore[arg-type]


# ---- Configurations.


@pytest.mark.parametrize("name", NAMES)
def test_configurations_of_every_generation_make_our_layers(name: str) -> None:
    with zipfile.ZipFile(FILES / f"{name}.keras") as archive:
        config = json.loads(archive.read("config.json"))
    for layer in config["config"]["layers"][1:]:
        found = BatchNormalization.from_config(layer["config"])
        assert found.name == layer["config"]["name"]
        wanted = dict(zip(("first", "second"), AXES.get(name, [-1, 1]), strict=False))
        assert found.get_config()["axis"] == wanted[found.name]
        assert BatchNormalization.from_config(found.get_config()).get_config() == found.get_config()


def test_keras_of_today_is_read_and_reads_ours_back() -> None:
    renorm = {"renorm": True, "renorm_clipping": {"rmax": 2.0}} if STOCK_RENORM else {}
    for options in ({}, renorm, {"dtype": "mixed_bfloat16"}):
        theirs = keras.layers.BatchNormalization(**options)
        found = BatchNormalization.from_config(theirs.get_config())
        assert found.renorm is bool(options.get("renorm"))
        assert keras.layers.BatchNormalization.from_config(found.get_config()).get_config() == theirs.get_config()


INITIALIZERS = [
    ("Zeros", {"dtype": "float32"}),
    ("Constant", {"value": 0.5, "dtype": "float32", "verify_shape": False}),
    ("RandomNormal", {"mean": 0.0, "stddev": 0.1, "seed": None, "dtype": "float32"}),
    ("VarianceScaling", {"scale": 1.0, "mode": "fan_in", "distribution": "normal", "seed": 1, "dtype": "float32"}),
    ("GlorotUniform", {"seed": None, "dtype": "float32"}),
]


@pytest.mark.parametrize(("kind", "config"), INITIALIZERS)
def test_initializers_of_tensorflow_1_lose_their_type(kind: str, config: dict[str, Any]) -> None:
    given = {"class_name": kind, "config": config}
    layer = BatchNormalization.from_config({"beta_initializer": given, "axis": -1})
    assert type(layer.beta_initializer).__name__ == kind


@pytest.mark.parametrize(
    ("config", "axis"),
    [
        ({"axis": [3]}, 3),
        ({"axis": [1, 3]}, [1, 3]),
        ({"axis": -1, "virtual_batch_size": 4}, -1),
        ({"axis": [-1], "virtual_batch_size": 4}, -1),
        ({"axis": 1, "virtual_batch_size": 4, "synchronized": False}, 1),
        ({"axis": [2], "virtual_batch_size": 4, "beta_initializer": {"module": "keras.initializers"}}, 1),
        ({"axis": [2, 4], "virtual_batch_size": 4, "beta_initializer": {"module": "keras.initializers"}}, [1, 3]),
        ({"axis": [2], "virtual_batch_size": None, "beta_initializer": {"module": "keras.initializers"}}, 2),
    ],
)
def test_axes_are_counted_as_they_were_meant(config: dict[str, Any], axis: Any) -> None:
    assert read(config)["axis"] == axis


@pytest.mark.parametrize("config", [{"axis": 2}, {"axis": [2]}])
def test_an_axis_that_may_be_one_too_large_is_said(config: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="may be one too large"):
        assert read(config | {"virtual_batch_size": 4, "name": "norm"})["axis"] == 2


def test_the_layer_of_tensorflow_1_here_is_read_too() -> None:
    tensorflow = pytest.importorskip("batchnorm.tensorflow")
    options = {"axis": -1, "renorm": True, "renorm_clipping": {"rmax": 3.0}, "virtual_batch_size": 8, "momentum": 0.9}
    config = tensorflow.BatchNormalization(**options).get_config()
    layer = BatchNormalization.from_config(config)
    assert {name: getattr(layer, name) for name in options} == options
