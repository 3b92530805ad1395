"""What arrays the extension module takes and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from .cases import (
    EPSILON,
    NEAR,
    TYPES,
    Array,
    Forward,
    Options,
    View,
    along,
    apart,
    backward,
    check,
    drawn,
    everything,
    forward,
    kernel,
    library,
    moments,
    raw,
    same,
    types,
    views,
)  # fmt: skip

# Larger than what caches are taken to keep, in runs and rows that end within lines of these.
PAST_CACHES = [
    View(11, 1, 1, 3, 250_007),
    View(15, 1, 1, 2003, 301),
    View(45, 1, 1, 40_009, 5),
    View(130_003, 1, 1, 67, 1),
    View(130_000, 13, 2, 64, 1),
    View(2002, 1, 1, 4503, 1),
]


@pytest.mark.parametrize("view", PAST_CACHES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("begin", [0, 5])
def test_large_results_are_whole_wherever_lines_begin_and_in_the_place_of_dy(
    view: View, dtype: np.dtype[Any], begin: int
) -> None:
    def placed(values: Array) -> Array:
        room = np.empty(view.size + begin + 64, dtype)
        offset = -(room.ctypes.data // dtype.itemsize) % (64 // dtype.itemsize) + begin
        room[offset : offset + view.size] = values
        return room[offset : offset + view.size]

    x, y, dx = (placed(drawn(view, dtype, seed)) for seed in (0, 0, 1))
    dy = dx.copy()
    mean, variance = (np.empty(view.statistics) for _ in range(2))
    kernel(view, dtype).forward(x=raw(x), y=raw(y), mean=mean, variance=variance)
    normalized = (apart(x, view) - along(mean, view)) / np.sqrt(along(variance, view) + EPSILON)
    check(y, normalized, NEAR[dtype.name], 8.0)
    kernel(view, dtype).backward_at(
        threads=2, x=x.ctypes.data, dy=dx.ctypes.data, dx=dx.ctypes.data, mean=mean.ctypes.data,
        variance=variance.ctypes.data,
    )  # fmt: skip
    assert dx.tobytes() == backward(view, x.copy(), dy, Forward(y, mean, variance)).dx.tobytes()


@settings(max_examples=30)
@given(views(), types)
def test_arrays_may_lie_anywhere_and_inputs_may_be_read_only(view: View, dtype: np.dtype[Any]) -> None:
    def moved(values: Array) -> Array:
        found: Array = np.empty(values.nbytes + 1, np.uint8)[1:].view(values.dtype)
        found[:] = values.reshape(-1)
        assert found.itemsize == 1 or not found.flags.aligned
        return found

    x = drawn(view, dtype, 0)
    expected = forward(view, x)
    ones = np.ones(view.parameters, np.float32)
    inputs = [moved(raw(x)), moved(ones), moved(raw(x))]
    for array in inputs:
        array.flags.writeable = False
    y, dx = moved(raw(x)), moved(raw(x))
    mean, variance, dfactor = moved(expected.mean), moved(expected.mean), moved(ones)
    kernel(view, dtype).forward(x=inputs[0], y=y, factor=inputs[1], mean=mean, variance=variance)
    assert same([y, mean, variance], expected[:3])
    kernel(view, dtype).backward(
        x=inputs[0], dy=inputs[2], dx=dx, mean=mean, variance=variance, factor=inputs[1], dfactor=dfactor
    )  # fmt: skip
    found = backward(view, x, x, expected, Options(ones))
    assert same([dx, dfactor], found[:2])


@pytest.mark.parametrize("view", [View(0, 1, 1, 3, 1), View(0, 4, 2, 3, 1), View(0, 1, 1, 3, 5), View(0, 2, 3, 3, 7)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_rows_have_no_moments_and_no_gradients(view: View, dtype: np.dtype[Any]) -> None:
    x = np.empty(0, dtype)
    ones = np.ones(3, np.float32)
    o = Options(ones, ones, (ones, ones))
    found = forward(view, x, given=o)
    assert found.y.size == 0
    assert not found.mean.any()
    assert not found.variance.any()
    for gradient in backward(view, x, x, found, o):
        assert not gradient.any()
    for result in everything(view, dtype):
        assert np.isfinite(result.astype(np.float64)).all()


# ---- Arrays.

VIEW = View(12, 2, 3, 4, 2)
OUTPUTS = {
    "forward": ["y", "mean", "variance", "r", "d"],
    "backward": ["dx", "dfactor", "doffset"],
    "moments": ["mean", "variance"],
    "normalize": ["y"],
    "gradient_sums": ["dy_sum", "dy_centered_sum"],
    "gradient_combine": ["dx"],
}
INPUTS = {
    "forward": ["x", "factor", "offset", "renorm_mean", "renorm_stddev"],
    "backward": ["x", "dy", "mean", "variance", "factor", "r", "d"],
    "moments": ["x"],
    "normalize": ["x", "mean", "scale", "offset"],
    "gradient_sums": ["x", "dy", "mean"],
    "gradient_combine": ["x", "dy", "mean", "a", "b", "c"],
}
OPTIONAL = {
    "forward": ["factor", "offset", "renorm_mean", "renorm_stddev", "r", "d"],
    "backward": ["factor", "r", "d", "dfactor", "doffset"],
}
"""They are by parameter."""
LARGE = ["x", "dy", "y", "dx"]
ARRAYS = [(operation, name) for operation in INPUTS for name in INPUTS[operation] + OUTPUTS[operation]]
WRITTEN = [(operation, name) for operation in OUTPUTS for name in OUTPUTS[operation]]


def arguments(operation: str, view: View = VIEW) -> dict[str, Any]:
    """Arguments that an operation accepts, all of them given."""
    found: dict[str, Any] = {}
    for name in INPUTS[operation] + OUTPUTS[operation]:
        by_parameter = name in OPTIONAL.get(operation, [])
        size = view.size if name in LARGE else view.parameters if by_parameter else view.groups * view.features
        found[name] = np.full(size, 5.0 if name == "x" else 7.0, np.float32)
    if operation == "forward":
        found.update(rmin=0.5, rmax=2.0, dmax=1.0)
    return found


def call(operation: str, given: dict[str, Any]) -> None:
    getattr(kernel(VIEW, TYPES[0]), operation)(**given)


def refuses(error: type[Exception], operation: str, given: dict[str, Any], match: str | None = None) -> None:
    """The call fails, and no output has changed."""
    before = {name: given[name].copy() for name in OUTPUTS[operation] if isinstance(given.get(name), np.ndarray)}
    with pytest.raises(error, match=match):
        call(operation, given)
    for name, value in before.items():
        assert given[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("operation", INPUTS)
def test_what_the_tests_of_refusals_change_is_accepted_as_it_is(operation: str) -> None:
    given = arguments(operation)
    call(operation, given)
    assert any((given[name] != 7).any() for name in OUTPUTS[operation])


@pytest.mark.parametrize("operation", INPUTS)
def test_arguments_come_by_keyword_only(operation: str) -> None:
    given = arguments(operation)
    with pytest.raises(TypeError):
        getattr(kernel(VIEW, TYPES[0]), operation)(*given.values())
    refuses(TypeError, operation, {**given, "gamma": given["x"]})


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_an_array_of_another_type_is_a_type_error(operation: str, name: str) -> None:
    size = arguments(operation)[name].size
    swapped = np.zeros(size, np.dtype(np.float32).newbyteorder())
    wrong = [np.zeros(size, kind) for kind in (np.int32, np.int16, np.bool_, np.complex64, np.longdouble, object)]
    wrong += [np.zeros(size, np.float64 if name in LARGE else np.float16)]
    for value in [*wrong, swapped, [0.0] * size, "text", 1.5, object()]:
        refuses(TypeError, operation, {**arguments(operation), name: value})


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_type_of_values_is_that_of_the_kernel(dtype: np.dtype[Any]) -> None:
    for other in TYPES:
        arrays = {"x": raw(np.zeros(VIEW.size, other)), "mean": np.zeros(8), "variance": np.zeros(8)}
        if other == dtype:
            kernel(VIEW, dtype).moments(**arrays)
        else:
            with pytest.raises(TypeError, match=f"x must be {dtype.name}"):
                kernel(VIEW, dtype).moments(**arrays)


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_an_array_of_another_size_is_a_value_error(operation: str, name: str) -> None:
    for change in (-1, 1):
        given = arguments(operation)
        given[name] = np.full(given[name].size + change, 7.0, np.float32)
        refuses(ValueError, operation, given, f"^{name} must have")
    refuses(ValueError, operation, {**arguments(operation), name: np.zeros(0, np.float32)}, f"^{name} must have")


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_an_array_with_gaps_is_a_type_error(operation: str, name: str) -> None:
    size = arguments(operation)[name].size
    gaps = np.full(2 * size, 7.0, np.float32)
    for array in (gaps[::2], gaps[:size][::-1], gaps[:size].reshape(-1, 2).T):
        refuses(TypeError, operation, {**arguments(operation), name: array})


@pytest.mark.parametrize(("operation", "name"), WRITTEN)
def test_an_output_that_is_read_only_is_a_type_error(operation: str, name: str) -> None:
    given = arguments(operation)
    given[name].flags.writeable = False
    refuses(TypeError, operation, given)


@pytest.mark.parametrize(("operation", "name"), WRITTEN)
def test_an_output_that_overlaps_another_array_is_a_value_error(operation: str, name: str) -> None:
    for other in INPUTS[operation] + OUTPUTS[operation]:
        if other == name:
            continue
        given = arguments(operation)
        sizes = given[name].size, given[other].size
        shared = np.full(sum(sizes) - 1, 7.0, np.float32)
        given[name], given[other] = shared[: sizes[0]], shared[sizes[0] - 1 :]  # one value in common
        refuses(ValueError, operation, given, "overlap")
        beside = np.full(sum(sizes), 7.0, np.float32)
        given[name], given[other] = beside[: sizes[0]], beside[sizes[0] :]
        call(operation, given)


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_an_array_whose_memory_is_gone_is_a_value_error(operation: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    gone = torch.zeros(arguments(operation)[name].size)
    gone.untyped_storage().resize_(0)
    refuses(ValueError, operation, {**arguments(operation), name: gone}, f"^{name} has no memory")


def test_a_mask_of_no_rows_needs_no_memory_to_be_one() -> None:
    torch = pytest.importorskip("torch")
    nothing, mask = np.zeros(0, np.float32), torch.zeros(0, dtype=torch.bool)
    assert mask.data_ptr() == 0
    count, mean, variance = np.full(2, 7.0), *np.full((2, 8), 7.0)
    of = kernel(VIEW._replace(rows=0), TYPES[0])
    of.forward(x=nothing, y=nothing.copy(), mean=mean, variance=variance, mask=mask, zeroed=True, count=count)
    assert not np.concatenate([count, mean, variance]).any()
    gradient = np.full(4, 7.0)
    of.backward(
        x=nothing, dy=nothing.copy(), dx=nothing.copy(), mean=mean, variance=variance, doffset=gradient, mask=mask,
        zeroed=True, count=count,
    )  # fmt: skip
    assert not gradient.any()


@pytest.mark.parametrize(
    ("operation", "names"), [("forward", ["renorm_mean", "renorm_stddev", "r", "d"]), ("backward", ["r", "d"])]
)
def test_what_goes_together_is_refused_by_half(operation: str, names: list[str]) -> None:
    for count in range(1, len(names)):
        for absent in itertools.combinations(names, count):
            refuses(ValueError, operation, {**arguments(operation), **dict.fromkeys(absent)}, "together")
    call(operation, {**arguments(operation), **dict.fromkeys(names)})
    call(operation, {name: value for name, value in arguments(operation).items() if name not in names})


@pytest.mark.parametrize(
    ("operation", "name"), [(operation, name) for operation, name in ARRAYS if name not in OPTIONAL.get(operation, [])]
)
def test_what_every_call_needs_must_be_given(operation: str, name: str) -> None:
    refuses(TypeError, operation, {**arguments(operation), name: None})
    given = arguments(operation)
    del given[name]
    refuses(TypeError, operation, given)


def test_any_array_of_the_right_size_will_do_whatever_its_shape() -> None:
    flat, shaped = arguments("forward"), arguments("forward")
    for name, value in shaped.items():
        if isinstance(value, np.ndarray):
            shaped[name] = value.reshape(1, -1, 2, 1)
    call("forward", flat)
    call("forward", shaped)
    for name in OUTPUTS["forward"]:
        assert same([flat[name]], [shaped[name]])


# ---- The view.

SETTINGS = {**VIEW._asdict(), "dtype": "float32", "epsilon": EPSILON}


@pytest.mark.parametrize("view", [VIEW, VIEW._replace(grouped_parameters=True), View(0, 1, 1, 3, 1)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_kernel_tells_what_its_callers_have_to_check(view: View, dtype: np.dtype[Any]) -> None:
    found = kernel(view, dtype, 0.5)
    for name, value in view._asdict().items():
        assert getattr(found, name) == value
    assert (found.size, found.parameters, found.statistics) == (view.size, view.parameters, view.groups * view.features)
    assert (found.dtype, found.epsilon) == (dtype.name, 0.5)
    assert found.statistics_dtype == ("float64" if dtype == np.float64 else "float32")
    assert repr(eval(repr(found), {"Kernel": library.Kernel})) == repr(found)


@pytest.mark.parametrize("name", [*SETTINGS, "statistics"])
def test_a_kernel_does_not_change(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(library.Kernel(**SETTINGS), name, 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_kernel_takes_all_its_settings_by_keyword(name: str) -> None:
    with pytest.raises(TypeError):
        library.Kernel(*SETTINGS.values())
    with pytest.raises(TypeError):
        library.Kernel(**{key: value for key, value in SETTINGS.items() if key != name})


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": -12}, {"groups": 0}, {"groups": -2}, {"span": 0}, {"span": -3}, {"features": 0}, {"features": -4},
        {"inner": 0}, {"inner": -2}, {"groups": 5}, {"groups": 8}, {"span": 5}, {"span": 12}, {"rows": 13},
        {"features": -4, "inner": -2}, {"rows": -12, "features": -4},
    ],
    ids=str,
)  # fmt: skip
def test_a_view_that_is_none_is_a_value_error(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"view must have|multiple|at least groups"):
        library.Kernel(**{**SETTINGS, **sizes})


@pytest.mark.parametrize(
    "view",
    [
        View(2**62, 1, 1, 4, 1), View(2**32, 1, 1, 2**32, 1), View(1, 1, 1, 2**32, 2**32), View(2**62, 1, 1, 1, 4),
        View(0, 2**32, 1, 2**32, 1), View(0, 1, 1, 4, 2**61), View(0, 1, 1, 4, 2**62), View(0, 2**62, 1, 4, 1),
        View(2**63 - 1, 1, 1, 2, 1), View(0, 1, 1, 2**62, 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_view_whose_size_overflows_is_a_value_error(view: View) -> None:
    # The product of sizes may be 0 or small modulo 2**64, and so be that of an array which is much too small.
    with pytest.raises(ValueError, match="fewer than"):
        library.Kernel(**{**SETTINGS, **view._asdict()})


@pytest.mark.parametrize("name", VIEW._fields)
@pytest.mark.parametrize("size", [None, "3", 2.5, 2**64])
def test_a_size_that_is_no_integer_of_64_bits_is_a_type_error(name: str, size: Any) -> None:
    with pytest.raises(TypeError):
        library.Kernel(**{**SETTINGS, name: size})


@pytest.mark.parametrize("dtype", ["int32", "float", "", "Float32", "complex64"])
def test_a_type_that_is_none_of_the_four_is_a_value_error(dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        library.Kernel(**{**SETTINGS, "dtype": dtype})


@pytest.mark.parametrize("epsilon", [-1e-3, np.nan, np.inf, -np.inf])
def test_an_epsilon_that_is_negative_or_not_finite_is_a_value_error(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        library.Kernel(**{**SETTINGS, "epsilon": epsilon})


# ---- Size.


BEYOND: dict[str, Callable[[int], View]] = {
    "features last": lambda size: View(size // 64, 1, 1, 64, 1),
    "virtual batches": lambda size: View(size // 64, 4, 1, 64, 1),
    "features first": lambda size: View(2, 1, 1, 4, size // 8),
}


def test_arrays_of_more_than_2_to_the_31_values_are_whole() -> None:
    # Zeros that nobody has written take no memory; what is written lies at the beginning, at places that 32 bits cannot
    # tell apart from others, and at the end.
    size = 2**31 + 2**12
    x = np.zeros(size, np.float16)
    places = np.array([0, 77, 2**30 + 1, 2**31 - 1, 2**31, 2**31 + 77, size - 65, size - 1])
    x[places] = 1024.0
    for make in BEYOND.values():
        view = make(size)
        mean, variance = moments(view, x, np.float64)
        row, feature = places // (view.features * view.inner), places // view.inner % view.features
        many = np.zeros(view.statistics)
        np.add.at(many, (row // view.span % view.groups, feature), 1)
        share = many / (view.rows // view.groups * view.inner)
        np.testing.assert_allclose(mean, 1024.0 * share, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(variance, 1024.0**2 * share * (1 - share), rtol=1e-5, atol=1e-9)
