"""Cases of the layer with all its options, and the one procedure that every implementation goes through."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

from tests.oracle import Oracle

v1 = tf.compat.v1
STEPS = 5
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: str
    options: dict[str, Any]
    adjustment: tuple[tuple[int, ...], tuple[int, ...]] | None  # shapes of scale and bias
    unknown_batch: bool
    placeholder: bool  # whether `training` is one
    seed: int

    def inputs(self) -> tuple[list[Any], Any]:
        """A batch for every step and one for inference, and the weights of the loss."""
        random = np.random.default_rng(self.seed)
        dtype = tf.as_dtype(self.dtype).as_numpy_dtype
        batches = [random.normal(0.5, 2.0, self.shape).astype(dtype) for _ in range(STEPS + 1)]
        return batches, random.normal(size=self.shape).astype(dtype)

    def sigma(self, step: int) -> float:
        """The least standard deviation that values may be divided by at a step."""
        epsilon = float(self.options.get("epsilon", 1e-3))
        if step == STEPS:
            return math.sqrt(epsilon)
        batches, _ = self.inputs()
        axis = self.options["axis"]
        oracle = Oracle.build(
            self.shape,
            tuple(axis) if isinstance(axis, list) else axis,
            virtual_batch_size=self.options.get("virtual_batch_size"),
        )
        groups = oracle.moments(np.asarray(batches[step], np.float64))
        least = min(moments.variance for moments in groups.values())
        return math.sqrt(least + epsilon)

    def adjustments(self) -> tuple[Any, Any] | None:
        if self.adjustment is None:
            return None
        random = np.random.default_rng(self.seed + 1)
        dtype = np.float64 if self.dtype == "float64" else np.float32
        scale, bias = self.adjustment
        return random.uniform(0.5, 1.5, scale).astype(dtype), random.uniform(-1, 1, bias).astype(dtype)


@st.composite
def cases(draw: Any, rank: int, eager: bool, beyond: bool = False) -> Case:
    """Draw any legal combination of options and shapes, or only those `beyond` what the original can do.

    The original fails with renorm in float64, for it takes the square root of epsilon in float32. With virtual
    batches and a placeholder for `training` it normalizes by the whole batch.
    """
    limits = ["renorm in float64"] + ["virtual batches either way"] * (not eager)
    limit = draw(st.sampled_from(limits)) if beyond else None
    virtual = draw(st.none() | st.sampled_from([1, 2, 3]))
    if limit == "virtual batches either way":
        virtual = virtual or 2
    batch = draw(st.sampled_from([1, 2, 3, 5])) * (virtual or 1)
    shape = (batch, *draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=rank - 1, max_size=rank - 1)))
    least = 1 if virtual else 0
    unknown = not eager and draw(st.booleans())
    several = draw(st.booleans()) and rank - least > 1
    # An axis of unknown size cannot be a feature axis.
    least = max(least, int(unknown))
    legal = list(range(least, rank))
    if several and len(legal) > 1:
        chosen = draw(st.lists(st.sampled_from(legal), min_size=2, max_size=len(legal), unique=True))
        axis: Any = [one - rank if draw(st.booleans()) else one for one in chosen]
    else:
        chosen = [draw(st.sampled_from([legal[-1], legal[0], *legal]))]
        axis = draw(st.sampled_from([chosen[0], chosen[0] - rank, [chosen[0]]]))
    options: dict[str, Any] = {"axis": axis}
    dtype = draw(st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"]))
    choices: dict[str, list[Any]] = {
        "momentum": [0.9, 0.5, 0.0, 1.0],
        "epsilon": [1e-2, 1e-4],
        "center": [False],
        "scale": [False],
        "fused": [True, False],
        "trainable": [False],
        "renorm": [True],
        "beta_initializer": [v1.constant_initializer(0.3)],
        "gamma_initializer": [v1.constant_initializer(1.7)],
        "moving_mean_initializer": [v1.constant_initializer(0.2)],
        "moving_variance_initializer": [v1.constant_initializer(2.5)],
    }
    for name, values in choices.items():
        if draw(st.integers(0, 2)) == 0:
            options[name] = draw(st.sampled_from(values))
    if beyond:
        options.pop("trainable", None)
    if limit == "renorm in float64":
        options["renorm"] = True
        dtype = "float64"
    if not beyond and options.get("renorm") and dtype == "float64":
        dtype = "float32"
    if options.get("renorm"):
        clips = {"rmin": [0.5, 0.9], "rmax": [1.1, 2.0], "dmax": [0.1, 1.0, 0.0]}
        clipping = {key: draw(st.sampled_from(values)) for key, values in clips.items() if draw(st.booleans())}
        if clipping or draw(st.booleans()):
            options["renorm_clipping"] = clipping
        options["renorm_momentum"] = draw(st.sampled_from([0.5, 0.9]))
    adjustment = None
    if virtual:
        options["virtual_batch_size"] = virtual
    elif draw(st.booleans()):
        feature = tuple(size if at in chosen else 1 for at, size in enumerate(shape))
        kinds = [feature, (1,) * rank, ()]
        if not unknown:
            kinds.append(shape)
        if options.get("center", True) and options.get("scale", True) and not options.get("renorm"):
            kinds.append((*shape[:1], *(1,) * (rank - 1)) if not unknown else feature)
        adjustment = (draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds)))
    placeholder = not eager and (beyond or not virtual) and draw(st.booleans())
    placeholder |= limit == "virtual batches either way"
    return Case(shape, dtype, options, adjustment, unknown, placeholder, draw(st.integers(0, 1000)))


def run(layer_class: Any, case: Case, eager: bool) -> dict[str, list[Any]]:
    """Train a layer for some steps and then infer; return everything that can be seen, step by step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the original's own deprecations
        return (_run_eager if eager else _run_graph)(layer_class, case)


