"""Files of variables from one framework's names to another's."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest

import batchnorm.numpy
from batchnorm.conversion import convert_file
from batchnorm.core import dialects

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")

FEATURES = 5
X = np.random.default_rng(0).normal(3.0, 2.0, (32, FEATURES)).astype(np.float32)


def trained(**options: Any) -> batchnorm.numpy.BatchNormalization:
    layer = batchnorm.numpy.BatchNormalization(momentum=0.9, renorm_momentum=0.8, **options)
    for step in range(3):
        layer(X + step, training=True)
    layer.variables["gamma"] += 0.5
    layer.variables["beta"] -= 0.5
    return layer


def write(path: pathlib.Path, arrays: dict[str, Any]) -> pathlib.Path:
    np.savez(path, **arrays)
    return path


def saved(path: pathlib.Path, layer: batchnorm.numpy.BatchNormalization, scope: str = "net/bn") -> pathlib.Path:
    return write(path, {f"{scope}/{name}": value for name, value in layer.variables.items()})


@pytest.mark.parametrize("renorm", [False, True])
def test_pytorch_s_layer_takes_what_comes_from_a_checkpoint_of_tensorflow_and_gives_it_back(
    renorm: bool, tmp_path: pathlib.Path
) -> None:
    import batchnorm.torch
    from batchnorm.tensorflow import checkpoints

    layer = trained(renorm=renorm)
    before = {f"net/bn/{name}": value for name, value in layer.variables.items()}
    checkpoints.write(str(tmp_path / "old"), before | {"net/conv/kernel": np.ones((3, 3))})
    done = convert_file(tmp_path / "old", tmp_path / "new.pt")
    assert done == ({"net/bn": "net.bn"}, 1)
    state = torch.load(tmp_path / "new.pt")
    model = torch.nn.ModuleDict({"net": torch.nn.ModuleDict()})
    norm = batchnorm.torch.BatchNorm1d(FEATURES, eps=1e-3, momentum=0.1, renorm=renorm, renorm_momentum=0.2)
    model["net"]["bn"] = norm
    model.load_state_dict(state)
    for training in (False, True, False):
        y = norm.train(training)(torch.from_numpy(X)).detach().numpy()
        np.testing.assert_allclose(y, layer(X, training), atol=2e-5)
        if not renorm:  # plain layers of PyTorch go on with the unbiased variance
            break

    torch.save(model.state_dict(), tmp_path / "again.pt")
    convert_file(tmp_path / "again.pt", tmp_path / "again", epsilon=1e-3)
    after = checkpoints.read(str(tmp_path / "again"))
    expected = {f"net/bn/{name}": value for name, value in layer.variables.items()}
    assert after.keys() == expected.keys()
    for name, value in after.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_the_original_goes_on_from_a_checkpoint_that_was_a_state_dict(tmp_path: pathlib.Path) -> None:
    layer = trained(renorm=True)
    convert_file(saved(tmp_path / "layer.npz", layer), tmp_path / "layer.pt")
    convert_file(tmp_path / "layer.pt", tmp_path / "checkpoint", rename=[(r"net\.bn", "norm")], epsilon=1e-3)
    v1 = tf.compat.v1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = pytest.importorskip("tf_keras.src.legacy_tf_layers.normalization")
        with tf.Graph().as_default(), v1.Session() as session:
            y = original.batch_normalization(v1.placeholder_with_default(X, X.shape), renorm=True, name="norm")
            v1.train.Saver().restore(session, str(tmp_path / "checkpoint"))
            np.testing.assert_allclose(session.run(y), layer(X), atol=2e-5)


@pytest.mark.parametrize("dialect", ["flax", "linen"])
def test_flax_s_layers_take_it_too(dialect: str, tmp_path: pathlib.Path) -> None:
    flax = pytest.importorskip("flax")
    jax = pytest.importorskip("jax")
    layer = trained(renorm=True)
    convert_file(saved(tmp_path / "a.npz", layer, "bn"), tmp_path / "a.msgpack", to=dialect)
    tree = flax.serialization.msgpack_restore((tmp_path / "a.msgpack").read_bytes())
    if dialect == "linen":
        from batchnorm.flax import linen

        norm = linen.BatchNorm(epsilon=1e-3, renorm=True)
        variables = {collection: names["bn"] for collection, names in tree.items()}
        y = norm.apply(variables, X, use_running_average=True)
    else:
        from flax import nnx

        from batchnorm.flax import BatchNorm

        module = BatchNorm(FEATURES, epsilon=1e-3, renorm=True, rngs=nnx.Rngs(0))
        state = nnx.state(module)
        nnx.replace_by_pure_dict(
            state, {name: jax.numpy.asarray(v) for name, v in tree["bn"].items() if name != "steps"}
        )
        nnx.update(module, state)
        module.eval()
        y = module(X)
    np.testing.assert_allclose(y, layer(X), atol=2e-5)
    convert_file(tmp_path / "a.msgpack", tmp_path / "b.npz", epsilon=1e-3)
    with np.load(tmp_path / "b.npz") as back:
        assert set(back) == {f"bn/{name}" for name in layer.variables}
        for name, value in layer.variables.items():
            np.testing.assert_allclose(back[f"bn/{name}"], value, rtol=1e-5, atol=1e-6)


def test_safetensors_hold_any_names_and_those_of_their_source_unless_said(tmp_path: pathlib.Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    layer = trained()
    source = tmp_path / "a.safetensors"
    numpy_files.save_file(
        {"net.bn.running_mean": layer.moving_mean, "net.bn.running_var": layer.moving_variance}, source
    )
    convert_file(source, tmp_path / "b.safetensors", rename=[("net", "model")])
    found = numpy_files.load_file(tmp_path / "b.safetensors")
    assert set(found) == {f"model.bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    convert_file(source, tmp_path / "c.safetensors", to="tensorflow")
    found = numpy_files.load_file(tmp_path / "c.safetensors")
    assert set(found) == {"net/bn/moving_mean", "net/bn/moving_variance"}
    np.testing.assert_array_equal(found["net/bn/moving_mean"], layer.moving_mean)


def test_checkpoints_of_the_older_renorm_are_read(tmp_path: pathlib.Path) -> None:
    from batchnorm.tensorflow import checkpoints

    older = {
        "moving_mean": np.array([1.0]),
        "moving_variance": np.array([4.0]),
        "renorm_mean": np.array([3.0]),
        "renorm_mean_weight": np.array(0.5),
        "renorm_stddev": np.array([1.0]),
        "renorm_stddev_weight": np.array(0.5),
    }
    checkpoints.write(str(tmp_path / "old"), {f"bn/{name}": value for name, value in older.items()})
    convert_file(tmp_path / "old", tmp_path / "new.pt", epsilon=1e-3)
    state = {name: value.item() for name, value in torch.load(tmp_path / "new.pt").items()}
    expected = {"running_mean": 1, "running_var": 4, "renorm_mean": 6, "renorm_stddev": 2, "num_batches_tracked": 0}
    assert state == {f"bn.{name}": value for name, value in expected.items()}
    convert_file(tmp_path / "old", tmp_path / "new", epsilon=1e-3)
    assert set(checkpoints.read(str(tmp_path / "new"))) == {
        f"bn/{name}" for name in ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    }


def test_within_one_framework_everything_else_stays_as_it_is(tmp_path: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, FEATURES), torch.nn.BatchNorm1d(FEATURES)).bfloat16()
    model[1].float()
    before = model.state_dict()
    torch.save(before, tmp_path / "plain.pt")
    done = convert_file(tmp_path / "plain.pt", tmp_path / "renorm.pt", renorm=True, epsilon=1e-5)
    assert done == ({"1": "1"}, 0)
    after = torch.load(tmp_path / "renorm.pt")
    assert after.keys() - before.keys() == {"1.renorm_mean", "1.renorm_stddev"}
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        torch.testing.assert_close(after[name], value)
    torch.testing.assert_close(after["1.renorm_stddev"], torch.full([FEATURES], 1 + 1e-5).sqrt())
    convert_file(tmp_path / "renorm.pt", tmp_path / "back.pt", renorm=False)
    assert torch.load(tmp_path / "back.pt").keys() == before.keys()


def test_the_renorm_of_sb3_contrib_becomes_ours(tmp_path: pathlib.Path) -> None:
    theirs = pytest.importorskip("sb3_contrib.common.torch_layers").BatchRenorm1d(FEATURES, warmup_steps=2)
    import batchnorm.torch

    for step in range(6):
        theirs(torch.from_numpy(X) + step)
    torch.save(torch.nn.Sequential(theirs).state_dict(), tmp_path / "theirs.pt")
    convert_file(tmp_path / "theirs.pt", tmp_path / "ours.pt", renorm=True, epsilon=0.001)
    switch = batchnorm.torch.ClippingSchedule(3, rmax=3.0, rmax_end=3, dmax=5.0, dmax_end=3)
    ours = batchnorm.torch.BatchNorm1d(FEATURES, eps=0.001, momentum=0.01, renorm=True, renorm_clipping=switch)
    torch.nn.Sequential(ours).load_state_dict(torch.load(tmp_path / "ours.pt"))
    assert ours.num_batches_tracked == 6
    x = torch.from_numpy(X) + 1
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(ours.train()(x), theirs.train()(x), atol=0.05, rtol=0.05)  # their variance is unbiased


def test_the_norms_of_tabnet_lose_their_inner_name(tmp_path: pathlib.Path) -> None:
    GBN = pytest.importorskip("pytorch_tabnet.tab_network").GBN  # noqa: N806
    import batchnorm.torch

    theirs = torch.nn.Sequential(GBN(FEATURES, 8))
    theirs(torch.from_numpy(X))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    done = convert_file(tmp_path / "theirs.pt", tmp_path / "ours.pt", rename=[(r"\.bn$", "")])
    assert done.layers == {"0.bn": "0"}
    ours = torch.nn.Sequential(batchnorm.torch.BatchNorm1d(FEATURES, virtual_batch_size=8))
    ours.load_state_dict(torch.load(tmp_path / "ours.pt"))
    torch.testing.assert_close(ours.eval()(torch.from_numpy(X)), theirs.eval()(torch.from_numpy(X)))


def test_several_axes_lose_their_sizes_of_one_on_the_way_to_pytorch_and_find_them_again(
    tmp_path: pathlib.Path,
) -> None:
    layer = batchnorm.numpy.BatchNormalization(axis=[1, 3], virtual_batch_size=4)
    x = np.random.default_rng(1).normal(size=(8, 3, 4, 5)).astype(np.float32)
    layer(x, training=True)
    assert layer.moving_mean.shape == (1, 1, 3, 1, 5)
    convert_file(saved(tmp_path / "a.npz", layer), tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt")["net.bn.running_mean"].shape == (3, 5)
    like = batchnorm.numpy.BatchNormalization(axis=[1, 3], virtual_batch_size=4)
    like.build(x.shape)
    convert_file(tmp_path / "a.pt", tmp_path / "b.npz", into=saved(tmp_path / "like.npz", like))
    with np.load(tmp_path / "b.npz") as back:
        for name, value in layer.variables.items():
            np.testing.assert_array_equal(back[f"net/bn/{name}"], value)


def test_a_file_that_is_there_keeps_what_is_no_layer_s_and_has_its_own_variables_filled(tmp_path: pathlib.Path) -> None:
    import batchnorm.torch

    layer = trained()
    model = torch.nn.Sequential(torch.nn.Linear(2, FEATURES), batchnorm.torch.BatchNorm1d(FEATURES, renorm=True))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    source = saved(tmp_path / "a.npz", layer)
    convert_file(source, tmp_path / "b.pt", into=tmp_path / "model.pt", rename=[("net/bn", "1")], epsilon=1e-3)
    kernel = model[0].weight.detach().clone()
    model.load_state_dict(torch.load(tmp_path / "b.pt"))
    torch.testing.assert_close(model[0].weight.detach(), kernel)
    np.testing.assert_array_equal(model[1].renorm_mean, layer.moving_mean)
    np.testing.assert_allclose(model[1].renorm_stddev, np.sqrt(layer.moving_variance + 1e-3), rtol=1e-6)


def keras_2_model(path: pathlib.Path) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf_keras = pytest.importorskip("tf_keras")
        model = tf_keras.Sequential(
            [tf_keras.layers.Dense(FEATURES, input_shape=(FEATURES,)), tf_keras.layers.BatchNormalization(name="norm")]
        )
        model(X, training=True)
        model.save(path)
    return tf_keras, model


@pytest.mark.slow
def test_hdf5_files_of_keras_2_are_read_and_written_over(tmp_path: pathlib.Path) -> None:
    tf_keras, model = keras_2_model(tmp_path / "model.h5")
    convert_file(tmp_path / "model.h5", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as found:
        assert set(found) == {f"norm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")}
        np.testing.assert_array_equal(found["norm/moving_mean"], model.layers[1].moving_mean)
    layer = trained(renorm=True)
    source = saved(tmp_path / "b.npz", layer, "norm")
    convert_file(source, tmp_path / "b.h5", into=tmp_path / "model.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = tf_keras.models.load_model(tmp_path / "b.h5")
    np.testing.assert_array_equal(again.layers[0].kernel, model.layers[0].kernel)
    np.testing.assert_allclose(again.layers[1](X), layer(X), atol=2e-5)


KERAS_3 = """
import sys

