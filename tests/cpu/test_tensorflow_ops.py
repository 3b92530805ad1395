"""The operations for TensorFlow by themselves, against NumPy in float64, and in processes of their own where what is
watched is a process."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from batchnorm.tensorflow import operations

from .cases import (
    EPSILON,
    NEAR,
    TYPES,
    Forward,
    Options,
    View,
    backward,
    check,
    check_near,
    drawn,
    forward,
    measured,
    same,
)
from .test_weights import MASKS, Weighing, masked, weighted_backward, weighted_forward

ROOT = pathlib.Path(__file__).parents[2]
ops = operations._operations


def floats(values: Any, kind: Any) -> Any:
    return tf.reshape(tf.constant([] if values is None else values, kind), [-1])


def seen(view: Any, weights: Any = None) -> dict[str, Any]:
    weights = tf.constant([], tf.bool) if weights is None else tf.constant(weights)
    return {"view": [int(n) for n in view], "weights": weights, "axes": [], "virtual_batch_size": 0}


def op_forward(x: Any, o: Options, kind: Any, at: dict[str, Any]) -> Any:
    average, stddev = o.renorm or (None, None)
    return ops.batchnorm_forward(
        x=tf.constant(x),
        factor=floats(o.factor, kind),
        offset=floats(o.offset, kind),
        renorm_mean=floats(average, kind),
        renorm_stddev=floats(stddev, kind),
        numbers=floats([EPSILON, *o.limits], kind),
        **at,
    )


def op_backward(x: Any, dy: Any, forward: Any, o: Options, kind: Any, at: dict[str, Any], count: Any = None) -> Any:
    if count is None:
        count = np.ones(1 if at["view"][5] else at["view"][1])
    return ops.batchnorm_backward(
        x=tf.constant(x),
        dy=dy,
        numbers=floats([EPSILON, *o.limits], kind),
        mean=tf.reshape(forward.mean, [-1]),
        variance=tf.reshape(forward.variance, [-1]),
        count=count,
        factor=floats(o.factor, kind),
        r=floats(forward.r, kind),
        d=floats(forward.d, kind),
        **at,
    )


def refused(message: str, call: Any, *arguments: Any) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        call(*arguments)


CASES: dict[str, tuple[tuple[int, ...], View]] = {
    "features last": ((6, 4, 5, 7), View(120, 1, 1, 7, 1)),
    "features first": ((6, 7, 4, 5), View(6, 1, 1, 7, 20)),
    "two axes apart": ((6, 7, 4, 5), View(168, 7, 4, 5, 1, True)),
    "virtual batches": ((6, 4, 5), View(24, 3, 4, 5, 1)),
    "uneven virtual batches": ((7, 5, 4), View(7, 3, 1, 5, 4)),
    "large": ((64, 16, 31, 33), View(64, 1, 1, 16, 1023)),
}


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("uneven")])
def test_operations_compute_what_the_kernels_do_eagerly_and_in_a_function(case: str) -> None:
    shape, view = CASES[case]
    at = seen(view)
    random = np.random.default_rng(0)
    for dtype in TYPES:
        kind = np.float64 if dtype == np.float64 else np.float32
        x, dy = (drawn(view, dtype, seed).reshape(shape) for seed in (0, 1))
        factor, offset, *renorm = (random.uniform(0.5, 2, view.parameters).astype(kind) for _ in range(4))
        full = Options(factor, offset, (renorm[0], renorm[1]), (0.5, 2.0, 1.0))
        for o in (Options(), Options(factor, offset), full):
            for wrap in (lambda call: call, tf.function):
                found = wrap(lambda: op_forward(x, o, kind, at))()  # noqa: B023
                expected: Any = forward(view, x.reshape(-1), kind, o)
                assert found.y.shape == x.shape
                assert found.mean.shape == view.statistics
                exact = measured(x, view)
                check(found.mean.numpy(), exact[0], 2e-6, 1.0)
                check(found.variance.numpy(), exact[1], 2e-6, 1.0)
                assert found.r.shape == found.d.shape == (view.parameters if o.renorm else 0,)
                check_near([found.y.numpy().reshape(-1)], [expected.y], NEAR[dtype.name])
                if o.renorm:
                    check_near([found.r.numpy(), found.d.numpy()], [expected.r, expected.d], 1e-6)
                back = wrap(lambda: op_backward(x, tf.constant(dy), found, o, kind, at))()  # noqa: B023
                corrections = (found.r.numpy(), found.d.numpy()) if o.renorm else (None, None)
                result = Forward(expected.y, found.mean.numpy(), found.variance.numpy(), *corrections)
                gradients = backward(view, x.reshape(-1), dy.reshape(-1), result, o)
                check_near([value.numpy().reshape(-1) for value in back], list(gradients), NEAR[dtype.name])


def test_operations_with_weights_compute_what_the_kernels_do() -> None:
    random = np.random.default_rng(0)
    cases = [(shape, view, name, dtype) for shape, view in CASES.values() for name in MASKS for dtype in TYPES]
    for seed, (shape, view, name, dtype) in enumerate(cases):
        kind = np.float64 if dtype == np.float64 else np.float32
        x, dy = (drawn(view, dtype, at).reshape(shape) for at in (seed, seed + 1))
        factor, offset, *renorm = (random.uniform(0.5, 2, view.parameters).astype(kind) for _ in range(4))
        full = Options(factor, offset, (renorm[0], renorm[1]), (0.5, 2.0, 1.0))
        o = full if seed % 3 else Options(factor, offset)
        mask = masked(view, name, seed)
        for array in (mask, (mask * random.choice([0.25, 1.0, 3.0], mask.shape)).astype(kind)):
            at, weighing = seen(view, array), Weighing(array, False)
            found = op_forward(x, o, kind, at)
            expected: Any
            expected, (count, _) = weighted_forward(view, x.reshape(-1), weighing, kind, o)
            assert found.count.shape == count.shape
            np.testing.assert_allclose(found.count, count, rtol=1e-6)
            assert same([found.mean.numpy(), found.variance.numpy()], [expected.mean, expected.variance])
            check_near([found.y.numpy().reshape(-1)], [expected.y], NEAR[dtype.name])
            if o.renorm:
                check_near([found.r.numpy(), found.d.numpy()], [expected.r, expected.d], 1e-6)
            back = op_backward(x, tf.constant(dy), found, o, kind, at, found.count)
            right = weighted_backward(view, x.reshape(-1), dy.reshape(-1), expected, weighing, count, o)
            check_near([value.numpy().reshape(-1) for value in back], list(right), NEAR[dtype.name])


def test_the_formula_holds_in_float64() -> None:
    view = View(40, 1, 1, 3, 1)
    at = seen(view)
    x = drawn(view, TYPES[1], 0).reshape(40, 3)
    factor, offset, average, stddev = np.random.default_rng(0).uniform(0.5, 2, (4, 3))
    found = op_forward(x, Options(factor, offset, (average, stddev), (0.5, 3.0, 2.0)), np.float64, at)
    mean, sigma = x.mean(axis=0), np.sqrt(x.var(axis=0) + EPSILON)
    r, d = np.clip(sigma / stddev, 0.5, 3.0), np.clip((mean - average) / stddev, -2.0, 2.0)
    expected = (r * (x - mean) / sigma + d) * factor + offset
    np.testing.assert_allclose(found.y.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_shape_of_the_output_is_known_while_tracing() -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, 3, 5], tf.float32)])
    def traced(x: Any) -> Any:
        found = ops.batchnorm_forward(
            x=x,
            factor=floats(None, np.float32),
            offset=floats(None, np.float32),
            renorm_mean=floats(None, np.float32),
            renorm_stddev=floats(None, np.float32),
            numbers=tf.constant([EPSILON, 0, 0, 0]),
            **seen(View(12, 1, 1, 5, 1)),
        )
        assert found.y.shape.as_list() == [None, 3, 5]
        return found.y

    assert traced(tf.ones([4, 3, 5])).shape == (4, 3, 5)


def test_dx_takes_the_place_of_dy_only_where_nobody_else_needs_it() -> None:
    view = View(64, 1, 1, 16, 1023)
    at = seen(view)
    x, dy = (drawn(view, TYPES[0], seed).reshape(64, 16, 1023) for seed in (0, 1))
    o = Options()
    found = op_forward(x, o, np.float32, at)
    kept = tf.constant(dy)
    expected = op_backward(x, kept, found, o, np.float32, at)
    assert kept.numpy().tobytes() == dy.tobytes()

    @tf.function
    def chained(dy: Any) -> Any:  # the product is nobody else's
        return op_backward(x, dy * 1.0, found, o, np.float32, at)

    for value, other in zip(chained(kept), expected, strict=True):
        assert value.numpy().tobytes() == other.numpy().tobytes()
    assert kept.numpy().tobytes() == dy.tobytes()


def test_an_empty_batch_has_no_moments_and_no_gradients() -> None:
    views = View(0, 1, 1, 3, 1), View(0, 1, 1, 3, 4), View(0, 0, 2, 3, 1)
    for shape, view in zip(((0, 3), (0, 3, 4), (0, 2, 3)), views, strict=True):
        at = seen(view, np.ones(0, bool))
        x, ones = np.zeros(shape, np.float32), np.ones(3, np.float32)
        o = Options(ones, ones, (ones, ones))
        found = op_forward(x, o, np.float32, at)
        assert found.y.shape == x.shape
        assert not found.mean.numpy().any()
        assert not found.r.numpy().any()
        back = op_backward(x, tf.constant(x), found, o, np.float32, at)
        assert back.dx.shape == x.shape
        assert not back.dfactor.numpy().any()
        assert not back.doffset.numpy().any()


def test_bad_sizes_are_refused() -> None:
    view, kind = View(8, 1, 1, 3, 5), np.float32
    at, x = seen(view), drawn(view, TYPES[0], 0).reshape(8, 3, 5)
    two, three = np.ones(2, kind), np.ones(3, kind)
    unchecked: Any = Options
    for name in ("factor", "offset"):
        refused(f"{name} must have 3", op_forward, x, unchecked(**{name: two}), kind, at)
    refused("renorm_mean must have 3", op_forward, x, Options(renorm=(two, three)), kind, at)
    refused("renorm_stddev must have 3", op_forward, x, Options(renorm=(three, two)), kind, at)
    refused("go together", op_forward, x, unchecked(renorm=(three, None)), kind, at)
    refused("numbers must have 4", op_forward, x, unchecked(limits=(0.0,)), kind, at)
    refused("numbers must have 4", op_forward, x, unchecked(limits=()), kind, at)
    for wrong, message in (
        ((9, 1, 1, 3, 5, 0), "size of its view"),
        ((8, 1, 1, 15, 5, 0), "size of its view"),
        ((8, 0, 1, 3, 5, 0), "groups, span, features and inner >= 1"),
        ((-8, 1, 1, -3, 5, 0), ">= 1"),
        ((8, 1, 3, 3, 5, 0), "multiple of span"),
        ((8, 16, 1, 3, 5, 0), "at least groups * span"),
        ((8, 3, 1, 3, 5, 1), "for groups of parameters"),
        ((8, 2**60, 1, 3, 5, 0), "fewer than 2**57"),
        ((8, 1, 1, 3), "view must have 6"),
    ):
        refused(message, op_forward, x, Options(), kind, at | {"view": wrong})
    nothing = np.ones((0, 3), kind)
    for wrong in ((0, -1, 1, 3, 1, 0), (0, 2**60, 1, 2**60, 1, 0)):
        refused("view must have", op_forward, nothing, Options(), kind, at | {"view": wrong})
    for weights in (np.ones(39, bool), np.ones(120, kind)):
        refused("weights must have 40", op_forward, x, Options(), kind, seen(view, weights))
    found = op_forward(x, Options(), kind, at)
    refused("weights must have 40", op_backward, x, tf.constant(x), found, Options(), kind, seen(view, [True]))
    refused("count must have 1", op_backward, x, tf.constant(x), found, Options(), kind, at, (1.0, 2.0))
    refused("dy must have", op_backward, x, tf.ones([8, 3, 4]), found, Options(), kind, at)
    refused("factor must have 3", op_backward, x, tf.constant(x), found, Options(factor=two), kind, at)
    short = Forward(found.y, found.mean[:, :2], found.variance)
    refused("mean must have 3", op_backward, x, tf.constant(x), short, Options(), kind, at)
    short = Forward(found.y, found.mean, found.variance[:, :0])
    refused("variance must have 3", op_backward, x, tf.constant(x), short, Options(), kind, at)
    half = Forward(found.y, found.mean, found.variance, three, None)
    refused("r and d go together", op_backward, x, tf.constant(x), half, Options(), kind, at)


def run(code: str, **environment: str) -> None:
    """Run code in a process of its own."""
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        cwd=ROOT,
        timeout=300,
        check=True,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory the way of Linux")
def test_nothing_leaks() -> None:
    run("""
        import resource
        from tests.cpu.test_tensorflow_ops import Options, TYPES, View, drawn, np, op_backward, op_forward, seen, tf

        view, kind = View(8, 1, 1, 3, 4096), np.float32
        at = seen(view, np.arange(8 * 4096) % 3 > 0)
        x = drawn(view, TYPES[0], 0).reshape(8, 3, 4096)
        ones = np.ones(3, kind)
        o = Options(ones, ones, (ones, ones), (0.5, 2.0, 1.0))

        def steps(n):
            for _ in range(n):
                found = op_forward(x, o, kind, at)
                op_backward(x, tf.constant(x) * 1.0, found, o, kind, at, found.count)
                try:
                    op_forward(x, Options(factor=ones[:2]), kind, at)
                except tf.errors.InvalidArgumentError:
                    pass

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        steps(200)
        before = resident()
        steps(400)
        assert resident() - before < 40 << 20  # one array a step would be 160 MB
    """)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads the way of Linux")
@pytest.mark.parametrize("first", [True, False], ids=["set before the layer is imported", "set after"])
def test_the_number_of_threads_of_the_package_is_that_of_the_operations(first: bool) -> None:
    run(f"""
        import os
        import batchnorm
        batchnorm.set_num_threads({5 if first else 1})
        from tests.cpu.test_tensorflow_ops import EPSILON, View, floats, np, ops, seen, tf

        def count():
            return len(os.listdir("/proc/self/task"))

        x = np.ones((64, 16, 31, 33), np.float32)
        step = lambda: ops.batchnorm_forward(
            x=x, factor=floats(None, np.float32), offset=floats(None, np.float32), renorm_mean=floats(None, np.float32),
            renorm_stddev=floats(None, np.float32), numbers=floats([EPSILON, 0, 0, 0], np.float32),
            **seen(View(64, 1, 1, 16, 1023)))
        tf.constant(x) + 1
        before = count()
        step()
        assert count() - before == {4 if first else 0}, count() - before
        for threads in (3, 2**40):
            batchnorm.set_num_threads(threads)
            assert batchnorm.num_threads() == min(threads, 1024)
        batchnorm.set_num_threads(3)
        step()
        assert count() - before == 2, count() - before
    """)


def test_the_operations_need_no_extension_module_and_then_have_the_number_of_threads() -> None:
    run(
        """
        import sys
        sys.modules["batchnorm._cpu"] = None  # as where Python's headers were not to be had
        import numpy as np, tensorflow as tf, batchnorm
        assert batchnorm.num_threads() == 1
        from batchnorm.tensorflow import BatchNormalization
        layer = BatchNormalization()
        y = layer(tf.constant(np.random.default_rng(0).normal(3, 2, (64, 16, 31, 33)), tf.float32), training=True)
        assert layer.kernel == "cpu"
        assert abs(y.numpy().mean()) < 1e-4 and abs(y.numpy().std() - 1) < 1e-3
        assert batchnorm.num_threads() == 7
        batchnorm.set_num_threads(3)
        assert batchnorm.num_threads() == 3
    """,
        OMP_NUM_THREADS="7",
    )
