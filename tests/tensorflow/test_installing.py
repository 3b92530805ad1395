"""The layer is back in `tf.compat.v1.layers`, for a while or for good, and scripts run as they are."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import tensorflow as tf
import tensorflow.compat.v1 as imported

import batchnorm.tensorflow
from batchnorm.tensorflow import BatchNormalization, batch_normalization, install

MODULES = [tf.compat.v1.layers, imported.layers]


def test_a_default_tensorflow_has_no_such_layer() -> None:
    for module in MODULES:
        with pytest.raises(AttributeError, match="Keras 3"):
            module.BatchNormalization  # noqa: B018


def test_installing_holds_within_the_context_and_nests() -> None:
    with install():
        for module in MODULES:
            assert module.BatchNormalization is BatchNormalization
            assert module.batch_normalization is batch_normalization
        with install():
            pass
        assert imported.layers.BatchNormalization is BatchNormalization
    for module in MODULES:
        assert "BatchNormalization" not in vars(module)


def test_the_modules_that_old_code_imports_from_have_it_too() -> None:
    homes = ("tensorflow.compat.v1.layers", "tensorflow.python.layers.normalization")
    before = [dict(vars(importlib.import_module(home))) for home in homes]
    with install():
        for home in homes:
            module = importlib.import_module(home)
            assert module.BatchNormalization is BatchNormalization
            assert module.batch_normalization is batch_normalization
        assert module.BatchNorm is batchnorm.tensorflow.BatchNorm is BatchNormalization
        assert module.batch_norm is batchnorm.tensorflow.batch_norm is batch_normalization
        assert isinstance(tf.compat.v1.layers, type(MODULES[0]))  # importing has not taken its place
    for home, names in zip(homes, before, strict=True):
        assert set(vars(importlib.import_module(home))) - set(names) <= {"normalization"}


def test_installing_says_what_fused_is_where_it_is_not_given() -> None:
    with install(fused=True):
        assert BatchNormalization().fused is True
        assert BatchNormalization(fused=False).fused is False
        with install():
            assert BatchNormalization().fused is None
        assert BatchNormalization().fused is True
    assert BatchNormalization().fused is None
    with pytest.raises(TypeError, match=r"fused.*'yes'"):
        install(fused="yes")  # type: ignore[arg-type]


LEGACY = """
import importlib, os
import tensorflow as tf
from batchnorm.tensorflow import BatchNormalization, batch_normalization, install

def touch(what):
    if what == "another layer":
        assert tf.compat.v1.layers.conv2d and tf.compat.v1.layers.dense
    elif what == "the layer itself":
        assert tf.compat.v1.layers.batch_normalization
        assert importlib.import_module("tensorflow.compat.v1").layers.BatchNormalization
    elif what == "a name of a module":
        from tensorflow.compat.v1.layers import conv2d
    elif what == "Keras":
        import tf_keras
        assert tf.keras.layers.Dense is tf_keras.layers.Dense and tf.compat.v1.keras.layers.Dense
    elif what == "TensorFlow's own modules":
        from tensorflow.python.layers import normalization

def found():
    from tensorflow.compat import v1
    from tensorflow.compat.v1.layers import BatchNormalization as imported
    modules = [tf.compat.v1.layers, v1.layers, importlib.import_module("tensorflow.compat.v1").layers]
    modules.append(importlib.import_module("tensorflow.compat.v1.layers"))
    return {imported, *(module.BatchNormalization for module in modules)}, {
        module.batch_normalization for module in modules}

touches = ["another layer", "the layer itself", "a name of a module", "Keras", "TensorFlow's own modules"]

def check(first):
    if first:
        touch(first)
    with install():
        for what in touches:
            touch(what)
            assert found() == ({BatchNormalization}, {batch_normalization}), (what, found())
        from tensorflow.python.layers import normalization  # whose own names no tf_keras of a package index has
        assert normalization.BatchNorm is BatchNormalization and normalization.batch_norm is batch_normalization
    original = importlib.import_module("tf_keras.src.legacy_tf_layers.normalization")
    assert found() == ({original.BatchNormalization}, {original.batch_normalization}), found()
    install()
    assert tf.compat.v1.layers.conv2d and tf.compat.v1.layers.BatchNormalization is BatchNormalization

for first in ["", *touches]:  # each in a process that has touched nothing
    child = os.fork()
    if not child:
        check(first)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.slow
