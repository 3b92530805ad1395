"""The batch normalization of a built model, replaced by ours and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization, ClippingSchedule, convert, revert

Stock = keras.layers.BatchNormalization
BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(2.0, 3.0, (24, 6, 6, 3)).astype("float32")
TARGET = np.random.default_rng(1).normal(size=(24, 2)).astype("float32")


def functional() -> Any:
    """A model with a layer that is used twice, one in a nested model, and one in a wrapper."""
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3)(inputs)
    shared = Stock(name="shared")
    x = keras.layers.Add()([shared(x), shared(keras.layers.Activation("tanh")(x))])
    inner = keras.Sequential([keras.Input((4, 4, 4)), Stock(name="deep", scale=False)], name="inner")
    x = keras.layers.Reshape((16, 4))(inner(x))
    x = keras.layers.TimeDistributed(Stock(name="wrapped"))(x)
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))


def sequential() -> Any:
    layers = [keras.layers.Conv2D(4, 3), Stock(), keras.layers.Flatten(), keras.layers.Dense(2), Stock(axis=-1)]
    return keras.Sequential([keras.Input((6, 6, 3)), *layers])


class Subclassed(keras.Model):
    """Layers as an attribute, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Stock(name="one")
        self.blocks = [keras.layers.Flatten(), keras.layers.Dense(2), Stock(name="two")]

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.first(x, training=training)
        for block in self.blocks:
            x = block(x, training=training) if isinstance(block, Stock) else block(x)
        return x


MODELS: dict[str, Callable[[], Any]] = {"functional": functional, "sequential": sequential, "subclassed": Subclassed}
by_model = pytest.mark.parametrize("kind", MODELS)


def trained(kind: str) -> Any:
    model = MODELS[kind]()
    eagerly = kind != "sequential"  # to compile takes longer than all that is tested
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse", run_eagerly=eagerly)
    fit(model)
    return model


def fit(model: Any) -> None:
    model.fit(X, TARGET, batch_size=12, shuffle=False, verbose=0)


def output(model: Any) -> Any:
    return model.predict(X, batch_size=24, verbose=0)


def norms(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, Stock)]


@by_model
def test_a_model_trains_on_with_the_same_weights_connections_and_optimizer(kind: str) -> None:
    model = trained(kind)
    before, variables, layers = output(model), model.trainable_variables, norms(model)
    paths = [variable.path for variable in variables]
    steps = int(model.optimizer.iterations)
    assert convert(model, renorm=True, renorm_momentum=0.9, virtual_batch_size=4) is model
    assert norms(model) == layers
    assert {type(layer) for layer in layers} == {BatchNormalization}
    assert {(layer.renorm, layer.virtual_batch_size) for layer in layers} == {(True, 4)}
    assert all(one is other for one, other in zip(model.trainable_variables, variables, strict=True))
    assert [variable.path for variable in variables] == paths
    np.testing.assert_allclose(output(model), before, atol=1e-4)
    for layer in layers:
        mean, variance = (keras.ops.convert_to_numpy(value) for value in (layer.moving_mean, layer.moving_variance))
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.renorm_mean), mean)
        for stddev in (layer.renorm_stddev, layer.moving_stddev):
            np.testing.assert_allclose(keras.ops.convert_to_numpy(stddev), np.sqrt(variance + 1e-3), rtol=1e-6)
    assert len({weight.path for weight in model.weights}) == len(model.weights)
    for layer in layers:
        assert {weight.path.rpartition("/")[0] for weight in layer.weights} == {layer.beta.path.rpartition("/")[0]}
    if BACKEND == "torch" and kind != "subclassed":  # whose layers have no state dict of PyTorch's before it is asked
        assert [len(layer.state_dict()) for layer in layers] == [len(layer.weights) for layer in layers]
    fit(model)
    assert int(model.optimizer.iterations) == steps + 2
    assert {layer.kernel for layer in layers} <= {"cpu", "composed"}
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@by_model
def test_it_takes_the_same_steps_as_a_model_that_was_made_with_our_layers(kind: str) -> None:
    theirs, ours = trained(kind), trained(kind)
    ours.set_weights(theirs.get_weights())
    for one, other in zip(theirs.optimizer.variables, ours.optimizer.variables, strict=True):
        other.assign(np.array(keras.ops.convert_to_numpy(one)))
    convert(ours)
    fit(ours)
    fit(theirs)
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)


