"""What was asked for: every bad value is refused by name, every legal one taken."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from batchnorm.core.options import Clipping, Options, pair, received, scalar, sizes, small_number, weight

FIELDS = {"momentum": "decay", "renorm_momentum": "renorm_decay"}
"""The fields of `Options` whose names are not those of the layer's arguments."""


def options(name: str, value: Any) -> Options:
    return Options(**{FIELDS.get(name, name): value})


def two(shape: Any) -> tuple[int, int]:
    return 1, 0


BAD: list[tuple[str, Any, type[Exception]]] = [
    ("axis", None, TypeError),
    ("axis", 1.0, TypeError),
    ("axis", "1", TypeError),
    ("axis", True, TypeError),
    ("axis", np.True_, TypeError),
    ("axis", {1, 2}, TypeError),
    ("axis", range(2), TypeError),
    ("axis", np.array([1, 2]), TypeError),
    ("axis", [], ValueError),
    ("axis", (), ValueError),
    ("axis", [1, 1], ValueError),
    ("axis", (-1, -1), ValueError),
    ("virtual_batch_size", 0, ValueError),
    ("virtual_batch_size", -4, ValueError),
    ("virtual_batch_size", 2.0, TypeError),
    ("virtual_batch_size", "2", TypeError),
    ("virtual_batch_size", True, TypeError),
    ("virtual_batch_size", [2], TypeError),
    ("adjustment", 1.0, TypeError),
    ("adjustment", (1.0, 0.0), TypeError),
    ("adjustment", "two", TypeError),
    ("epsilon", -1e-3, ValueError),
    ("epsilon", math.nan, ValueError),
    ("epsilon", -math.inf, ValueError),
    ("epsilon", math.inf, ValueError),
    ("epsilon", np.float32(-1), ValueError),
    ("renorm_clipping", "rmin", TypeError),
    ("renorm_clipping", [("rmin", 1)], TypeError),
    ("renorm_clipping", 3.0, TypeError),
    ("renorm_clipping", {"rmin": 0.5, "max": 3}, ValueError),
    ("renorm_clipping", {"Rmax": 3}, ValueError),
    ("renorm_clipping", {0: 3}, ValueError),
    ("renorm_clipping", {"rmin": 2, "rmax": 1}, ValueError),
    ("renorm_clipping", {"rmax": -1}, ValueError),
]
for _name in ("momentum", "renorm_momentum"):
    BAD += [
        (_name, -0.01, ValueError),
        (_name, 1.01, ValueError),
        (_name, 99, ValueError),
        (_name, math.nan, ValueError),
        (_name, math.inf, ValueError),
        (_name, np.float64(1.5), ValueError),
    ]
for _name in ("momentum", "renorm_momentum", "epsilon"):
    BAD += [
        (_name, None, TypeError),
        (_name, "0.9", TypeError),
        (_name, np.str_("0.9"), TypeError),
        (_name, True, TypeError),
        (_name, np.True_, TypeError),
        (_name, 0.5j, TypeError),
        (_name, np.complex64(0.5j), TypeError),
        (_name, [0.9], TypeError),
        (_name, np.array([0.9]), TypeError),
    ]
for _name in ("center", "scale", "renorm", "fused", "cumulative", "skip_nonfinite", "synchronized"):
    BAD += [
        (_name, "True", TypeError),
        (_name, 2, TypeError),
        (_name, -1, TypeError),
        (_name, 1.0, TypeError),
        (_name, [], TypeError),
        (_name, np.array([True]), TypeError),
    ]
for _name in ("center", "scale", "renorm", "cumulative", "skip_nonfinite", "synchronized"):
    BAD.append((_name, None, TypeError))


