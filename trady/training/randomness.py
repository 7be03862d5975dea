"""Random numbers that depend on seed and epoch only, and leave the caller's generators untouched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from trady.training.data.datasets import epoch_seed


@contextmanager
def own_randomness() -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one models use
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_epoch(seed: int, epoch: int, process: int = 0) -> None:
    """Seed all generators for an epoch, so that a resumed run draws what the unbroken one did."""
    value = epoch_seed(seed, epoch, f"process {process}")
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the one models and transforms use
    torch.manual_seed(value)