@by_model
def test_back_again_it_is_a_plain_model_that_gives_the_same(kind: str) -> None:
    model = convert(trained(kind), renorm=True, renorm_clipping=ClippingSchedule(), skip_nonfinite=True)
    fit(model)
    assert all(layer.steps is not None for layer in norms(model))
    before, count = output(model), len(norms(model))
    variables = model.trainable_variables
    assert revert(model) is model
    assert {type(layer) for layer in norms(model)} == {Stock}
    assert len(norms(model)) == count
    assert all(one is other for one, other in zip(model.trainable_variables, variables, strict=True))
    assert not any("renorm" in weight.path or "steps" in weight.path for weight in model.weights)
    np.testing.assert_allclose(output(model), before, atol=1e-4)
    assert not any(getattr(layer, "renorm", False) for layer in norms(model))
    fit(model)
    convert(model)
    fit(model)


def test_converted_models_are_saved_copied_and_loaded_as_if_made_so(tmp_path: Path) -> None:
    model = convert(trained("functional"), renorm=True, virtual_batch_size=4)
    expected = output(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(output(loaded), expected, atol=1e-5)
    assert {type(layer) for layer in norms(loaded)} == {BatchNormalization}
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    np.testing.assert_allclose(output(copy), expected, atol=1e-5)
    revert(model).save(tmp_path / "plain.keras")
    assert {type(layer) for layer in norms(keras.saving.load_model(tmp_path / "plain.keras"))} == {Stock}
    if BACKEND == "tensorflow":
        model.export(tmp_path / "plain", verbose=False)
        convert(model, renorm=True).export(tmp_path / "ours", verbose=False)


def test_options_change_in_layers_that_are_ours_and_the_rest_of_them_stays() -> None:
    layer = BatchNormalization(momentum=0.5, renorm=True, gamma_regularizer="l2", name="norm", dtype="mixed_bfloat16")
    layer(X, training=True)
    layer.trainable = False
    assert convert(layer, virtual_batch_size=4) is layer
    assert (layer.momentum, layer.renorm, layer.virtual_batch_size, layer.name) == (0.5, True, 4, "norm")
    assert (layer.trainable, layer.compute_dtype, len(layer.weights)) == (False, "bfloat16", 7)
    assert layer.gamma_regularizer is not None
    averages = keras.ops.convert_to_numpy(layer.moving_variance)
    convert(layer, renorm=False)
    assert [weight.name for weight in layer.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.moving_variance), averages)


def test_the_random_numbers_of_an_adjustment_come_and_go_with_it() -> None:
    class Jitter:
        def __init__(self) -> None:
            self.generator = keras.random.SeedGenerator(0)

        def __call__(self, shape: Any) -> Any:
            scale = keras.random.uniform((shape[-1],), 0.9, 1.1, seed=self.generator)
            return scale, keras.ops.zeros_like(scale)

    model = keras.Sequential([keras.Input((4,)), Stock()])
    jitter = Jitter()
    for options, count in (({"adjustment": jitter}, 5), ({"adjustment": Jitter()}, 5), ({"fused": False}, 5)):
        convert(model, **options)
        assert len(model.variables) == count
        model(X.reshape(-1, 4), training=True)
    assert model.layers[0].adjustment is not jitter
    assert len(revert(model).variables) == 4


def test_what_cannot_be_converted_is_named() -> None:
    class Mine(keras.layers.BatchNormalization):
        pass

    lazy = keras.Sequential([Stock(name="lazy")])
    with pytest.warns(UserWarning, match=r"not converted: .*lazy \(BatchNormalization\); those without weights"):
        convert(lazy)
    model = keras.Sequential([keras.Input((4,)), Mine(name="mine"), Stock(name="norm")])
    with pytest.warns(UserWarning, match=r"not converted: .*mine \(Mine\)\."):
        convert(model)
    assert [type(layer) for layer in model.layers] == [Mine, BatchNormalization]
    several = keras.Sequential([keras.Input((3, 4)), BatchNormalization(axis=[1, 2], name="several")])
    with pytest.warns(UserWarning, match=r"not reverted: .*several \(BatchNormalization\)\."):
        revert(several)
    assert type(several.layers[0]) is BatchNormalization


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"axis": 1}, TypeError, "options must be among .*'axis'"),
        ({"renorm": "yes"}, TypeError, "renorm must be True or False"),
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be"),
        ({"virtual_batch_size": 2, "adjustment": lambda shape: (1.0, 0.0)}, ValueError, "cannot be used together"),
    ],
)
def test_a_bad_option_changes_nothing(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = sequential()
    with pytest.raises(error, match=said):
        convert(model, **options)
    assert {type(layer) for layer in norms(model)} == {Stock}


def test_what_is_no_model_is_refused() -> None:
    for function in (convert, revert):
        with pytest.raises(TypeError, match="model must be a model or a layer of Keras; received 3 of type int"):
            function(3)
