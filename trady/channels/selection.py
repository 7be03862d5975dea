"""Which channels train: input channels by layer, and in some layers only some output channels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import ModelError

Channels = npt.NDArray[np.int64]

_NONE: Channels = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Selection(Mapping[str, Channels]):
    """The input channels that train now: layer name to sorted channel indices.

    Layers without a selected channel are absent. Two selections are equal when they hold
    the same channels; ``digest`` names a selection in logs.

    Attributes:
        channels: Input channels by layer.
        outputs: In these layers only these output channels train, ``W[outputs][:, channels]``; in the others all
            do. That saves weight gradients only: the full feature map of an input channel is kept, however few
            output channels read it. Not for grouped convolutions (:func:`by_output`).
    """

    channels: Mapping[str, Channels] = field(default_factory=dict)
    outputs: Mapping[str, Channels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outputs = _clean(self.outputs)
        nothing = self.outputs.keys() - outputs.keys()
        channels = {name: indices for name, indices in _clean(self.channels).items() if name not in nothing}
        if strangers := outputs.keys() - channels.keys():
            raise ModelError(
                f"output channels of {', '.join(sorted(strangers))} are selected, and no input channels: "
                "trady.by_output(table, outputs) selects all that the output channels read"
            )
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "outputs", outputs)

    def __getitem__(self, name: str) -> Channels:
        return self.channels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __or__(self, other: Selection) -> Selection:
        """The union: in each layer the input channels of either, and the output channels of either."""
        channels = {n: _union(self.channels, other.channels, n) for n in {**self.channels, **other.channels}}
        outputs = {
            name: _union(self.outputs, other.outputs, name)
            for name in {**self.outputs, **other.outputs}
            if all(name in one.outputs for one in (self, other) if name in one.channels)
        }
        return Selection(channels, outputs)

    @property
    def count(self) -> int:
        """Number of selected input channels."""
        return sum(len(indices) for indices in self.channels.values())

    def renamed(self, names: Mapping[str, str]) -> Selection:
        """The same channels under other names; layers without a new name are left out."""
        return Selection(
            {names[name]: indices for name, indices in self.channels.items() if name in names},
            {names[name]: indices for name, indices in self.outputs.items() if name in names},
        )

    def output_count(self, name: str) -> int | None:
        """Number of output channels of a layer that train; ``None`` for all."""
        return len(self.outputs[name]) if name in self.outputs else None

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that depend on nothing but the selected channels."""
        digest = hashlib.sha256()
        for name, indices in self.channels.items():
            digest.update(name.encode() + b"\0" + indices.astype("<i8").tobytes())
        for name, indices in self.outputs.items():
            digest.update(name.encode() + b"\0outputs\0" + indices.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for checkpoints; for a layer with chosen output channels a mapping of two lists."""
        return {
            name: {"channels": indices.tolist(), "outputs": self.outputs[name].tolist()}
            if name in self.outputs
            else indices.tolist()
            for name, indices in self.channels.items()
        }

    @classmethod
    def from_json(cls, data: Any) -> Selection:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: It is something else.

        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a selection is a mapping, not {type(data).__name__}")
        chosen = {name: entry for name, entry in data.items() if isinstance(entry, Mapping)}
        if any(set(entry) != {"channels", "outputs"} for entry in chosen.values()):
            raise ValueError("a layer of a selection has channels and outputs, and nothing else")
        return cls(
            {name: entry["channels"] if name in chosen else entry for name, entry in data.items()},
            {name: entry["outputs"] for name, entry in chosen.items()},
        )


def _clean(given: Mapping[str, Any]) -> dict[str, Channels]:
    clean = {name: np.unique(channel_indices(name, indices)) for name, indices in sorted(given.items()) if len(indices)}
    for indices in clean.values():
        indices.setflags(write=False)
    return clean


def _union(left: Mapping[str, Channels], right: Mapping[str, Channels], name: str) -> Channels:
    return np.union1d(left.get(name, _NONE), right.get(name, _NONE))


def channel_indices(name: str, indices: Any) -> Channels:
    """Read channel indices.

    Raises:
        ModelError: They are not a list of integers.

    """
    given = np.asarray(indices)
    if given.dtype.kind not in "iu" or given.ndim != 1:
        raise ModelError(
            f"channels of {name!r} must be a list of channel indices, not {given.ndim}-dimensional {given.dtype}; "
            "np.flatnonzero turns a mask into indices"
        )
    return given.astype(np.int64)
