"""Random numbers that depend on seed and epoch only, and leave the caller's generators untouched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from trady.errors import CheckpointError
from trady.training.data.datasets import epoch_seed
from trady.training.state import State

#: Numbers in the state of the Mersenne Twister.
_NUMPY_NUMBERS = 624


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


@contextmanager
def reading_randomness(seed: int, epoch: int, number: int, process: int = 0) -> Iterator[None]:
    """Random numbers for the reading of a batch: a function of where it stands, whatever the model has drawn since.

    A loader may read ahead of the model, and a resumed run reads ahead from elsewhere. Generators of devices are left
    alone.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one transforms use
    generator = torch.default_generator
    before = generator.get_state()
    value = epoch_seed(seed, epoch, f"reading {number}, process {process}")
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        generator.set_state(before)


def random_state() -> State:
    """Return the generators of Python, NumPy, torch and its CUDA devices as they are now."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.default_generator.get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors.update({f"cuda/{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())})
    meta = {"python": [version, gauss], "numpy": [str(name), int(position), int(has_gauss), float(cached)]}
    return State(tensors, meta)


def set_random_state(state: State) -> None:
    """Go on with the random numbers of :func:`random_state`.

    Raises:
        CheckpointError: The state is damaged.
    """
    tensors, meta = state.tensors, state.meta
    try:
        version, gauss = meta["python"]
        random.setstate((version, tuple(tensors["python"].tolist()), gauss))
        name, position, has_gauss, cached = meta["numpy"]
        if not 0 <= position <= _NUMPY_NUMBERS:  # NumPy would read beyond its numbers
            raise ValueError(f"position {position} of {_NUMPY_NUMBERS}")
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002
        torch.default_generator.set_state(tensors["torch"].clone())
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                if (device := tensors.get(f"cuda/{index}")) is not None:
                    torch.cuda.set_rng_state(device, index)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint's random numbers are damaged ({error}); start the run again with --overwrite"
        ) from error


def seed_epoch(seed: int, epoch: int, process: int = 0) -> None:
    """Seed all generators for an epoch, so that a resumed run draws what the unbroken one did."""
    value = epoch_seed(seed, epoch, f"process {process}")
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the one models and transforms use
    torch.manual_seed(value)
