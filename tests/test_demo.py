"""The demo: its data, its samplers, what it makes of results, and a tiny run of the whole."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from batchnorm import demo
from batchnorm.demo import digits, experiments, report
from batchnorm.demo.experiments import Clips, Comparison, Curve, Experiment, Measured, Outcome, Result

MODULES = {
    "tensorflow": "batchnorm.demo.tensorflow",
    "torch": "batchnorm.demo.pytorch",
    "jax": "batchnorm.demo.jax",
    "keras": "batchnorm.demo.keras",
}
NAMES = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX", "keras": "Keras"}
each_framework = pytest.mark.parametrize("framework", MODULES)


def _experiment(method: str, rate: float = 0.1) -> Experiment:
    return Experiment(method, None, rate, batch_size=4, steps=20, evaluations=2)


def _result(*accuracies: list[tuple[float, float]], sweep: bool = False, rate: float = 0.1) -> Result:
    """One list of runs for each of two methods; a run has an accuracy after steps 10 and 20."""
    methods = [_experiment(method, rate) for method in ("no batch norm", "batch norm")]
    outcomes = tuple(
        Outcome(one, tuple(Curve((10, 20), run) for run in runs)) for one, runs in zip(methods, accuracies, strict=True)
    )
    return Result(Comparison("Title", tuple(methods), sweep=sweep), outcomes)


def test_the_split_is_disjoint_complete_stratified_and_always_the_same() -> None:
    first, second = digits.load(), digits.load()
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert first.train.images.shape == (1297, 8, 8, 1)
    assert first.test.images.shape == (500, 8, 8, 1)
    train = {image.tobytes() for image in first.train.images}
    test = {image.tobytes() for image in first.test.images}
    assert len(train) == 1297
    assert len(test) == 500
    assert not train & test
    assert np.bincount(first.test.labels).min() >= 48
    assert abs(float(first.train.images.mean())) < 1e-5
    assert float(first.train.images.std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", digits.SAMPLERS)
def test_samplers_give_batches_of_the_size_and_repeat_with_the_seed(name: str) -> None:
    labels = np.repeat(np.arange(10), 20)
    batches = [
        list(itertools.islice(digits.SAMPLERS[name](labels, 7, np.random.default_rng(seed)), 50)) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])
    assert np.shape(batches[0]) == (50, 7)
    assert set(labels[np.concatenate(batches[0])]) == set(range(10))


def test_two_classes_has_half_a_batch_of_each() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20))
    pairs = set()
    for batch in itertools.islice(digits.two_classes(labels, 32, np.random.default_rng(0)), 200):
        classes, counts = np.unique(labels[batch], return_counts=True)
        assert counts.tolist() == [16, 16]
        pairs.add(tuple(classes.tolist()))
    assert len(pairs) > 40  # of 45


def test_iid_batches_are_not_of_two_classes() -> None:
    labels = np.repeat(np.arange(10), 20)
    batch = next(digits.iid(labels, 64, np.random.default_rng(0)))
    assert len(np.unique(labels[batch])) > 2


def test_clips_start_as_plain_batch_norm_and_relax_to_3_and_5() -> None:
    clips = Clips()
    assert [clips.rmax.at(progress) for progress in (0, 0.05, 0.175, 0.3, 1)] == pytest.approx([1, 1, 2, 3, 3])
    assert [clips.dmax.at(progress) for progress in (0, 0.05, 0.125, 0.2, 1)] == pytest.approx([0, 0, 2.5, 5, 5])


@pytest.mark.parametrize(("steps", "evaluations"), [(200, 40), (10, 3), (2, 2), (1, 1)])
def test_evaluations_are_as_many_as_asked_and_the_last_one_is_at_the_end(steps: int, evaluations: int) -> None:
    experiment = Experiment("", None, 0.1, batch_size=4, steps=steps, evaluations=evaluations)
    evaluated = [step for step in range(1, steps + 1) if experiment.evaluated(step)]
    assert len(evaluated) == evaluations
    assert evaluated[-1] == steps


def test_a_comparison_changes_the_method_only() -> None:
    for comparison in experiments.COMPARISONS:
        common = {(one.learning_rate, one.batch_size, one.steps, one.sampler) for one in comparison.experiments}
        assert len(common) == 1
        assert {one.method for one in comparison.experiments} <= set(report.COLOURS)


def test_measured_is_mean_and_deviation() -> None:
    assert str(Measured.of([0.96, 0.97, 0.98])) == "0.970 ± 0.010"
    assert str(Measured.of([0.97])) == "0.970"
    assert f"{Measured.of([-2, -1, 0]):+.1f}" == "-1.0 ± 1.0"


def test_outcomes_over_seeds() -> None:
    result = _result([(0.5, 0.9), (0.7, 0.96)], [(0.96, 1.0), (0.9, 0.98)])
    without, norm = result.outcomes
    assert without.final.mean == pytest.approx(0.765)
    assert without.arrivals == [20]
    assert without.steps_to_target is None
    assert norm.steps_to_target is not None
    assert norm.steps_to_target.mean == 15
    gain = result.gain(norm, lambda curve: curve.accuracy[-1])
    assert gain.mean == pytest.approx(0.06)
    assert gain.spread == pytest.approx(0.04 * 2**0.5)


def test_facts_follow_the_numbers_either_way() -> None:
    low, high = [(0.1, 0.2), (0.1, 0.3)], [(0.96, 0.97), (0.96, 0.97)]
    (better,) = report.facts([_result(low, high)])
    (worse,) = report.facts([_result(high, low)])
    (same,) = report.facts([_result(low, low)])
    assert better.startswith("Title: batch norm against no batch norm: mean +79.0 ± 3.5 points, final +79.0")
    assert worse.startswith("Title: batch norm against no batch norm: mean -79.0 ± 3.5 points, final -79.0")
    assert same.count("(within the spread)") == 2

    slow = [(0.1, 0.96), (0.1, 0.96)]
    rates, fewest, ratio = report.facts([_result(slow, high, sweep=True), _result(low, high, sweep=True, rate=1.0)])
    assert rates.endswith("95 %: 0.1 (no batch norm); 0.1, 1 (batch norm).")
    assert fewest.endswith("20 ± 0 (no batch norm, learning rate 0.1); 10 ± 0 (batch norm, learning rate 0.1).")
    assert "no batch norm takes 2.0 times the steps of batch norm" in ratio
    assert report.facts([_result(low, low, sweep=True)]) == [
        "Learning rates at which every run reached 95 %: none (no batch norm); none (batch norm)."
    ]


def test_the_table_says_never_and_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    report.show([_result([(0.1, 0.2), (0.1, 0.3)], [(0.1, 0.2), (0.1, 0.97)])])
    shown = capsys.readouterr().out
    assert re.search(r"no batch norm +never", shown)
    assert re.search(r"batch norm +1 of 2 runs", shown)


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the layer, and every option of it, once."""
    sweep = experiments.COMPARISONS[1]
    renorm, large, replicas = experiments.COMPARISONS[-3:]
    assert renorm.experiments[1].method == "batch renorm"
    monkeypatch.setattr(
        experiments,
        "COMPARISONS",
        (
            sweep,
            Comparison(renorm.title, renorm.experiments[:2]),
            Comparison(large.title, large.experiments[1:]),
            Comparison(replicas.title, replicas.experiments[1:]),
        ),
    )


