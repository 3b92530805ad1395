"""The layer against the original that lives on in `tf_keras`: every option, in graphs and eagerly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from batchnorm.tensorflow import BatchNormalization, operations

from .cases import Case, assert_same, cases, run


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["cpu", "stock"])
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_five_steps_and_inference_equal_the_original(
    rank: int, eager: bool, kernels: str, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "stock":  # as where the CPU kernels cannot serve: on a GPU, or not built
        monkeypatch.setattr(operations, "_operations", None)

    @settings(max_examples=50)
    @given(cases(rank, eager))
    def compare(case: Case) -> None:
        ours = run(BatchNormalization, case, eager)
        assert_same(ours, run(original.BatchNormalization, case, eager), case)

    compare()
