"""Subclasses, as programs write them: what they override is called just where the original called it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import batchnorm.tensorflow as ours

v1 = tf.compat.v1
X = np.random.default_rng(0).normal(2.0, 3.0, (8, 2, 2, 3)).astype(np.float32)


def seen(module: Any, overriding: str, options: dict[str, Any], mode: str, training: bool) -> tuple[Any, ...]:
    """The calls of what a subclass overrides, its output and its averages after a step."""
    calls: list[Any] = []

    class Layer(module.BatchNormalization):
        pass

    def moments(self: Any, inputs: Any, reduction_axes: Any, keep_dims: Any, mask: Any = None) -> Any:
        calls.append((inputs.dtype.name, inputs.shape.rank, list(reduction_axes), keep_dims, mask))
        # By name, for the original knows both with and without a mask.
        hook = getattr(super(Layer, self), overriding)
        mean, variance = hook(inputs, reduction_axes, keep_dims, mask=mask)
        return mean + 0.25, variance * 2.0

    def assign(self: Any, variable: Any, value: Any, momentum: Any, inputs_size: Any) -> Any:
        calls.append((variable.shape.as_list(), inputs_size))
        return super(Layer, self)._assign_moving_average(variable, value * 2.0, momentum, inputs_size)

    def decide(self: Any, training: Any = None) -> Any:
        calls.append(tf.is_tensor(training))
        value = super(Layer, self)._get_training_value(training)
        return value if tf.is_tensor(value) else not value

    hook = {"_assign_moving_average": assign, "_get_training_value": decide}.get(overriding, moments)
    setattr(Layer, overriding, hook)
    layer = Layer(momentum=0.5, **options)
    if mode == "eager":
        y = layer(X, training=training).numpy()
        return calls, y, [variable.numpy() for variable in layer.variables]
    x = v1.placeholder(tf.float32, X.shape)
    flag = v1.placeholder(tf.bool, []) if mode == "tensor" else training
    y = layer(x, training=flag)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        feed = {x: X} | ({flag: training} if mode == "tensor" else {})
        y = session.run([y, layer.updates], feed)[0]
        return calls, y, session.run(layer.variables)


@pytest.mark.parametrize(
    "overriding", ["_moments", "_calculate_mean_and_var", "_assign_moving_average", "_get_training_value"]
)
@pytest.mark.parametrize("mode", ["graph", "tensor", "eager"])
def test_what_a_subclass_overrides_is_called_as_by_the_original(overriding: str, mode: str, original: Any) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"fused": False},
        {"axis": [1, 3]},
        {"renorm": True, "renorm_momentum": 0.5},
        {"virtual_batch_size": 2},
    ]
    for options in variants:
        for training in (True, False):
            # With virtual batches and a tensor the original is wrong one way or the other.
            if mode == "tensor" and "virtual_batch_size" in options:
                continue
            found = []
            for module in (ours, original):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what is not called is said, and tested below
                    if mode == "eager":
                        found.append(seen(module, overriding, options, mode, training))
                    else:
                        with tf.Graph().as_default():
                            found.append(seen(module, overriding, options, mode, training))
            (calls, y, variables), (their_calls, their_y, their_variables) = found
            assert sorted(map(str, calls)) == sorted(map(str, their_calls)), options
            np.testing.assert_allclose(y, their_y, rtol=0, atol=1e-5, err_msg=str(options))
            for ours_is, theirs_is in zip(variables, their_variables, strict=True):
                np.testing.assert_allclose(ours_is, theirs_is, rtol=0, atol=1e-5, err_msg=str(options))


def test_methods_of_older_programs_lack_the_last_argument() -> None:
    class Layer(ours.BatchNormalization):
        def _moments(self, inputs: Any, reduction_axes: Any, keep_dims: bool) -> Any:  # type: ignore[override]
            mean, variance = super()._moments(inputs, reduction_axes, keep_dims=keep_dims)
            return mean + 1.0, variance

        def _calculate_mean_and_var(self, x: Any, axes: Any, keep_dims: bool) -> Any:  # type: ignore[override]
            mean, variance = super()._calculate_mean_and_var(x, axes, keep_dims)
            return mean, variance * 0.0 + 4.0

        def _assign_moving_average(self, variable: Any, value: Any, momentum: Any) -> Any:  # type: ignore[override]
            return super()._assign_moving_average(variable, value + 0.5, momentum)

    layer = Layer(momentum=0.0, epsilon=0.0)
    y = layer(tf.constant([[1.0], [3.0]]), training=True)
    assert y.numpy().ravel().tolist() == [-1.0, 0.0]
    assert layer.kernel == "composed"
    assert (float(layer.moving_mean[0]), float(layer.moving_variance[0])) == (3.5, 4.5)


def test_gradients_go_through_moments_that_a_subclass_measures() -> None:
    class Layer(ours.BatchNormalization):
        def _moments(self, *args: Any, **kwargs: Any) -> Any:
            return super()._moments(*args, **kwargs)

    x, found = tf.constant(X[:, 0, 0]), []
    for layer in (Layer(), ours.BatchNormalization(fused=False)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        found.append([gradient.numpy() for gradient in tape.gradient(loss, [x, layer.gamma, layer.beta])])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_what_the_layer_does_not_call_is_said_once(eager: bool) -> None:
    class Layer(ours.BatchNormalization):
        def _moments(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

        def _assign_moving_average(self, *args: Any, **kwargs: Any) -> Any:
            assert not eager
            return super()._assign_moving_average(*args, **kwargs)

        def _fused_batch_norm(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    def run() -> None:
        layer = Layer()
        with pytest.warns(UserWarning, match=r"Layer overrides .*_fused_batch_norm.*_moments.*fused=False") as caught:
            layer(X, training=True)
        assert len(caught) == 1
        assert ("_assign_moving_average, which" in str(caught[0].message)) == eager
        layer(X, training=True)

    if eager:
        run()
    else:
        with tf.Graph().as_default():
            run()


def test_a_subclass_decides_on_the_default_of_training(original: Any) -> None:
    def outputs(module: Any) -> list[Any]:
        class Default(module.BatchNormalization):
            def call(self, inputs: Any, training: Any = True) -> Any:
                return super().call(inputs, training=training)

        class Always(module.BatchNormalization):
            def call(self, inputs: Any) -> Any:
                return super().call(inputs, training=True)

        x = tf.constant([[1.0], [3.0]])
        trained = [Default()(x), Always()(x)]
        assert len(v1.get_collection(v1.GraphKeys.UPDATE_OPS)) == 2 * 2
        return [*trained, Default()(x, training=None), Default()(x, False), Default().apply(x)]

    for module in (ours, original):
        with tf.Graph().as_default(), v1.Session() as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the original's own deprecations
            found = outputs(module)
            session.run(v1.global_variables_initializer())
            for y, expected in zip(session.run(found), (0.9995, 0.9995, 2.9985, 2.9985, 0.9995), strict=True):
                np.testing.assert_allclose(y[1], [expected], atol=1e-4)


def test_a_subclass_may_add_its_updates_to_the_collection_itself() -> None:
    class Layer(ours.BatchNormalization):
        def __init__(self, fused: Any = False, **kwargs: Any) -> None:
            super().__init__(fused=fused, **kwargs)

        def call(self, inputs: Any, training: Any = None) -> Any:
            outputs = super().call(inputs, training=training)
            for update in self.updates:
                v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
            return outputs

    with tf.Graph().as_default():
        Layer()(tf.constant(X), training=True)
        assert len(set(v1.get_collection(v1.GraphKeys.UPDATE_OPS))) == 2


def test_a_batch_that_does_not_divide_is_refused_whoever_decides_on_training() -> None:
    class Default(ours.BatchNormalization):
        def call(self, inputs: Any, training: Any = True) -> Any:
            return super().call(inputs, training=training)

    layer = Default(virtual_batch_size=3)
    with pytest.raises(ValueError, match="4 samples and virtual_batch_size=3"):
        layer(tf.ones([4, 2]))


def test_python_s_control_flow_in_a_subclass_is_traced() -> None:
    class Layer(ours.BatchNormalization):
        def call(self, inputs: Any, training: Any = False) -> Any:
            if tf.reduce_sum(inputs) > 0:  # only autograph makes this legal in a function
                inputs = -inputs
            return super().call(inputs, training=training)

    y = tf.function(Layer())(tf.ones([4, 2]))
    np.testing.assert_allclose(y, np.full((4, 2), -1 / np.sqrt(1.001)), rtol=1e-6)
