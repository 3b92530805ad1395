"""The layer against the original that lives on in `tf_keras`: every option, in graphs and eagerly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from batchnorm.tensorflow import BatchNormalization, operations

from .cases import Case, assert_same, cases, run


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_five_steps_and_inference_equal_the_original(
    rank: int, eager: bool, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = operations._operations
    assert kernels is not None

    @settings(max_examples=40)
    @given(cases(rank, eager))
    def compare(case: Case) -> None:
        expected = run(original.BatchNormalization, case, eager)
        for those in (kernels, None):  # None as where they cannot serve: on a GPU, or not built
            monkeypatch.setattr(operations, "_operations", those)
            assert_same(run(BatchNormalization, case, eager), expected, case)

    compare()
