"""What the processes of one training must have in common, said by each in a few words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from trady.interception.layer import as_whole_numbers
from trady.model.parameters import own_parameters
from trady.ops.quantized import is_quantized
from trady.ranking.ranking import structure_digest
from trady.records.version import __version__
from trady.tuner.draws import Draws


def facts_of(
    draws: Draws, model: nn.Module, attached: Callable[[], Sequence[torch.optim.Optimizer]], weights: bool
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return what draws and updates depend on, by name, causes before their effects; and what may differ.

    Args:
        draws: What trains.
        model: The armed model.
        attached: The optimizers of now.
        weights: Whether to look at the weights too: they are the same from the first step on, or never.
    """
    decision, planned = draws.planned, draws.planned.loop.planned
    facts = {
        "the version of trady": __version__,
        "the version of torch": torch.__version__,
        "the version of numpy": np.__version__,
        **_version_of_its_package(model),
        "the model's structure": f"{type(model).__name__} {structure_digest(decision.table)}",
        "policy": f"{decision.policy.name} {decision.options}".strip(),
        "seed": str(decision.seed),
        "budget": str(decision.budget),
        "recompute": decision.recompute,
        "fidelity": decision.fidelity,
        "micro_batch": str(decision.micro_batch),
        "over_budget": decision.over_budget,
        "head": ", ".join(decision.analysis.head) or "none",
        "frozen by hand": ", ".join(sorted(decision.analysis.held)) or "nothing",
        "autocast": str(planned.autocast),
        "the optimizer": ", ".join(type(optimizer).__name__ for optimizer in attached()) or "none",
        "what the optimizer keeps": str(draws.moment.optimizer.state()),
        "the pool": ", ".join(draws.moment.pool),
        "the draw": f"{draws.count + 1} of epoch {draws.epoch}",
        "the selection": draws.selection.digest,
    }
    if weights:
        facts["a sum over the weights"] = str(_sum_of_weights(model))
    return facts, {"the example that was planned for": str(planned.calls)}


def _version_of_its_package(model: nn.Module) -> Mapping[str, str]:
    """The version of the package that the model is written in: another one may compute something else."""
    package = type(model).__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    return {} if version is None or package == "torch" else {f"the version of {package}": str(version)}


def _sum_of_weights(model: nn.Module) -> int:
    """Sum up the bits of all weights; what is stored quantised or has no memory is left out."""
    total = 0
    for place, parameter in enumerate(own_parameters(model)):
        values = parameter.detach()
        if is_quantized(parameter) or values.is_meta or values.is_complex() or not values.numel():
            continue
        total += (place + 1) * int(as_whole_numbers(values).sum(dtype=torch.int64))
    return total
