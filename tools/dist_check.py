"""Uses an installed trady without any extra: the library, the command line, a run and its model (make dist)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

MODULE = """
from torch import nn


def net(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )
"""


def trady(*words: str, code: int = 0) -> str:
    """Run a command; return what it says."""
    done = subprocess.run(["trady", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, f"trady {' '.join(words)}: {done.stderr}"
    return done.stdout + done.stderr


def main() -> None:
    """Use it."""
    import trady as library

    assert "site-packages" in library.__file__, library.__file__
    Path("nets.py").write_text(MODULE, encoding="utf-8")
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    images = rng.integers(0, 160, (96, 12, 12, 3))
    images[np.arange(96), :, :, labels] += 80
    np.savez("data.npz", x_train=images[:72].astype(np.uint8), y_train=labels[:72],
             x_test=images[72:].astype(np.uint8), y_test=labels[72:])  # fmt: skip

    assert library.__version__ in trady("--version")
    assert "finetune" in trady("--help")
    assert "efficientnet-lite0" in trady("models")
    assert "minimum budget" in trady("plan", "nets:net", "--image-size", "12")
    assert "accuracy" in trady(
        "finetune", "nets:net", "data.npz", "--image-size", "12", "--epochs", "2", "--out", "run"
    )
    assert "label" in trady("predict", "run", "data.npz", "--out", "labels.csv") + Path("labels.csv").read_text()
    Path("photos/a").mkdir(parents=True)
    Path("photos/b").mkdir()
    for name in ("photos/a/1.png", "photos/b/1.png"):
        Path(name).write_bytes(b"x")
    assert "trady[data]" in trady("finetune", "nets:net", "photos", "--image-size", "12", code=2)
    assert "trady[transformers]" in trady("finetune", "org/model", "data.npz", code=2)
    assert "trady[compare]" in trady("compare", "matrix.toml", code=2)

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    tuner = library.prepare(model, torch.randn(4, 8), budget="elements:200")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    tuner.resample(0)
    nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    tuner.finish()
    sys.stdout.write(f"trady {library.__version__} with torch {torch.__version__} alone: all of it works\n")


if __name__ == "__main__":
    main()