@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=lambda part: repr(part).replace(" ", ""))
def test_a_bad_value_is_refused_by_name_and_value(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        options(name, value)
    assert type(caught.value) is error
    assert str(caught.value).startswith(name)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("key", ["rmin", "rmax", "dmax"])
@pytest.mark.parametrize(
    ("value", "error"), [("1", TypeError), (True, TypeError), ([1], TypeError), (math.nan, ValueError)]
)
def test_a_bad_limit_is_refused_by_key_and_value(key: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Clipping.of({key: value})
    assert str(caught.value).startswith(f"renorm_clipping['{key}']")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("dmax", [-1, -1e-9, -math.inf, np.float32(-2)])
def test_dmax_is_not_negative(dmax: float) -> None:
    with pytest.raises(ValueError, match=r"renorm_clipping\['dmax'\]") as caught:
        Clipping.of({"dmax": dmax})
    assert repr(dmax) in str(caught.value)


@pytest.mark.parametrize("value", [1.5, "a", None, True])
def test_one_bad_axis_among_several_is_the_one_that_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="axis") as caught:
        Options(axis=[0, value])
    assert repr(value) in str(caught.value)


def test_adjustment_and_virtual_batches_exclude_each_other_and_both_are_named() -> None:
    with pytest.raises(ValueError, match=r"adjustment.*virtual_batch_size") as caught:
        Options(adjustment=two, virtual_batch_size=6)
    assert "virtual_batch_size=6" in str(caught.value)
    assert repr(two) in str(caught.value)


def test_synchronized_statistics_and_virtual_batches_exclude_each_other_and_both_are_named() -> None:
    with pytest.raises(ValueError, match=r"synchronized.*synchronized=True.*virtual_batch_size=6"):
        Options(synchronized=True, virtual_batch_size=6)


def test_every_option_has_a_bad_value_in_the_table() -> None:
    refused = {FIELDS.get(name, name) for name, _, _ in BAD}
    assert refused == set(Options.__dataclass_fields__)


@pytest.mark.parametrize(
    ("axis", "kept"),
    [
        (1, 1),
        (-1, -1),
        (np.int64(2), 2),
        (np.uint8(1), 1),
        ([1, -1], (1, -1)),
        ((0,), (0,)),
        ([np.int32(3), 1], (3, 1)),
    ],
)
def test_an_axis_is_kept_as_python_ints(axis: Any, kept: Any) -> None:
    options = Options(axis=axis)
    assert options.axis == options.feature_axis == kept
    for axis in options.axis if isinstance(options.axis, tuple) else (options.axis,):
        assert type(axis) is int


@pytest.mark.parametrize("name", ["center", "scale", "renorm", "fused", "cumulative", "skip_nonfinite", "synchronized"])
@pytest.mark.parametrize("value", [True, False, 1, 0, np.True_, np.False_, np.int64(1), np.uint8(0)])
def test_a_flag_is_kept_as_a_python_bool(name: str, value: Any) -> None:
    assert getattr(options(name, value), name) is bool(value)


def test_fused_may_be_left_open() -> None:
    assert Options(fused=None).fused is None


@pytest.mark.parametrize("name", ["momentum", "renorm_momentum"])
@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 0.5, np.float32(0.25), np.int64(1), Fraction(1, 2)])
def test_a_momentum_may_be_any_real_number_from_0_to_1(name: str, value: Any) -> None:
    assert getattr(options(name, value), FIELDS[name]) is value


@pytest.mark.parametrize("name", ["momentum", "renorm_momentum", "epsilon"])
def test_a_scalar_array_is_taken_as_it_is(name: str) -> None:
    value = np.array(0.5)
    assert getattr(options(name, value), FIELDS.get(name, name)) is value


def test_a_scalar_whose_value_is_not_known_yet_is_taken_as_it_is() -> None:
    class Symbol:
        dtype = "float32"
        shape = ()

    class Unranked:
        dtype = "float32"

        class shape:  # noqa: N801
            @staticmethod
            def __len__() -> int:
                raise ValueError("unknown rank")

    for value in (Symbol(), Unranked()):
        assert scalar("momentum", value, 0, 1, "in [0, 1]") is value


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0, np.float64(0.5), Fraction(1, 4)])
def test_a_rate_is_the_weight_of_the_new_value(decay: Any) -> None:
    options = Options(decay=decay, renorm_decay=1 - decay)
    assert options.rate == 1 - decay
    assert options.renorm_rate == decay


@pytest.mark.parametrize("name", ["momentum", "eps", "anything"])
def test_a_weight_and_a_small_number_are_checked_under_any_name(name: str) -> None:
    assert weight(name, 0.25) == small_number(name, 0.25) == 0.25
    for check, bad in ((weight, 1.5), (weight, -0.5), (small_number, -0.5), (small_number, math.inf)):
        with pytest.raises(ValueError, match=f"^{name} must be .*{bad}"):
            check(name, bad)
    for check in (weight, small_number):
        with pytest.raises(TypeError, match=f"^{name} must be .*'0.5'"):
            check(name, "0.5")