import keras
import numpy as np

what, path, *values = sys.argv[1:]
if what == "write":
    norm, deep = keras.layers.BatchNormalization(name="norm"), keras.layers.BatchNormalization(renorm=True, name="deep")
    inner = keras.Sequential([keras.Input((5,)), deep], name="inner")
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5), norm, inner])
    model(np.random.default_rng(0).normal(3.0, 2.0, (32, 5)), training=True)
    model.save(path)
    model.save_weights(path.replace(".keras", ".weights.h5"))
    np.savez(path.replace(".keras", ".npz"), *model.get_weights())
else:
    model = keras.saving.load_model(path.replace(".weights.h5", ".keras"))
    model.load_weights(path)
    np.savez(values[0], *model.get_weights())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
def test_files_of_keras_3_are_read_and_written_over(kind: str, tmp_path: pathlib.Path) -> None:
    def keras(*arguments: Any) -> None:
        done = subprocess.run(
            [sys.executable, "-c", KERAS_3, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]

    pytest.importorskip("keras")
    keras("write", tmp_path / "model.keras")
    convert_file(tmp_path / f"model.{kind}", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as found, np.load(tmp_path / "model.npz") as weights:
        values = [weights[name] for name in weights]
        shorts = dialects.DIALECTS["tensorflow"].names
        expected = [f"norm/{name}" for name in list(shorts)[:4]] + [f"inner/deep/{name}" for name in list(shorts)[:7]]
        assert set(found) == set(expected)
        for name, value in zip(expected, values[2:], strict=True):
            np.testing.assert_array_equal(found[name], value)
        changed = {name: value + 1 for name, value in found.items()}
    write(tmp_path / "b.npz", changed)
    if kind == "weights.h5":
        (tmp_path / "b.keras").write_bytes((tmp_path / "model.keras").read_bytes())
    convert_file(tmp_path / "b.npz", tmp_path / f"b.{kind}", into=tmp_path / f"model.{kind}")
    keras("read", tmp_path / f"b.{kind}", tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as weights:
        for at, name in enumerate(weights):
            np.testing.assert_array_equal(weights[name], values[at] + (at >= 2))


# ---- Errors, before anything is written.


@pytest.mark.parametrize(
    ("held", "options", "said"),
    [
        ({"a/mean": 0, "a/var": 0}, {"epsilon": -1.0}, r"epsilon must be finite and at least 0; received -1\.0"),
        ({"dense/kernel": 0}, {}, "must have batch normalization.*'dense/kernel'"),
        ({"a/moving_mean": 0}, {}, "must have batch normalization"),
        ({"a/mean": 0, "a/var": 0}, {"to": "keras"}, "to must be one of.*'keras'"),
        ({"a/mean": 0, "a/var": 0}, {"renorm": True}, "'a' in .* cannot be converted: epsilon must be given"),
        ({"a/mean": 0, "a/var": 0, "b/mean": 0, "b/var": 0}, {"rename": [("[ab]", "c")]}, "rename must keep.*'c'"),
        ({"a/mean": 0, "a/var": 0}, {"rename": [("(", "c")]}, r"rename must be of regular expressions.*'\('"),
        ({"a/mean": 0, "a/var": 0}, {"into": "like.npz", "to": "linen"}, "must have each layer.*'n'.*not 'a'"),
        ({"n/mean": 0, "n/var": 0, "n/bias": 0}, {"into": "like.npz"}, "the target has no beta"),
        ({"n/mean": [0, 1], "n/var": [0, 1]}, {"into": "like.npz"}, r"moving_mean must have shape \(3,\).*\(2,\)"),
        (
            {"a/moving_mean": 0, "a/moving_variance": 1, "a/renorm_mean_weight": 1},
            {"epsilon": 1.0, "renorm": True},
            "missing",
        ),
        ({"n/mean": 0, "n/var": 0}, {"into": "like.pt"}, "into must be a file of the target's kind"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    held: dict[str, Any], options: dict[str, Any], said: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(pathlib.Path("like.npz"), {"n/mean": np.zeros(3), "n/var": np.ones(3)})
    write(pathlib.Path("source.npz"), {name: np.array(value, float) for name, value in held.items()})
    with pytest.raises(ValueError, match=said):
        convert_file("source.npz", "target.npz", **options)
    assert not pathlib.Path("target.npz").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epsilon": "small"}, "epsilon must be finite and at least 0.*'small'"),
        ({"renorm": "no"}, "renorm must be True or False; received 'no'"),
        ({"rename": ["ab"]}, r"rename must be of pairs \(pattern, replacement\); received 'ab'"),
        ({"rename": [("a", "b", "c")]}, "rename must be of pairs"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named_and_nothing_is_written(
    options: dict[str, Any], said: str, tmp_path: pathlib.Path
) -> None:
    write(tmp_path / "source.npz", {"a/mean": np.zeros(3), "a/var": np.ones(3)})
    with pytest.raises(TypeError, match=said):
        convert_file(tmp_path / "source.npz", tmp_path / "target.npz", **options)
    assert not (tmp_path / "target.npz").exists()


@pytest.mark.parametrize(
    ("source", "target", "error", "said"),
    [
        ("none.npz", "b.npz", FileNotFoundError, "no file and no TensorFlow checkpoint at 'none.npz'"),
        ("a.npz", "./a.npz", ValueError, "target must differ from source"),
        ("a.txt", "b.npz", ValueError, r"a\.txt must be of one of these kinds: \.pt"),
        ("broken.pt", "b.npz", ValueError, r"broken\.pt cannot be read as a file of its kind"),
        ("nested.pt", "b.npz", ValueError, r"nested\.pt must hold a state dict, of tensors alone.*'model'"),
        ("empty.keras", "b.npz", ValueError, r"empty\.keras must be an archive with model\.weights\.h5"),
        ("one.weights.h5", "b.npz", ValueError, "'norm' must have 2, 4, 5 or 7 variables.*received 3"),
        ("a.npz", "b.keras", ValueError, r"into must be given for b\.keras"),
    ],
)
def test_files_that_cannot_be_read_or_written_are_named(
    source: str, target: str, error: type[Exception], said: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", moving_mean=np.zeros(1), moving_variance=np.zeros(1))
    pathlib.Path("a.txt").touch()
    pathlib.Path("broken.pt").write_text("no file of PyTorch")
    torch.save({"model": {"running_mean": torch.zeros(1)}}, "nested.pt")
    with zipfile.ZipFile("empty.keras", "w"):
        pass
    with h5py.File("one.weights.h5", "w") as file:
        for at in range(3):
            file[f"layers/batch_normalization/vars/{at}"] = np.zeros(2)
        file["layers/batch_normalization/vars"].attrs["name"] = "norm"
    with pytest.raises(error, match=said):
        convert_file(source, target)


def test_the_command_says_what_it_did_and_what_it_left(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.npz", {"a/mean": np.zeros(2), "a/var": np.ones(2), "dense/kernel": np.zeros(2)})

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "batchnorm", "convert", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )

    done = command("a.npz", "b.npz", "--to", "torch", "--rename", "^a$=norm")
    assert (done.returncode, done.stdout) == (0, "a -> norm\n1 other variables are not in b.npz\n"), done.stderr
    with np.load(tmp_path / "b.npz") as found:
        assert set(found) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    done = command("a.npz", "c.npz", "--rename", "norm")
    assert (done.returncode, (tmp_path / "c.npz").exists()) == (2, False)
    assert "--rename must be PATTERN=REPLACEMENT; received ['norm']" in done.stderr
    done = command("a.npz", "b.npz", "--renorm")
    assert done.returncode == 2
    assert done.stderr.startswith("batchnorm convert: 'a' in a.npz cannot be converted: epsilon must be given")