def _run_eager(layer_class: Any, case: Case) -> dict[str, list[Any]]:
    batches, loss_weights = case.inputs()
    adjustments = case.adjustments()
    tensors = () if adjustments is None else tuple(tf.constant(one) for one in adjustments)
    layer = layer_class(**case.options, **({"adjustment": lambda shape: tensors} if tensors else {}))
    seen: dict[str, list[Any]] = {"outputs": [], "gradients": [], "variables": []}
    for step, batch in enumerate(batches):
        with tf.GradientTape() as tape:
            x = tf.constant(batch)
            tape.watch([x, *tensors])
            y = layer(x, training=step < STEPS)
            loss = tf.reduce_sum(y * loss_weights)
        sources = [x, *(v for v in (layer.gamma, layer.beta) if v is not None), *tensors]
        # A tape records what is trainable; gradients of the others are None in both.
        seen["gradients"].append([None if g is None else g.numpy() for g in tape.gradient(loss, sources)])
        seen["outputs"].append([y.numpy()])
        seen["variables"].append([variable.numpy() for variable in layer.variables])
    return seen


def _run_graph(layer_class: Any, case: Case) -> dict[str, list[Any]]:
    batches, loss_weights = case.inputs()
    adjustments = case.adjustments()
    with tf.Graph().as_default(), v1.Session() as session:
        shape = (None, *case.shape[1:]) if case.unknown_batch else case.shape
        x = v1.placeholder(case.dtype, shape)
        tensors = () if adjustments is None else tuple(v1.placeholder(one.dtype, one.shape) for one in adjustments)
        layer = layer_class(**case.options, **({"adjustment": lambda shape: tensors} if tensors else {}))
        flag = v1.placeholder(tf.bool, []) if case.placeholder else None

        def build(training: Any) -> tuple[Any, Any]:
            y = layer(x, training=training)
            sources = [x, *(v for v in (layer.gamma, layer.beta) if v is not None), *tensors]
            return y, tf.gradients(tf.reduce_sum(y * loss_weights), sources)

        if flag is None:
            train, infer = build(True), build(False)
        else:
            train = infer = build(flag)
        assert all(variable in v1.global_variables() for variable in layer.variables)
        session.run(v1.global_variables_initializer())
        seen: dict[str, list[Any]] = {"outputs": [], "gradients": [], "variables": []}
        for step, batch in enumerate(batches):
            feed = {x: batch} | dict(zip(tensors, adjustments or (), strict=True))
            if flag is not None:
                feed[flag] = step < STEPS
            y, gradients = train if step < STEPS else infer
            present = [gradient for gradient in gradients if gradient is not None]
            updates = layer.updates if flag is not None or step < STEPS else []
            values = session.run({"y": y, "gradients": present, "updates": updates}, feed)
            found = iter(values["gradients"])
            seen["gradients"].append([None if one is None else next(found) for one in gradients])
            seen["outputs"].append([values["y"]])
            seen["variables"].append(session.run(layer.variables))
        return seen


def assert_same(ours: dict[str, list[Any]], theirs: dict[str, list[Any]], case: Case) -> None:
    """Compare within the precision of the type, relative to the largest value of each array."""
    for kind, steps in theirs.items():
        for step, arrays in enumerate(steps):
            assert len(arrays) == len(ours[kind][step]), (kind, step)
            for index, expected in enumerate(arrays):
                actual = ours[kind][step][index]
                where = f"{kind} {index} at step {step}"
                if expected is None:
                    assert actual is None, where
                    continue
                assert actual.dtype == expected.dtype, where
                assert actual.shape == expected.shape, where
                wide = np.asarray(expected, np.float64)
                # Variables are in float32 also for 16-bit inputs.
                tolerance = TOLERANCE["float32" if kind == "variables" and case.dtype != "float64" else case.dtype]
                largest = max(1.0, float(np.abs(wide).max(initial=0.0)))
                bound = tolerance * largest
                # Terms cancel, all of them where there are one or two values; then the rounding of the largest shows.
                batches, loss_weights = case.inputs()
                if kind == "gradients" and index == 0 and step < STEPS:
                    bound = max(bound, tolerance * np.abs(np.asarray(loss_weights, float)).max() / case.sigma(step))
                if kind == "outputs":
                    rounding = 8 * np.finfo(np.float64 if case.dtype == "float64" else np.float32).eps
                    bound = max(bound, rounding * np.abs(np.asarray(batches[step], float)).max() / case.sigma(step))
                np.testing.assert_allclose(np.asarray(actual, np.float64), wide, rtol=0, atol=bound, err_msg=where)
