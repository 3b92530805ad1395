"""The layer is back in `tf.compat.v1.layers`, for a while or for good, and scripts run as they are."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap

import pytest
import tensorflow as tf
import tensorflow.compat.v1 as imported

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


def run(*arguments: str, directory: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batchnorm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, check=False)


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


def test_the_version_is_told(tmp_path: pathlib.Path) -> None:
    import batchnorm

    assert run("--version", directory=tmp_path).stdout.strip() == f"batchnorm {batchnorm.__version__}"
