"""Decisions that a model takes at random (layerdrop, stochastic depth), fixed while it is traced.

A model that leaves layers out asks a random generator: ``torch.rand(()) < p``, ``random.random() < p``,
``np.random.uniform() < p``, or the same the other way round. Tables and plans are to be those of the pass in which all
runs, whatever the seed. So the generators are set to a state whose next numbers are all close to one (or to zero). All
of them are Mersenne twisters, whose next words can be written down: no function is replaced, and it does not matter how
the model has come by its generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trady.model.python_state import generators_of
from trady.model.untouched import unseen

_WORDS = 624

#: So many words say what was decided; those behind are random, so that nobody who rejects numbers waits forever.
_DECIDED = 600

#: The bits that make a number close to one or to zero, in float32 (24 bits) and float64; those below are random.
_UPPER = 0xFFFFF000


@dataclass(frozen=True)
class Draws:
    """What random numbers are while a model is traced.

    Attributes:
        high: Whether they are close to one; else close to zero.
        flipped: The 32-bit words that are the other way round, counted from 0 in each generator.
    """

    high: bool = True
    flipped: frozenset[int] = frozenset()

    def arm(self, roots: Iterable[Any]) -> Watch:
        """Set all random generators; call it inside of :func:`trady.model.untouched.untouched`.

        Args:
            roots: Modules and batches whose own generators are set too.

        """
        words, roots = _state(self), list(roots)
        with unseen():
            _with_twisters(roots)
            generators = [_PYTHON, _NUMPY, _TORCH, *filter(None, map(_of_own, generators_of(roots)))]
            for generator in generators:
                generator.arm(words)
            return Watch(generators)


def _with_twisters(roots: Iterable[Any]) -> None:
    """Give modules a generator whose numbers can be chosen in the place of one of another kind (``default_rng``)."""
    for module in (module for root in roots if isinstance(root, nn.Module) for module in root.modules()):
        for name, held in vars(module).items():
            if isinstance(held, np.random.Generator) and not isinstance(held.bit_generator, np.random.MT19937):
                vars(module)[name] = np.random.Generator(np.random.MT19937(0))


class Watch:
    """Tells whether numbers were drawn from generators that :meth:`Draws.arm` has set."""

    def __init__(self, generators: list[_Generator]) -> None:
        self._generators = [(generator, generator.place()) for generator in generators]
        self._host = [pair for pair in self._generators if not pair[0].of_torch]
        self._last = self._places()

    def _places(self) -> list[int]:
        return [generator.place() for generator, _ in self._host]

    def moved(self) -> bool:
        """Whether Python's or NumPy's generators have moved since :meth:`note`; those of PyTorch make tensors."""
        return self._places() != self._last

    def note(self) -> None:
        """Remember where they are."""
        self._last = self._places()

    def words(self) -> int:
        """The most words that one of them has given since it was set."""
        with unseen():
            return max(generator.place() - start for generator, start in self._generators)

    def host_words(self) -> int:
        """The same of Python's and NumPy's."""
        return max(generator.place() - start for generator, start in self._host)


@dataclass(frozen=True)
class _Generator:
    """How one generator is set and read; ``place`` counts the words that it has given, up to 624."""

    arm: Callable[[list[int]], None]
    place: Callable[[], int]
    of_torch: bool = False


def _python(generator: Any) -> _Generator:
    def arm(words: list[int]) -> None:
        generator.setstate((3, (*words, 0), None))

    return _Generator(arm, lambda: int(generator.getstate()[1][-1]))


def _numpy(generator: Any) -> _Generator:
    def arm(words: list[int]) -> None:
        generator.set_state(("MT19937", np.array(words, dtype=np.uint32), 0))

    return _Generator(arm, lambda: int(generator.get_state(legacy=False)["state"]["pos"]))


def _numpy_of_new_kind(generator: np.random.Generator) -> _Generator:
    def arm(words: list[int]) -> None:
        key = np.array(words, dtype=np.uint32)
        generator.bit_generator.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 0}}

    return _Generator(arm, lambda: int(generator.bit_generator.state["state"]["pos"]))


#: Where PyTorch's state of a generator on the CPU has what (``CPUGeneratorImplStateLegacy``), in bytes.
_LEFT, _NEXT, _STATE = 8, 16, 24


def _torch(generator: torch.Generator) -> _Generator:
    def arm(words: list[int]) -> None:
        state = generator.manual_seed(0).get_state().numpy()
        state[_LEFT : _LEFT + 4] = np.frombuffer(np.int32(_WORDS).tobytes(), dtype=np.uint8)
        state[_NEXT : _NEXT + 8] = np.frombuffer(np.uint64(1).tobytes(), dtype=np.uint8)
        ordered = np.array([words[-1], *words[:-1]], dtype=np.uint64)  # the first that is given is the second
        state[_STATE : _STATE + 8 * _WORDS] = np.frombuffer(ordered.tobytes(), dtype=np.uint8)
        generator.set_state(torch.from_numpy(state))

    def place() -> int:
        state = generator.get_state().numpy()
        return int(state[_NEXT : _NEXT + 8].view(np.uint64)[0])

    return _Generator(arm, place, of_torch=True)


_PYTHON = _python(random)
_NUMPY = _numpy(np.random)
_TORCH = _torch(torch.default_generator)


def _of_own(generator: Any) -> _Generator | None:
    """How a generator that a model holds is set; ``None`` where its numbers cannot be chosen."""
    if isinstance(generator, random.Random):
        return _python(generator)
    if isinstance(generator, torch.Generator):
        return _torch(generator) if generator.device.type == "cpu" else None
    if isinstance(generator, np.random.RandomState) and generator.get_state(legacy=False)["bit_generator"] == "MT19937":
        return _numpy(generator)
    if isinstance(generator, np.random.Generator) and isinstance(generator.bit_generator, np.random.MT19937):
        return _numpy_of_new_kind(generator)
    return None


def _state(draws: Draws) -> list[int]:
    """The state of a Mersenne twister that gives these words next."""
    noise = np.random.Generator(np.random.MT19937(0)).integers(0, 2**32, _WORDS, dtype=np.uint32).tolist()
    words = []
    for index, word in enumerate(noise):
        high = draws.high != (index in draws.flipped)
        decided = (word & ~_UPPER) | (_UPPER if high else 0)
        words.append(_untempered((decided if index < _DECIDED else word) & 0xFFFFFFFF))
    return words


def _untempered(y: int) -> int:
    """Invert the tempering of MT19937 (Matsumoto and Nishimura, 1998)."""
    y ^= y >> 18
    y ^= (y << 15) & 0xEFC60000
    x = y
    for _ in range(4):
        x = y ^ ((x << 7) & 0x9D2C5680)
    y = x & 0xFFFFFFFF
    x = y
    for _ in range(2):
        x = y ^ (x >> 11)
    return x & 0xFFFFFFFF