@pytest.mark.parametrize("adjusted", [1.0, None, (), (1.0,), (1.0, 0.0, 0.0), "ab", {1: 2, 3: 4}], ids=repr)
def test_what_an_adjustment_returns_must_be_a_pair(adjusted: Any) -> None:
    with pytest.raises(ValueError, match=r"^adjustment must be or return a pair") as caught:
        pair(adjusted)
    assert repr(adjusted) in str(caught.value)


def test_a_pair_may_be_a_tuple_or_a_list_of_whatever_may_be_an_array() -> None:
    scale, bias = object(), 2
    assert pair((scale, bias)) == pair([scale, bias]) == (scale, bias)


@pytest.mark.parametrize("value", [None, "1", b"1", 1j], ids=repr)
@pytest.mark.parametrize("place", [0, 1])
def test_a_pair_of_what_is_no_array_is_refused(place: int, value: Any) -> None:
    adjusted: list[Any] = [1.0, 1.0]
    adjusted[place] = value
    with pytest.raises(TypeError, match=r"^adjustment must be or return a pair of arrays or numbers") as caught:
        pair(adjusted)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kept"), [(3, (3,)), (0, (0,)), (np.int64(3), (3,)), ([3, 5], (3, 5)), ((np.uint8(2), 1), (2, 1))]
)
def test_sizes_are_kept_as_python_ints(value: Any, kept: tuple[int, ...]) -> None:
    found = sizes("features", value)
    assert found == kept
    assert all(type(size) is int for size in found)


@pytest.mark.parametrize(
    ("value", "error"),
    [(3.0, TypeError), (True, TypeError), ("3", TypeError), ((3, None), TypeError), (-1, ValueError), ((), ValueError)],
    ids=repr,
)
def test_bad_sizes_are_refused_by_name_and_value(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^features must be an int that is at least 0, or a list or tuple") as caught:
        sizes("features", value)
    assert repr(value[1] if value == (3, None) else value) in str(caught.value)


@pytest.mark.parametrize("value", [0, 0.0, 1e-12, 1e-3, 5, np.float64(1e-5), np.float32(0)])
def test_epsilon_may_be_any_number_from_0_up(value: Any) -> None:
    assert Options(epsilon=value).epsilon is value


@pytest.mark.parametrize(
    ("clipping", "kept"),
    [
        (None, Clipping(None, None, None)),
        ({}, Clipping(None, None, None)),
        ({"rmin": None, "rmax": None, "dmax": None}, Clipping(None, None, None)),
        ({"rmax": 3}, Clipping(None, 3, None)),
        ({"rmin": 0, "rmax": math.inf, "dmax": math.inf}, Clipping(0, math.inf, math.inf)),
        ({"rmin": 1, "rmax": 1, "dmax": 0}, Clipping(1, 1, 0)),
        ({"rmin": -1, "rmax": 0}, Clipping(-1, 0, None)),
        (Clipping(0.5, 2, 1), Clipping(0.5, 2, 1)),
    ],
)
def test_a_clipping_keeps_its_limits_and_none_is_no_limit(clipping: Any, kept: Clipping) -> None:
    assert Options(renorm_clipping=clipping).renorm_clipping == kept


def test_limits_may_be_scalar_arrays_even_crossing_ones_for_their_values_come_later() -> None:
    low, high = np.array(2.0), np.array(1.0)
    clipping = Clipping.of({"rmin": low, "rmax": high, "dmax": low})
    assert clipping.rmin is low
    assert clipping.rmax is high
    assert clipping.dmax is low


@pytest.mark.parametrize("size", [1, 2, 64, np.int32(8)])
def test_a_virtual_batch_size_is_kept_as_a_python_int(size: Any) -> None:
    kept = Options(virtual_batch_size=size).virtual_batch_size
    assert kept == size
    assert type(kept) is int


def test_an_adjustment_is_kept() -> None:
    assert Options(adjustment=two).adjustment is two


def test_options_are_as_the_original_has_them_by_default_and_cannot_be_changed() -> None:
    options = Options()
    assert options == Options(
        axis=-1,
        decay=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        renorm=False,
        renorm_clipping=Clipping(),
        renorm_decay=0.99,
        fused=None,
        virtual_batch_size=None,
        adjustment=None,
        cumulative=False,
    )
    with pytest.raises(AttributeError):
        options.center = False  # type: ignore[misc]


def test_what_was_received_is_told_with_its_type() -> None:
    assert received("a") == "received 'a' of type str"
