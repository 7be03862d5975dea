"""What a tuner has measured for its policy, what for, and how that goes through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trady.channels.table import ChannelTable
from trady.errors import CheckpointError, StateError
from trady.evidence.measures import MeasureContext, gather_evidence
from trady.evidence.sweeps import Sweeper
from trady.interception.armed import Armed
from trady.model.batch import Batch, Loss
from trady.policies.evidence import Evidence, Needs
from trady.records.tensors import LazyTensors, Outline
from trady.tuner.snapshot import WeightSnapshot

#: Tensors of a state that hold evidence begin with it; no parameter of a model can.
PREFIX = "@evidence/"

_KINDS, _CARRIED = "kinds", "carried"

#: And those of them that hold the weights as they were when it was measured (:mod:`trady.tuner.snapshot`).
EARLIER = PREFIX + "earlier/"


class EvidenceState:
    """The evidence of a run and the epoch that was drawn from it.

    Args:
        policy: Name of the policy, for messages.
        needs: What it wants measured.

    Attributes:
        evidence: What was measured; ``None`` before.
        epoch: The epoch drawn from it; ``None`` while it is fresh.
    """

    def __init__(self, policy: str, needs: Needs) -> None:
        self.policy, self.needs = policy, needs
        self.evidence: Evidence | None = None
        self.epoch: int | None = None

    @property
    def due(self) -> bool:
        """Whether something has to be measured before the next epoch is drawn."""
        if not self.needs:
            return False
        return self.evidence is None or (self.needs.each_epoch and self.epoch is not None)

    @property
    def wanted(self) -> bool:
        """Whether measuring again would change anything."""
        return bool(self.needs) and (self.evidence is None or self.needs.each_epoch)

    def gather(
        self,
        armed: Armed,
        sweeper: Callable[[int], Sweeper],
        batches: Iterable[Any],
        loss: Loss | None,
        snapshot: WeightSnapshot | None,
        room: Callable[[Batch], float],
    ) -> Evidence:
        """Measure, and from now on compare with the weights of now; see :meth:`trady.Tuner.observe`."""
        earlier = nullcontext if snapshot is None else snapshot.restored
        context = MeasureContext(armed, sweeper, batches, loss, self.evidence, earlier, room)
        self.evidence, self.epoch = gather_evidence(self.needs, context), None
        if snapshot is not None:
            snapshot.begin()
        return self.evidence

    def check_present(self, wish: str) -> None:
        """Refuse to go on without evidence.

        Raises:
            StateError: It says what to call.

        """
        if self.needs and self.evidence is None:
            raise nothing_measured(self.policy, self.needs, wish)

    def draw_for(self, epoch: int) -> None:
        """Take the evidence for an epoch.

        Raises:
            StateError: There is none, or it was for another epoch.

        """
        self.check_present(f"draw epoch {epoch}")
        if self.needs.each_epoch and self.epoch not in (None, epoch):
            raise StateError(
                f"policy {self.policy!r} draws each epoch from {_listed(self.needs)} measured before it, and these "
                f"were measured for epoch {self.epoch}; call tuner.observe(batches, loss) before "
                f"tuner.resample({epoch})"
            )
        self.epoch = epoch

    def tensors(self) -> LazyTensors:
        """The evidence as tensors, under names that no parameter has; each is copied when it is asked for."""
        if self.evidence is None:
            return LazyTensors({})
        found = {f"{_CARRIED}/{name}": array for name, array in self.evidence.carried.items()}
        for kind, layers in self.evidence.items():
            found.update({f"{_KINDS}/{kind}/{name}": array for name, array in layers.items()})
        return LazyTensors({PREFIX + name: _outline(np.asarray(array)) for name, array in found.items()})

    def meta(self) -> dict[str, Any] | None:
        """What :meth:`load` needs beside the tensors, as JSON values."""
        if self.evidence is None:
            return None
        return {"kinds": list(self.evidence), "batches": self.evidence.batches, "epoch": self.epoch}

    def read(self, meta: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> tuple[Evidence | None, int | None]:
        """Read what :meth:`meta` and :meth:`tensors` gave.

        Raises:
            CheckpointError: It is damaged, or of a policy that measures something else.

        """
        if meta is None:
            return None, None
        if tuple(meta["kinds"]) != self.needs.kinds:
            raise CheckpointError(
                f"the checkpoint has measured {', '.join(meta['kinds'])}, and policy {self.policy!r} draws from "
                f"{_listed(self.needs)}; start a new run for it"
            )
        values: dict[str, dict[str, Any]] = {kind: {} for kind in self.needs.kinds}
        carried = {}
        for key, tensor in tensors.items():
            if not key.startswith(PREFIX) or key.startswith(EARLIER):
                continue
            part, _, rest = key.removeprefix(PREFIX).partition("/")
            if tensor.is_complex():
                raise CheckpointError(f"the checkpoint is damaged: {key!r} is {tensor.dtype}")
            if part == _CARRIED:
                carried[rest] = tensor.numpy()
            else:
                kind, _, name = rest.partition("/")
                if kind not in values:
                    raise CheckpointError(f"the checkpoint is damaged: it has measured {kind!r}")
                values[kind][name] = tensor.numpy()
        epoch = meta["epoch"]
        return Evidence(values, carried, int(meta["batches"])), None if epoch is None else int(epoch)


def _outline(array: NDArray[Any]) -> Outline:
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return Outline(array.shape, kind, lambda: torch.from_numpy(np.array(array)))


def nothing_measured(policy: str, needs: Needs, wish: str) -> StateError:
    """The error for a wish that a policy cannot fulfil before it has measured."""
    return StateError(
        f"cannot {wish}: policy {policy!r} draws from measured {_listed(needs)}, and nothing was measured yet; call "
        "tuner.observe(batches, loss) first"
    )


def check_layers(evidence: Evidence, table: ChannelTable) -> None:
    """Refuse evidence that lacks a layer.

    Raises:
        CheckpointError: It names the layer.

    """
    for kind, layers in evidence.items():
        for name in table.names:
            if name not in layers or layers[name].ndim != 1:
                raise CheckpointError(f"the checkpoint is damaged: it lacks measured {kind} of {name}")


def _listed(needs: Needs) -> str:
    return " and ".join(needs.kinds)
