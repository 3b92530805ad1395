"""Train a model by `fit` from the same beginning on each backend, and load what all of them have saved."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from batchnorm.keras import BatchNormalization, ClippingSchedule

SECONDS = 180
"""After which others have failed."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 2.0, "dmax": 0.5}, "renorm_momentum": 0.9},
    "schedule": {"renorm": True, "renorm_clipping": ClippingSchedule(2, rmax_end=8, dmax_end=6)},
    "virtual": {"virtual_batch_size": 5},
    "axes": {"axis": [1, 3]},
    "everything": {"renorm": True, "virtual_batch_size": 6, "skip_nonfinite": True, "center": False},
}


def model() -> Any:
    """A model with a layer of each kind, the same on every backend."""
    x = inputs = keras.Input((4, 4, 3))
    for name, options in OPTIONS.items():
        x = keras.layers.Conv2D(3, 3, padding="same", name=f"conv_{name}")(x)
        x = keras.layers.Activation("tanh")(BatchNormalization(momentum=0.8, name=name, **options)(x))
    made = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    for weight in made.trainable_weights:
        if weight.name == "kernel":
            weight.assign(rng.normal(0, 0.3, weight.shape))
    return made


def data() -> tuple[Any, Any]:
    """32 samples and a half, in batches of 16."""
    rng = np.random.default_rng(1)
    return rng.normal(1, 2, (40, 4, 4, 3)).astype("float32"), rng.normal(size=(40, 2)).astype("float32")


def main(folder: Path, *backends: str) -> None:
    """Train and save, then load what each backend has saved, and compare."""
    x, target = data()
    backend = keras.backend.backend()
    trained = model()
    trained.compile(keras.optimizers.SGD(0.01), "mse")
    trained.fit(x, target, batch_size=16, epochs=3, shuffle=False, verbose=0)
    trained.save(folder / f"{backend}.keras")
    trained.save_weights(folder / f"{backend}.weights.h5")
    reference = trained.get_weights()
    np.savez(folder / f"{backend}.part.npz", *reference, y=trained.predict(x, verbose=0))
    (folder / f"{backend}.part.npz").rename(folder / f"{backend}.npz")  # which says that all is there
    end = time.monotonic() + SECONDS
    for other in backends:
        while not (folder / f"{other}.npz").exists():
            assert time.monotonic() < end, f"{other} has saved nothing"
            time.sleep(0.1)
        loaded = keras.saving.load_model(folder / f"{other}.keras")
        written = dict(np.load(folder / f"{other}.npz"))
        expected = written.pop("y")
        for weight, value in zip(loaded.get_weights(), written.values(), strict=True):
            np.testing.assert_array_equal(weight, value)
        np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
        again = model()
        again.load_weights(folder / f"{other}.weights.h5")
        for weight, value in zip(again.get_weights(), written.values(), strict=True):
            np.testing.assert_array_equal(weight, value)
        for at, (value, own) in enumerate(zip(written.values(), reference, strict=True)):
            np.testing.assert_allclose(value, own, rtol=1e-3, atol=1e-4, err_msg=f"{other}, {at}")
    print(f"{backend} is right")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
