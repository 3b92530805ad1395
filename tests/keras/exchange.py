"""Train a model by `fit` from the same beginning on each backend, and load what the others have saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from batchnorm.keras import BatchNormalization, ClippingSchedule

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


def main(command: str, folder: Path) -> None:
    """Save, or load and compare."""
    x, target = data()
    backend = keras.backend.backend()
    if command == "save":
        trained = model()
        trained.compile(keras.optimizers.SGD(0.01), "mse")
        trained.fit(x, target, batch_size=16, epochs=3, shuffle=False, verbose=0)
        trained.save(folder / f"{backend}.keras")
        trained.save_weights(folder / f"{backend}.weights.h5")
        np.savez(folder / f"{backend}.npz", *trained.get_weights(), y=trained.predict(x, verbose=0))
        return
    for path in sorted(folder.glob("*.keras")):
        loaded = keras.saving.load_model(path)
        written = dict(np.load(path.with_suffix(".npz")))
        expected = written.pop("y")
        for weight, value in zip(loaded.get_weights(), written.values(), strict=True):
            np.testing.assert_array_equal(weight, value)
        np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
        again = model()
        again.load_weights(folder / f"{path.stem}.weights.h5")
        for weight, value in zip(again.get_weights(), written.values(), strict=True):
            np.testing.assert_array_equal(weight, value)
        reference = dict(np.load(folder / f"{backend}.npz"))
        for name, value in written.items():
            np.testing.assert_allclose(value, reference[name], rtol=1e-3, atol=1e-4, err_msg=f"{path.stem}, {name}")
    print(f"{backend} is right")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
