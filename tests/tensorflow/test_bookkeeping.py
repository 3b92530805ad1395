"""Names, scopes, reuse, collections, losses and updates: the same program leaves the same book as with the original."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import batchnorm.tensorflow as ours

v1 = tf.compat.v1
Program = Callable[[Any], Any]
PROGRAMS: list[Program] = []


def program(function: Program) -> Program:
    PROGRAMS.append(function)
    return function


def names(tensors: Any) -> list[str]:
    return [tensor.name for tensor in tensors]


def collections() -> dict[str, Any]:
    keys = v1.GraphKeys
    return {
        "global": names(v1.global_variables()),
        "trainable": names(v1.trainable_variables()),
        "updates": len(v1.get_collection(keys.UPDATE_OPS)),
        "losses": len(v1.get_collection(keys.REGULARIZATION_LOSSES)),
    }


@program
def unnamed_layers_are_numbered(module: Any) -> Any:
    layers = [module.BatchNormalization() for _ in range(3)]
    for layer in layers:
        layer(tf.zeros([2, 3]), training=True)
    return [(layer.name, layer.scope_name, names(layer.variables)) for layer in layers], collections()


@program
def every_option_names_its_variables(module: Any) -> Any:
    book: list[Any] = []
    for options in (
        {"center": False},
        {"scale": False},
        {"renorm": True},
        {"axis": [1, 3]},
        {"virtual_batch_size": 2},
        {"axis": 1, "renorm": True},
        {"trainable": False},
        {"name": "mine"},
    ):
        layer = module.BatchNormalization(**options)
        layer(v1.placeholder(tf.float32, [None, 3, 4, 5]), training=True)
        book.append([(v.name, v.shape.as_list(), v.dtype.base_dtype.name) for v in layer.variables])
        book.append([names(layer.trainable_variables), names(layer.non_trainable_variables), len(layer.updates)])
    return book, collections()


@program
def layers_nest_in_variable_scopes(module: Any) -> Any:
    with v1.variable_scope("outer"), v1.variable_scope("inner"):
        module.batch_normalization(tf.zeros([2, 3]), training=True)
        module.batch_normalization(tf.zeros([2, 3]), name="named")
    return collections()


@program
def operations_carry_the_scope_of_the_layer(module: Any) -> Any:
    layer = module.BatchNormalization(name="bn")
    with v1.variable_scope("outer"):
        y = [layer(tf.zeros([2, 3])) for _ in range(2)]
    return [tensor.name.rpartition("/")[0].partition("bn")[0] + "bn" for tensor in y]


@program
def updates_have_the_names_that_programs_filter_by(module: Any) -> Any:
    x = v1.placeholder(tf.float32, [None, 4, 4, 3])
    variants: list[dict[str, Any]] = [{}, {"fused": False}, {"axis": [1, 3]}]
    with v1.variable_scope("generator"):
        for index, options in enumerate(variants):
            module.batch_normalization(x, training=True, name=f"bn_{index}", **options)
        module.batch_normalization(x, training=v1.placeholder(tf.bool, []), name="either")
    found = []
    for update in v1.get_collection(v1.GraphKeys.UPDATE_OPS):
        generator, layer, kind, *_ = update.name.split("/")
        found.append((generator, layer, kind))
    return found


@program
def updates_of_a_tower_are_found_by_its_name_scope(module: Any) -> Any:
    with v1.variable_scope(v1.get_variable_scope()) as scope:
        for tower in range(2):
            with tf.name_scope(f"tower_{tower}"):
                module.batch_normalization(tf.zeros([2, 3]), training=True, name="bn")
                scope.reuse_variables()
    return [len(v1.get_collection(v1.GraphKeys.UPDATE_OPS, f"tower_{tower}")) for tower in range(2)], collections()


@program
def reuse_shares_variables_and_penalties(module: Any) -> Any:
    def layer(reuse: Any) -> None:
        module.batch_normalization(
            tf.zeros([2, 3]), name="bn", training=True, reuse=reuse, gamma_regularizer=tf.nn.l2_loss
        )

    layer(None)
    layer(True)
    layer(v1.AUTO_REUSE)
    with v1.variable_scope("other", reuse=v1.AUTO_REUSE):
        layer(None)
        layer(None)
    return collections()


@program
def a_taken_name_is_an_error_without_reuse(module: Any) -> Any:
    module.batch_normalization(tf.zeros([2, 3]), name="bn")
    with pytest.raises(ValueError, match="already exists"):
        module.batch_normalization(tf.zeros([2, 3]), name="bn")
    with pytest.raises(ValueError, match="does not exist"):
        module.batch_normalization(tf.zeros([2, 3]), name="missing", reuse=True)


@program
def calling_twice_shares_variables_and_adds_updates(module: Any) -> Any:
    layer = module.BatchNormalization()
    first, second = v1.placeholder(tf.float32, [2, 3]), v1.placeholder(tf.float32, [5, 3])
    layer(first, training=True)
    layer.apply(second, training=True)
    layer(first, training=False)
    return (
        collections(),
        len(layer.updates),
        len(layer.get_updates_for(first)),
        len(layer.get_updates_for([first, second])),
        len(layer.get_updates_for(None)),
        len(layer.get_updates_for(tf.zeros([2, 3]))),
    )


@program
def penalties_are_unconditional_losses(module: Any) -> Any:
    layer = module.BatchNormalization(gamma_regularizer=tf.nn.l2_loss, beta_regularizer=lambda v: tf.reduce_sum(v) + 1)
    x = v1.placeholder(tf.float32, [2, 3])
    layer(x)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        return (
            session.run(layer.losses),
            session.run(v1.get_collection(v1.GraphKeys.REGULARIZATION_LOSSES)),
            len(layer.get_losses_for(None)),
            len(layer.get_losses_for(x)),
        )


@program
def losses_added_for_inputs_are_conditional(module: Any) -> Any:
    x = v1.placeholder(tf.float32, [2, 3])
    layer = module.BatchNormalization(activity_regularizer=lambda y: 2 * tf.reduce_sum(y * y))
    y = layer(x, training=True)
    layer.add_loss(tf.reduce_sum(y), inputs=[x])
    layer.add_loss(tf.constant(3.0))
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        feed = {x: [[1.0, 2.0, 3.0], [3.0, 5.0, 8.0]]}
        of_inputs, of_none = layer.get_losses_for(x), layer.get_losses_for(None)
        rounded = [abs(round(float(value), 4)) for value in session.run(of_inputs, feed) + session.run(of_none)]
        return rounded, len(of_inputs), len(layer.get_losses_for(tf.zeros([1])))


@program
def partitioners_split_parameters_but_not_statistics(module: Any) -> Any:
    with v1.variable_scope("parts", partitioner=v1.fixed_size_partitioner(2)) as scope:
        layer = module.BatchNormalization(renorm=True, gamma_regularizer=tf.nn.l2_loss)
        y = layer(v1.placeholder_with_default(np.eye(4, dtype=np.float32), [4, 4]), training=True)
        kept = scope.partitioner is not None
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        session.run([y, layer.updates])
        return kept, names(layer.variables), len(layer.losses), session.run(layer.moving_mean).round(5).tolist()


@program
def custom_getters_see_every_variable(module: Any) -> Any:
    seen = []

    def frozen(getter: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        seen.append((name, kwargs["trainable"]))
        return getter(name, *args, **(kwargs | {"trainable": False}))

    with v1.variable_scope("frozen", custom_getter=frozen):
        layer = module.BatchNormalization()
        layer(tf.zeros([2, 3]))
    return seen, names(layer.trainable_variables), names(layer.non_trainable_variables), collections()


@program
def constraints_sit_on_the_variables(module: Any) -> Any:
    layer = module.BatchNormalization(gamma_constraint=tf.abs, beta_constraint=tf.nn.relu)
    layer(tf.zeros([2, 3]))
    return layer.gamma.constraint is tf.abs, layer.beta.constraint is tf.nn.relu, layer.moving_mean.constraint


@program
def trainable_may_change_later(module: Any) -> Any:
    layer = module.BatchNormalization(renorm=True)
    layer(tf.zeros([2, 3]), training=True)
    book = []
    for trainable in (False, True):
        layer.trainable = trainable
        book.append((names(layer.weights), names(layer.trainable_weights), len(layer.updates)))
    return book


@program
def types_follow_the_first_input(module: Any) -> Any:
    book = []
    for given, dtype in [(None, "float16"), (None, "float64"), ("float64", "float32"), ("float32", "float16")]:
        layer = module.BatchNormalization(dtype=given)
        y = layer(v1.placeholder(dtype, [2, 3]))
        book.append((layer.dtype, layer.gamma.dtype.base_dtype.name, y.dtype.name))
    return book


@program
def building_by_hand_makes_the_same_variables(module: Any) -> Any:
    layer = module.BatchNormalization(axis=1, renorm=True)
    before = layer.built
    layer.build([None, 3, 4, 4])
    spec = layer.input_spec
    return before, layer.built, names(layer.variables), layer.dtype, spec.ndim, spec.axes, layer.count_params()


@program
def weights_are_read_and_set_in_a_session(module: Any) -> Any:
    layer = module.BatchNormalization()
    layer.build([None, 2])
    with v1.Session().as_default() as session:
        session.run(v1.global_variables_initializer())
        values = [np.full(2, 10.0 + i, np.float32) for i in range(4)]
        if module is not ours:
            module.batch_normalization_v1.batch_normalization.backend.set_session(session)
        layer.set_weights(values)
        return [value.tolist() for value in layer.get_weights()], layer.moving_variance.eval().tolist()


@program
def scope_name_waits_for_the_first_call(module: Any) -> Any:
    layer = module.BatchNormalization()
    with pytest.raises(ValueError, match="scope"):
        layer.scope_name  # noqa: B018
    layer(tf.zeros([2, 3]))
    return layer.scope_name


@program
def graph_is_deprecated(module: Any) -> Any:
    with pytest.warns(Warning, match="deprecated"):
        return module.BatchNormalization().graph


@program
def initial_weights_are_taken(module: Any) -> Any:
    layer = module.BatchNormalization(weights=[np.full(3, i, np.float32) for i in range(4)])
    with v1.Session().as_default() as session:
        if module is not ours:
            module.batch_normalization_v1.batch_normalization.backend.set_session(session)
        layer(tf.zeros([2, 3]))
        return session.run(layer.moving_variance).tolist()


@program
def scope_defaults_apply(module: Any) -> Any:
    with v1.variable_scope(
        "s", regularizer=tf.nn.l2_loss, initializer=v1.constant_initializer(7.0), use_resource=False
    ):
        layer = module.BatchNormalization(moving_mean_initializer=v1.constant_initializer(3.0))
        layer(tf.zeros([2, 3]))
    return collections(), type(layer.gamma).__name__, len(layer.losses)


@program
def layers_can_be_built_in_a_given_scope(module: Any) -> Any:
    layer = module.BatchNormalization()
    with v1.variable_scope("elsewhere") as scope:
        pass
    layer(tf.zeros([2, 3]), scope=scope)
    return layer.scope_name, names(layer.variables)


@pytest.mark.parametrize("function", PROGRAMS, ids=lambda function: function.__name__)
def test_like_the_original(function: Program, original: Any) -> None:
    def run(module: Any) -> Any:
        with tf.Graph().as_default(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the original's own deprecations
            return function(module)

    np.testing.assert_equal(run(ours), run(original))


def test_the_collection_holds_the_very_losses_of_the_layer() -> None:
    with tf.Graph().as_default():
        layer = ours.BatchNormalization(gamma_regularizer=tf.nn.l2_loss)
        layer(tf.zeros([2, 3]))
        assert layer.losses[0] is v1.get_collection(v1.GraphKeys.REGULARIZATION_LOSSES)[0]


def test_the_example_of_the_page_runs_as_printed() -> None:
    class Model(ours.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.normalize = [ours.BatchNormalization(), ours.BatchNormalization(renorm=True)]

        def call(self, inputs: Any) -> Any:
            for layer in self.normalize:
                inputs = layer(inputs, training=True)
            return inputs

    with tf.Graph().as_default(), v1.Session() as session:
        model = Model()
        features = v1.placeholder(tf.float32, [None, 3])
        loss = tf.reduce_sum(model(features) ** 4)
        optimizer = v1.train.GradientDescentOptimizer(0.1)

        update_ops = model.get_updates_for(None) + model.get_updates_for(features)
        train_op = optimizer.minimize(loss)
        train_op = tf.group([train_op, update_ops])

        session.run(v1.global_variables_initializer())
        before = session.run(model.variables)
        session.run(train_op, {features: np.random.default_rng(0).normal(5, 2, (8, 3))})
        after = session.run(model.variables)
        assert len(update_ops) == 4
        assert len(model.trainable_variables) == 4
        changed = [bool((a != b).any()) for a, b in zip(before, after, strict=True)]
        assert changed == [True] * len(changed)


@pytest.mark.slow
def test_a_model_of_layers_is_traced_by_functions() -> None:
    class Model(ours.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.normalize = ours.BatchNormalization()

        def build(self, input_shape: Any) -> None:
            self.shift = self.add_weight("shift", input_shape[-1:], initializer=tf.ones)
            self.built = True

        def call(self, inputs: Any, training: Any = False) -> Any:
            if tf.reduce_sum(inputs) > 0:  # only autograph makes this legal in a function
                inputs = -inputs
            return self.normalize(inputs, training=training) + self.shift

    model = Model()
    x = np.random.default_rng(0).normal(5, 2, (8, 3)).astype(np.float32)
    y = tf.function(model)(x, training=True)
    np.testing.assert_allclose(y, 1 - (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3), atol=1e-5)
    assert len(model.trainable_variables) == 3
    assert len(model.variables) == 5


def test_eagerly_updates_are_made_and_not_kept() -> None:
    layer = ours.BatchNormalization(momentum=0.5)
    layer(tf.constant([[1.0], [3.0]]), training=True)
    assert layer.updates == []
    assert layer.get_updates_for(None) == []
    np.testing.assert_allclose(layer.moving_mean, [1.0])
    with pytest.raises(RuntimeError, match="eager"), pytest.warns(DeprecationWarning, match="graph"):
        layer.graph  # noqa: B018


def test_traced_functions_leave_no_operations_behind() -> None:
    layer = ours.BatchNormalization()
    function = tf.function(lambda x: layer(x, training=True))
    for size in range(2, 6):
        function(tf.zeros([size, 3]))
        assert len(layer.updates) == 2


def test_eager_losses_are_those_of_the_last_call() -> None:
    layer = ours.BatchNormalization(activity_regularizer=tf.reduce_sum, gamma_regularizer=tf.nn.l2_loss)
    for value in (1.0, 2.0):
        layer(tf.fill([2, 3], value))
    layer.gamma.assign([2.0, 2.0, 2.0])
    expected = 3 * 2.0 / np.sqrt(1.001)
    np.testing.assert_allclose(sorted(loss.numpy() for loss in layer.losses), sorted([expected, 6.0]), rtol=1e-5)


def test_eager_copies_are_independent() -> None:
    layer = ours.BatchNormalization(renorm=True)
    layer(tf.ones([4, 3]), training=True)
    twin = copy.deepcopy(layer)
    twin(tf.ones([4, 3]) * 5, training=True)
    assert not np.allclose(layer.moving_mean, twin.moving_mean)
    assert twin.variables[2] is twin.moving_mean


def test_names_of_functions_are_found_like_the_original() -> None:
    layer = ours.BatchNormalization(
        beta_initializer={"class_name": "Constant", "config": {"value": 2.0}},
        gamma_initializer="random_uniform",
        gamma_regularizer="l2",
        beta_constraint="non_neg",
    )
    layer(tf.zeros([2, 3]))
    np.testing.assert_allclose(layer.beta, [2.0, 2.0, 2.0])
    assert len(layer.losses) == 1
    np.testing.assert_allclose(layer.beta.constraint(tf.constant([-1.0, 1.0])), [0.0, 1.0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": [1, 2], "virtual_batch_size": 2, "renorm": True, "renorm_clipping": {"rmax": 2.0}},
        {"axis": -2, "fused": False, "center": False, "momentum": 0.5, "epsilon": 0.1, "trainable": False},
        {
            "gamma_initializer": v1.constant_initializer(3.0),
            "gamma_regularizer": "l1",
            "gamma_constraint": "unit_norm",
            "dtype": "float64",
            "name": "mine",
        },
    ],
    ids="+".join,
)
def test_configurations_round_trip_also_after_building(options: dict[str, Any]) -> None:
    layer = ours.BatchNormalization(**options)
    before = layer.get_config()
    layer(tf.ones([4, 3, 5], layer.dtype or tf.float32), training=True)
    after = layer.get_config()
    assert {**after, "dtype": None} == {**before, "dtype": None}
    again = ours.BatchNormalization.from_config(after)
    again.build([None, 3, 5])
    assert again.get_config() == after
    assert [v.shape for v in again.variables] == [v.shape for v in layer.variables]
    assert again.axis == layer.axis == options.get("axis", -1)


def test_configurations_of_the_original_are_understood(original: Any) -> None:
    with tf.Graph().as_default(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = original.BatchNormalization(axis=1, renorm=True, gamma_initializer=v1.constant_initializer(2.0))
        layer = ours.BatchNormalization.from_config(theirs.get_config())
        layer.build([None, 3])
    assert layer.renorm
    assert layer.gamma_initializer.get_config()["value"] == 2.0


def test_attributes_may_be_set_and_count_from_the_next_call(original: Any) -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (8, 3)).astype(np.float32)
    adjustment = lambda shape: (tf.fill(shape[-1:], 1.5), tf.fill(shape[-1:], 0.5))  # noqa: E731
    found = []
    for module in (ours, original):
        layer = module.BatchNormalization(momentum=0.9)
        layer.axis, layer.momentum, layer.epsilon, layer.renorm = [0], 0.5, 0.1, True
        layer.renorm_clipping, layer.renorm_momentum, layer.scale = {"rmax": 1.5}, 0.8, False
        layer.axis = -1
        seen = [layer(x, training=True)]
        layer.momentum, layer.renorm_momentum, layer.epsilon, layer.adjustment = 0.25, 0.1, 0.2, adjustment
        layer.renorm_clipping = {"rmax": 1.1, "rmin": 0.9, "dmax": 0.3}
        seen += [layer(x + 1, training=True), layer(x), *layer.variables]
        found.append([np.asarray(value) for value in seen])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_attributes_are_checked_and_those_that_shape_variables_stay_after_building() -> None:
    layer = ours.BatchNormalization()
    for name, value, error in (
        ("momentum", 1.5, ValueError),
        ("epsilon", "small", TypeError),
        ("axis", [], ValueError),
    ):
        with pytest.raises(error, match=name):
            setattr(layer, name, value)
    layer.build([None, 3])
    changed = {"axis": 1, "center": False, "scale": False, "renorm": True, "virtual_batch_size": 2}
    for name, value in changed.items():
        before = getattr(layer, name)
        with pytest.raises(ValueError, match=f"{name} cannot change.*received {value}"):
            setattr(layer, name, value)
        assert getattr(layer, name) == before
    with pytest.raises(TypeError, match="assignment"):
        layer.renorm_clipping["rmax"] = 2.0  # type: ignore[index]


def test_a_mask_that_does_not_fit_is_refused_before_a_variable_is_made_or_moved() -> None:
    layer, built = ours.BatchNormalization(), ours.BatchNormalization()
    built.build([None, 3])
    before = built.get_weights()
    for mask, error, message in (
        ([True], ValueError, r"mask must have shape \(2,\) or \(2, 1\)"),
        ([1.0, -1.0], ValueError, "mask must hold finite numbers that are not negative"),
        (["a", "b"], TypeError, "mask must hold booleans or real numbers"),
    ):
        with pytest.raises(error, match=message):
            layer(tf.ones([2, 3]), training=True, mask=tf.constant(mask))
        assert not layer.built
        for training in (True, False):
            with pytest.raises(error, match=message):
                built(tf.ones([2, 3]), training=training, mask=tf.constant(mask))
    np.testing.assert_equal(built.get_weights(), before)
    layer(tf.ones([2, 3]), training=True, mask=None)
    with pytest.raises(ValueError, match="mask must be None"):
        layer._moments(tf.ones([2, 3]), [0], False, mask=tf.constant([True, False]))


def test_an_adjustment_is_left_out_of_the_configuration_with_a_warning() -> None:
    layer = ours.BatchNormalization(adjustment=lambda shape: (1.0, 0.0))
    with pytest.warns(UserWarning, match="adjustment"):
        assert "adjustment" not in layer.get_config()
