"""What a policy wants measured before it draws, and what was measured: plain arrays, no autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import PolicyError

Floats = npt.NDArray[np.float64]

#: Measured values of one kind: layer name to one number a channel.
Values = Mapping[str, Floats]


@dataclass(frozen=True)
class Needs:
    """What a policy wants measured; the class attribute ``needs`` of a policy.

    Attributes:
        kinds: Names of measures (:mod:`trady.evidence.measures`): ``"gradients"``, ``"fisher"``, ``"weights"``.
        each_epoch: Whether it is measured again before every epoch, or only once, before the first.
    """

    kinds: tuple[str, ...] = ()
    each_epoch: bool = False

    def __post_init__(self) -> None:
        given: object = self.kinds
        if not isinstance(given, tuple) or not all(isinstance(kind, str) and kind for kind in given):
            raise PolicyError(f'needs kinds {self.kinds!r}; give a tuple of names such as ("gradients",)')

    def __bool__(self) -> bool:
        return bool(self.kinds)


#: The needs of a policy that declares none.
NOTHING = Needs()


def needs_of(policy: object) -> Needs:
    """What a policy wants measured.

    Raises:
        PolicyError: Its attribute ``needs`` is something else.

    """
    needs = getattr(policy, "needs", NOTHING)
    if not isinstance(needs, Needs):
        raise PolicyError(f"policy {getattr(policy, 'name', policy)!r} has needs {needs!r}; give trady.policies.Needs")
    return needs


@dataclass(frozen=True)
class Evidence(Mapping[str, Values]):
    """What was measured, by kind. It is immutable, and equal evidence makes equal draws.

    Attributes:
        kinds: Kind to layer to one float64 a channel, finite, ``[channels]``.
        carried: What the next measurement needs of this one: arrays of any shape under any name, for example a
            digest of the samples that were measured on. Policies do not read it.
        batches: Batches that were measured.
    """

    kinds: Mapping[str, Values] = field(default_factory=dict)
    carried: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    batches: int = 0

    def __post_init__(self) -> None:
        kinds = {kind: {n: _frozen(v, np.float64) for n, v in layers.items()} for kind, layers in self.kinds.items()}
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "carried", {name: _frozen(array) for name, array in self.carried.items()})

    @property
    def carried_bytes(self) -> int:
        """Bytes kept for the next measurement; they are not in tensors, and outside the budget."""
        return sum(array.nbytes for array in self.carried.values())

    def __getitem__(self, kind: str) -> Values:
        try:
            return self.kinds[kind]
        except KeyError:
            measured = ", ".join(self.kinds) or "nothing"
            raise PolicyError(
                f"{kind!r} was not measured, but {measured}; a policy names what it looks at: "
                f'needs = Needs(("{kind}",))'
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Evidence)
            and self.batches == other.batches
            and _flat(self).keys() == _flat(other).keys()
            and all(np.array_equal(array, _flat(other)[name]) for name, array in _flat(self).items())
        )

    def __hash__(self) -> int:
        return hash((self.batches, *_flat(self)))


def _flat(evidence: Evidence) -> dict[tuple[str, ...], npt.NDArray[Any]]:
    found: dict[tuple[str, ...], npt.NDArray[Any]] = {(name,): array for name, array in evidence.carried.items()}
    for kind, layers in evidence.kinds.items():
        found.update({(kind, name): array for name, array in layers.items()})
    return found


def _frozen(values: Any, dtype: Any = None) -> npt.NDArray[Any]:
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