@pytest.mark.slow
@each_framework
def test_a_tiny_run_draws_a_figure(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _small(monkeypatch)
    path = tmp_path / "figure.png"
    assert demo.main(["--framework", framework, "--quick", "--seeds", "1", "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"Training 9 networks on {NAMES[framework]}: 9 experiments" in shown
    for method in report.COLOURS:
        assert method in shown
    assert "Batches of 32 from two classes: batch renorm against batch norm: mean " in shown


def _method(name: str, steps: int, comparisons: slice = slice(1, None)) -> Experiment:
    """An experiment of few steps, with an evaluation after each."""
    chosen = experiments.COMPARISONS[comparisons]
    found = [one for comparison in chosen for one in comparison.experiments if one.method == name]
    return dataclasses.replace(found[0], steps=steps, evaluations=steps)


REPLICAS = slice(-1, None)
"""The comparison of these."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["batch norm", "batch renorm"])
def test_replicas_are_normalized_and_remembered_each_by_itself(method: str) -> None:
    """In PyTorch: as a layer of `torch.nn` for each replica, or one of ours with renorm."""
    import torch

    from batchnorm.demo import pytorch
    from batchnorm.torch import BatchNorm2d

    experiment = _method(method, 4, REPLICAS)
    make = pytorch._normalization(experiment, torch.Generator())
    assert make is not None
    together: Any = make(3)
    kind: Any = torch.nn.BatchNorm2d
    if together.norm.renorm:
        schedule = pytorch._schedule(Clips(), experiment.steps)
        kind = functools.partial(BatchNorm2d, renorm=True, renorm_clipping=schedule, renorm_momentum=1 - 0.98)
    apart = [kind(3, eps=1e-3, momentum=1 - 0.98) for _ in range(4)]
    with torch.no_grad():
        for parameter in (together.weight, together.bias):
            parameter.add_(torch.randn(3))
        for layer in apart:
            layer.weight.copy_(together.weight)
            layer.bias.copy_(together.bias)
    for training in (True, True, False):
        x = torch.randn(16, 3, 5, 5) + torch.arange(16).reshape(-1, 1, 1, 1) % 4  # replicas differ
        y = together.train(training)(x)
        for replica, layer in enumerate(apart):
            torch.testing.assert_close(y[replica::4], layer.train(training)(x[replica::4]), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@each_framework
@pytest.mark.parametrize("method", ["batch norm", "adjustment"])
def test_the_same_seed_gives_the_same_run_and_another_does_not(method: str, framework: str) -> None:
    run = importlib.import_module(MODULES[framework]).run
    data = digits.load()
    done: list[int] = []
    curves = [run(_method(method, 2), data, seed, done.append) for seed in (0, 0, 1)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]
    assert curves[0].steps == (1, 2)
    assert sum(done) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "comparisons"),
    [(name, slice(1, None)) for name in report.COLOURS if name != "adjustment"]
    + [(name, REPLICAS) for name in ("batch norm", "batch renorm")],
)
def test_the_experiments_are_the_same_in_every_framework(
    method: str, comparisons: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are of one distribution, and training from the same weights on the same batches is the same.

    An adjustment is drawn by the framework, so that the runs with it differ.
    """
    import tensorflow as tf

    ours: Any = importlib.import_module("batchnorm.demo.pytorch")
    theirs: Any = importlib.import_module("batchnorm.demo.tensorflow")
    initialize = ours._initialize
    drawn: list[NDArray[np.float32]] = []

    def keeping(model: Any, generator: Any) -> None:
        initialize(model, generator)
        weights = [value.detach().numpy() for value in model.parameters() if value.ndim > 1]
        drawn.extend(weight.T.copy() if weight.ndim == 2 else weight.transpose(2, 3, 1, 0).copy() for weight in weights)

    def drawing(initializer: Any) -> Any:
        def initial(shape: Any, dtype: Any = None, partition_info: Any = None) -> Any:
            weight = drawn.pop(0)
            assert weight.shape == tuple(shape)
            with tf.Graph().as_default(), theirs.v1.Session() as session:
                reference = session.run(initializer(seed=0)(shape))
            assert weight.std() == pytest.approx(reference.std(), rel=3 / weight.size**0.5)
            assert abs(weight).max() == pytest.approx(abs(reference).max(), rel=0.1)
            return tf.constant(weight)

        return lambda: initial

    monkeypatch.setattr(ours, "_initialize", keeping)
    for name in ("he_normal", "glorot_normal"):
        monkeypatch.setattr(theirs.v1.initializers, name, drawing(getattr(theirs.v1.initializers, name)))
    data, experiment = digits.load(), _method(method, 6, comparisons)
    curve = ours.run(experiment, data, 0, lambda steps: None)
    assert drawn
    other = theirs.run(experiment, data, 0, lambda steps: None)
    assert not drawn
    assert curve.steps == other.steps
    # Rounding, which goes by the processor, grows from step to step. A momentum half as large again makes over 0.07.
    assert curve.accuracy[:2] == pytest.approx(other.accuracy[:2], abs=0.005)
    assert curve.accuracy == pytest.approx(other.accuracy, abs=0.025)
    assert len(set(curve.accuracy)) > 3


@each_framework
@pytest.mark.parametrize("module", [None, "sklearn.datasets", "rich"])
def test_a_missing_package_is_named(
    module: str | None, framework: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = module or framework
    words = (NAMES | {"sklearn.datasets": "scikit-learn", "rich": "Rich"})[missed]

    def missing(name: str, package: str) -> object:
        raise ModuleNotFoundError(f"No module named {missed!r}", name=missed)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert demo.main(["--framework", framework]) == 2
    extras = {"tensorflow": "demo", "torch": "demo,torch", "jax": "demo,flax", "keras": "demo,keras"}[framework]
    assert capsys.readouterr().err == f'batchnorm demo needs {words}: pip install "batchnorm[{extras}]"\n'


def test_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, package: str) -> object:
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="other"):
        demo.main([])


def test_a_backend_is_for_keras(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--framework", "torch", "--backend", "jax"]) == 2
    assert "--backend is for --framework keras; received torch" in capsys.readouterr().err


def test_an_output_in_no_folder_is_refused_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo.main(["--output", str(tmp_path / "none" / "figure.png")]) == 2
    assert "--output must be in a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "-1", "many"])
def test_seeds_must_be_positive(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--seeds", seeds])
    assert stop.value.code == 2
    assert f"--seeds: must be an int that is at least 1; received '{seeds}'" in capsys.readouterr().err
