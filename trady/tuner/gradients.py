"""What happens to the gradients of selected channels: averaged over processes, looked at, used up, clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trady.analysis.model_analysis import ModelAnalysis
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.errors import StateError, TrainingError
from trady.interception.armed import Armed, Change
from trady.optim.clipping import AUTO, USUAL_RATIO, clip_channels_, ratio_for
from trady.optim.in_backward import UpdatesInBackward
from trady.process.ranks import processes
from trady.tuner.adoption import Optimizers
from trady.tuner.agreement import facts_of
from trady.tuner.draws import Draws
from trady.tuner.optimizer_state import rearranged
from trady.tuner.reduction import Reduction
from trady.tuner.snapshot import WeightSnapshot


class Arrivals:
    """Takes the gradient of a layer's channels when it has arrived, and is the mean over the processes.

    Args:
        armed: The armed model.
        draws: What trains; a ranking may be being learnt, from the norms of the channels' gradients.
        attached: The optimizers of now; those that update inside the backward pass get the gradient.
        head: Parameters of the head, by name.
        snapshot: Is told that weights may change from now on.

    Attributes:
        reduction: Averages over processes.
    """

    def __init__(
        self,
        armed: Armed,
        draws: Draws,
        attached: Optimizers,
        head: Mapping[str, nn.Parameter],
        snapshot: WeightSnapshot | None,
    ) -> None:
        self._attached, self._draws, self._snapshot = attached, draws, snapshot
        self._norms: dict[str, Tensor] = {}
        facts = partial(facts_of, draws, armed.model, attached)
        self.reduction = Reduction(armed, head, facts, self._updated_inside, self._averaged)
        attached.before.append(self.reduction.reduce)
        attached.at_end.append(self.reduction.end)
        armed.on_gradient.append(self)

    def __call__(self, layer: str, compact: nn.Parameter) -> None:
        """Take one in."""
        if compact.grad is None:
            return
        if self._snapshot is not None:
            self._snapshot.trained()
        if processes() > 1:
            self.reduction.arrived(layer)
        else:
            self._averaged(layer, compact)

    def _updated_inside(self) -> set[int]:
        """Identities of what optimizers update inside the backward pass."""
        inside = [each for each in self._attached() if isinstance(each, UpdatesInBackward)]
        return {id(p) for optimizer in inside for group in optimizer.param_groups for p in group["params"]}

    def _averaged(self, layer: str, compact: nn.Parameter) -> None:
        gradient = compact.grad
        if gradient is None:
            return
        if self._draws.online is not None:
            rows = gradient.detach().flatten(1)
            wide = torch.promote_types(rows.dtype, torch.float32)
            self._norms[layer] = torch.linalg.vector_norm(rows, dim=1, dtype=wide).square_()
        for optimizer in reversed(self._attached()):
            if isinstance(optimizer, UpdatesInBackward) and compact.grad is not None:
                optimizer.gradient_arrived(compact)

    def forget(self) -> None:
        """Drop the norms: the channels are others."""
        self._norms.clear()

    def take_norms(self) -> dict[str, Any]:
        """Hand over the squared norms ``[n]`` of the step, of every layer that had a gradient."""
        found = _on_host(self._norms) if self._norms else {}
        self._norms.clear()
        return found


def _on_host(norms: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy the norms of every layer to the host at once: an accelerator is waited for once, not layer by layer."""
    first = next(iter(norms.values()))
    together = torch.cat([values.to(first.device) for values in norms.values()]).cpu()
    parts = together.split([len(values) for values in norms.values()])
    return {name: part.numpy() for name, part in zip(norms, parts, strict=True)}


def keep_gradient(change: Change, gradient: Tensor | None) -> None:
    """Give the channels that stayed in a draw the gradient that they had; those that joined begin with none."""
    if gradient is None or not len(change.compact):
        return
    for dim, (sources, before) in enumerate(change.moves):
        if gradient.shape[dim] == before:
            gradient = rearranged(gradient, sources, dim, mean=False)
    change.compact.grad = gradient


def note_writes(optimizer: torch.optim.Optimizer, compact: Iterable[nn.Parameter]) -> None:
    """Count the step that an optimizer has made as a write: fused kernels write without saying so.

    Parameters without a gradient were not stepped; whoever wrote into their weight meanwhile is to keep that.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    early = isinstance(optimizer, UpdatesInBackward)  # its gradients are gone
    torch.autograd.graph.increment_version(
        [p for p in compact if id(p) in stepped and (early or p.grad is not None) and len(p)]
    )


def channel_limit(ratio: float | str | None, table: ChannelTable, selection: Selection) -> float | None:
    """Return the number that a ratio means while a selection trains.

    Raises:
        TrainingError: It is a word, and not :data:`trady.optim.clipping.AUTO`.

    """
    if not isinstance(ratio, str):
        return ratio
    if ratio != AUTO:
        raise TrainingError(f"the limit of a channel's gradient is {ratio!r}; give a number, {AUTO!r} or None")
    return ratio_for(table.weight_share(selection))


def clip_all(
    compact: Iterable[nn.Parameter],
    analysis: ModelAnalysis,
    selection: Selection,
    optimizers: Iterable[torch.optim.Optimizer],
    ratio: float | str | None,
    max_norm: float | None,
) -> float:
    """Clip channel by channel, and the head by its norm; see :meth:`trady.Tuner.clip_gradients`.

    Raises:
        StateError: An optimizer has clipped the channels with another ratio.

    """
    in_backward = [optimizer for optimizer in optimizers if isinstance(optimizer, UpdatesInBackward)]
    for optimizer in in_backward:
        if ratio is not None and not optimizer.clips_channels(ratio):
            number = USUAL_RATIO if isinstance(ratio, str) else ratio
            raise StateError(
                "the channels have been updated inside the backward pass: give the optimizer "
                f"channel_clip={number}, or call clip_gradients(ratio=None) to clip the head alone"
            )
    head = list(analysis.head_parameters.values())
    ratio = channel_limit(ratio, analysis.table, selection)
    waiting = [parameter for parameter in compact if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in (*waiting, *head) if p.grad is not None])
    if ratio is not None:
        clip_channels_(waiting, ratio)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(head, max_norm)
    return math.hypot(float(norm), *(used for optimizer in in_backward for used in optimizer.gradient_norms))