def test_under_legacy_keras_installing_holds_whatever_is_touched_first() -> None:
    environment = os.environ | {"TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEGACY], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def run(*arguments: str, directory: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batchnorm", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=directory, env=os.environ | environment, check=False
    )


SCRIPT = """
import sys
import numpy as np
import tensorflow.compat.v1 as tf
import helper

tf.disable_v2_behavior()
x = tf.placeholder(tf.float32, [None, 3])
training = tf.placeholder(tf.bool, [])
y = tf.layers.batch_normalization(x, training=training, renorm=True, virtual_batch_size=2)
layer = tf.layers.BatchNormalization(momentum=0.5)
z = layer.apply(x, training=training)
with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    session.run([y, z, tf.get_collection(tf.GraphKeys.UPDATE_OPS)], {x: np.eye(4, 3) * 8, training: True})
    print("RESULT", __name__, sys.argv[1:], helper.VALUE, session.run(layer.moving_mean).tolist())
sys.exit(3)
"""


@pytest.mark.slow
def test_run_runs_an_unmodified_script_with_its_arguments_directory_and_exit_status(tmp_path: pathlib.Path) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text(textwrap.dedent(SCRIPT))
    (scripts / "helper.py").write_text("VALUE = 42\n")
    done = run("run", "scripts/train.py", "--rate", "0.1", "-v", directory=tmp_path)
    assert "RESULT __main__ ['--rate', '0.1', '-v'] 42 [1.0, 1.0, 1.0]" in done.stdout, done.stderr[-2000:]
    assert done.returncode == 3


@pytest.mark.slow
def test_run_installs_as_its_option_says(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train.py").write_text("import batchnorm.tensorflow as b; print(b.BatchNormalization().fused)\n")
    done = run("run", "--fused", "train.py", directory=tmp_path)
    assert done.stdout == "True\n", done.stderr


MISSING = [
    ("tf.layers.conv2d", True),
    ("tf.nn.rnn_cell.LSTMCell", True),
    ("from tensorflow.compat.v1.layers import dense", True),
    ("tf.contrib.layers", False),
    ("import tensorflow.contrib", False),
    ("tf.estimator.Estimator", False),
]


# As without tf_keras: it is not found.
HIDDEN = """
import contextlib, importlib.util, io, json, sys, traceback
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tf_keras" else find_spec(name, *rest)
from batchnorm.cli import main
for script in sys.argv[1:]:
    said = ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            main(["run", script])
        except (AttributeError, ImportError) as error:
            said = "".join(traceback.format_exception(error))
    print(json.dumps([printed.getvalue(), said]))
"""


@pytest.mark.slow
def test_run_says_what_to_do_about_what_is_missing(tmp_path: pathlib.Path) -> None:
    scripts = [f"train_{index}.py" for index in range(len(MISSING))]
    for script, (line, _) in zip(scripts, MISSING, strict=True):
        (tmp_path / script).write_text(f"import tensorflow.compat.v1 as tf\nprint('reached')\n{line}\n")
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, *scripts],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for script, (line, returns), found in zip(scripts, MISSING, done.stdout.splitlines(), strict=True):
        printed, said = json.loads(found)
        assert printed == "reached\n", line
        assert f'{script}", line 3' in said, line
        last = said.strip().splitlines()[-1]
        assert last.startswith("batchnorm run: "), line
        assert ("batchnorm[tensorflow1]" in last) == returns, line


@pytest.mark.slow
def test_installing_without_a_context_stays_for_good(tmp_path: pathlib.Path) -> None:
    code = (
        "import gc, batchnorm.tensorflow; batchnorm.tensorflow.install(); gc.collect()\n"
        "import tensorflow as tf, tensorflow.compat.v1 as v1\n"
        "assert tf.compat.v1.layers.BatchNormalization is v1.layers.BatchNormalization\n"
        "assert v1.layers.batch_normalization is batchnorm.tensorflow.batch_normalization\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


def test_run_says_what_is_wrong(tmp_path: pathlib.Path) -> None:
    done = run("run", "missing.py", directory=tmp_path)
    assert done.returncode == 2
    assert "missing.py" in done.stderr
    done = run("run", directory=tmp_path)
    assert done.returncode == 2
    assert "SCRIPT" in done.stderr
    done = run("run", "-m", "missing.module", directory=tmp_path)
    assert done.returncode == 2
    assert "no module 'missing.module'" in done.stderr


def test_the_version_is_told(tmp_path: pathlib.Path) -> None:
    import batchnorm

    assert run("--version", directory=tmp_path).stdout.strip() == f"batchnorm {batchnorm.__version__}"
