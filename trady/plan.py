"""The plan: what a budget buys in a model, before anything trains."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from trady.budget import Budget
from trady.channels.cost import Cost, Sparsity
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable, FrozenLayer, Layer
from trady.errors import CheckpointError
from trady.records.files import write_json

FORMAT, VERSION = "trady-plan", 1


@dataclass(frozen=True)
class Plan:
    """What will be trained, at what cost.

    Attributes:
        model: Name of the model's class.
        budget: What may be spent; ``None`` is no limit.
        policy: Name of the policy.
        seed: Seed of the draws.
        table: Every layer, with the cost of a channel.
        pool: Names of the layers that channels are drawn from.
        ranking: Where the pool comes from: ``measured``, ``given``, ``prior``, ``online`` (found in the
            first epoch; until then all layers are in the pool), ``structural`` (guessed from shapes) or
            ``none`` (the policy needs none).
        measured_on: What the ranking was measured on, as far as it says.
        head: Modules that always train, outside the budget.
        head_parameters: Elements of the head's parameters.
        selection: The draw of epoch 0.
        cost: What that draw takes.
        sparsity: What a training leaves out, over the draws of its epochs; ``None`` is that draw alone.
        predicted_peak_bytes: Peak of a training step, weights included; ``None`` where it was not measured.
        least_peak_bytes: The same with one channel a layer.
        recomputed: Modules whose calls the backward pass computes anew instead of keeping what they need.
        recomputable: How many stretches could be computed anew.
        recomputed_share: Multiply-adds executed a second time, over those of a forward pass, at most.
        fidelity: How exactly smooth activations that are kept are differentiated.
        predicted_parts: What the predicted peak is made of, in bytes, named as in the ledger.
        micro_batch: Samples that the model works on at once; ``None`` is the whole batch.
        needs: What the policy wants measured, by kind.
        needs_each_epoch: Whether it is measured before every epoch, or once.
        observed: Whether it was; if not, ``selection`` stands in for the first draw, and costs about the same.
    """

    model: str
    budget: Budget | None
    policy: str
    seed: int
    table: ChannelTable
    pool: tuple[str, ...]
    ranking: str
    head: tuple[str, ...]
    head_parameters: int
    selection: Selection
    cost: Cost
    predicted_peak_bytes: int | None = None
    least_peak_bytes: int | None = None
    recomputed: tuple[str, ...] = ()
    recomputable: int = 0
    recomputed_share: float = 0.0
    fidelity: str = "exact"
    sparsity: Sparsity | None = None
    predicted_parts: Mapping[str, int] = field(default_factory=dict)
    micro_batch: int | None = None
    measured_on: str = ""
    needs: tuple[str, ...] = ()
    needs_each_epoch: bool = False
    observed: bool = True

    @property
    def mean_sparsity(self) -> Sparsity:
        """What a training leaves out."""
        return self.sparsity or Sparsity.of([self.cost])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values; :meth:`from_json` reads it back."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "budget": None if self.budget is None else str(self.budget),
            "policy": self.policy,
            "seed": self.seed,
            "pool": list(self.pool),
            "ranking": self.ranking,
            "measured_on": self.measured_on,
            "head": list(self.head),
            "head_parameters": self.head_parameters,
            "cost": asdict(self.cost),
            "weight_sparsity": self.mean_sparsity.weight,
            "activation_sparsity": self.mean_sparsity.activation,
            "flops_reduction": self.mean_sparsity.flops,
            "sparsity": asdict(self.mean_sparsity),
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "least_peak_bytes": self.least_peak_bytes,
            "recomputed": list(self.recomputed),
            "recomputable": self.recomputable,
            "recomputed_share": self.recomputed_share,
            "fidelity": self.fidelity,
            "predicted_parts": dict(self.predicted_parts),
            "micro_batch": self.micro_batch,
            "needs": list(self.needs),
            "needs_each_epoch": self.needs_each_epoch,
            "observed": self.observed,
            "selection_hash": self.selection.digest,
            "selection": self.selection.to_json(),
            "batch": self.table.batch,
            "element_bytes": self.table.element_bytes,
            "weight_element_bytes": self.table.weight_element_bytes,
            "parameters": self.table.parameters,
            "layers": [asdict(layer) for layer in self.table],
            "frozen": [asdict(frozen) for frozen in self.table.frozen],
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: It is no plan, of another version, or damaged.

        """
        from trady.budget import parse_budget

        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError("this is no trady plan; make one with trady.plan(...).save(path)")
        if data.get("version") != VERSION:
            raise CheckpointError(f"the plan is of version {data.get('version')}, this trady reads version {VERSION}")
        try:
            table = ChannelTable(
                layers=tuple(Layer(**_tuples(layer)) for layer in data["layers"]),
                frozen=tuple(FrozenLayer(**frozen) for frozen in data["frozen"]),
                batch=data["batch"],
                element_bytes=data["element_bytes"],
                weight_element_bytes=data["weight_element_bytes"],
                parameters=data["parameters"],
            )
            return cls(
                model=data["model"],
                budget=None if data["budget"] is None else parse_budget(data["budget"]),
                policy=data["policy"],
                seed=data["seed"],
                table=table,
                pool=tuple(data["pool"]),
                ranking=data["ranking"],
                head=tuple(data["head"]),
                head_parameters=data["head_parameters"],
                selection=Selection.from_json(data["selection"]),
                cost=Cost(**data["cost"]),
                predicted_peak_bytes=data["predicted_peak_bytes"],
                least_peak_bytes=data["least_peak_bytes"],
                recomputed=tuple(data.get("recomputed", ())),
                recomputable=data.get("recomputable", 0),
                recomputed_share=data.get("recomputed_share", 0.0),
                fidelity=data.get("fidelity", "exact"),
                sparsity=Sparsity(**data["sparsity"]) if "sparsity" in data else None,
                predicted_parts=dict(data.get("predicted_parts", {})),
                micro_batch=data.get("micro_batch"),
                measured_on=data.get("measured_on", ""),
                needs=tuple(data.get("needs", ())),
                needs_each_epoch=data.get("needs_each_epoch", False),
                observed=data.get("observed", True),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the plan is damaged ({type(error).__name__}: {error}); make it anew") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a file of that name is replaced as a whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            CheckpointError: The file cannot be read, is damaged, or is of another version.

        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def __rich__(self) -> RenderableType:
        from trady.plan_view import view

        return view(self)

    def __str__(self) -> str:
        return _rendered(self)


def _rendered(*parts: Any) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def _tuples(layer: dict[str, Any]) -> dict[str, Any]:
    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {name: freeze(value) for name, value in layer.items()}
