"""The plan: what a budget buys in a model, before anything trains."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from trady.channels.cost import Cost, Sparsity
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.memory.recorder import PARTS
from trady.planning.budget import Budget
from trady.planning.plan_record import FORMAT, PlanRecord
from trady.planning.step_flops import StepFlops
from trady.records.files import write_json
from trady.report.units import BAR_WIDTH, format_bytes, format_count, format_fine_percent, format_percent


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
        recomputed: Modules whose calls the backward pass recomputes instead of keeping what they need.
        recomputable: How many segments could be recomputed.
        recomputed_share: Multiply-adds executed a second time, over those of a forward pass, at most.
        fidelity: How exactly smooth activations that are kept are differentiated.
        predicted_parts: What the predicted peak is made of, in bytes, named as in the ledger.
        micro_batch: Samples that the model works on at once; ``None`` is the whole batch.
        needs: What the policy wants measured, by kind.
        needs_each_epoch: Whether it is measured before every epoch, or once.
        read_ahead_bytes: What a loader holds beside the batch of a step; part of ``predicted_peak_bytes``.
        held: Layers that are frozen by hand: by their flags, ``train=`` or ``freeze=``.
        observed: Whether it was; if not, ``selection`` stands in for the first draw, and costs about the same.
        predicted_phases: Peaks in bytes, weights included: of a ``step``, of ``evaluation``, of ``saving`` and of
            ``finishing`` (:func:`trady.planning.phases.predicted_phases`).
        step: What a step with this draw takes of a step of full fine-tuning, and where its backward pass ends.
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
    held: tuple[str, ...] = ()
    read_ahead_bytes: int = 0
    predicted_phases: Mapping[str, int] = field(default_factory=dict)
    step: StepFlops | None = None

    @property
    def mean_sparsity(self) -> Sparsity:
        """What a training leaves out."""
        return self.sparsity or Sparsity.of([self.cost])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values; :meth:`from_json` reads it back."""
        return {
            **FORMAT.header(),
            "model": self.model,
            "budget": None if self.budget is None else str(self.budget),
            **({} if self.budget is None else self.budget.scope.to_json(self.predicted_peak_bytes)),
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
            **({"predicted_phases": dict(self.predicted_phases)} if self.predicted_phases else {}),
            "micro_batch": self.micro_batch,
            "needs": list(self.needs),
            "needs_each_epoch": self.needs_each_epoch,
            "observed": self.observed,
            **({"held": list(self.held)} if self.held else {}),
            **({"step": self.step.to_json()} if self.step is not None else {}),
            **({"read_ahead_bytes": self.read_ahead_bytes} if self.read_ahead_bytes else {}),
            "selection_hash": self.selection.digest,
            "selection": self.selection.to_json(),
            "batch": self.table.batch,
            "element_bytes": self.table.element_bytes,
            "weight_element_bytes": self.table.weight_element_bytes,
            "parameters": self.table.parameters,
            "layers": [layer.to_json() for layer in self.table],
            "frozen": [asdict(frozen) for frozen in self.table.frozen],
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: It is no plan, of another version, or damaged.

        """
        from trady.planning.budget import parse_budget

        record = FORMAT.read(PlanRecord, data)
        with FORMAT.reading():
            table = record.table
            stored = {f.name for f in fields(PlanRecord)} & {f.name for f in fields(cls)}
            return cls(
                **{
                    **{name: getattr(record, name) for name in stored},
                    "budget": None if record.budget is None else parse_budget(record.budget).as_planned(data),
                    "table": table,
                    "selection": record.drawn(table),
                }
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a file of that name is replaced as a whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            CheckpointError: The file cannot be read, is damaged, or is of another version.

        """
        return FORMAT.load(path, cls.from_json)

    def __rich__(self) -> RenderableType:

        return view(self)

    def __str__(self) -> str:
        return _rendered(self)


def _rendered(*parts: Any) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


#: The number of layers shown one by one.
ROWS = 24


def view(plan: Plan, *, least_budget_bytes: int | None = None, rows: int | None = ROWS) -> RenderableType:
    """Show a plan.

    Args:
        plan: The plan.
        least_budget_bytes: The minimum ``peak:`` budget, if it is known.
        rows: Show up to n layers; ``None`` shows all, 0 none.

    """
    parts: list[RenderableType] = [_choice(plan, least_budget_bytes)]
    if plan.predicted_parts:
        parts.append(_peak(plan))
    if plan.predicted_phases:
        parts.append(_phases(plan))
    if rows != 0:
        parts.append(_layers(plan, rows))
    return Group(*parts)


def _choice(plan: Plan, least_budget_bytes: int | None) -> Table:
    limit = plan.budget if plan.budget is not None else "no budget"
    table = Table(
        title=escape(f"{plan.model}: {plan.policy} in {limit}, {plan.table.batch} samples at a time"),
        title_justify="left",
        show_header=False,
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(plan, least_budget_bytes):
        table.add_row(name, escape(value))
    return table


def _facts(plan: Plan, least_budget_bytes: int | None) -> Iterable[tuple[str, str]]:
    cost, total = plan.cost, plan.table.channel_count
    drawn = sum(1 for channels in plan.selection.channels.values() if len(channels))
    yield (
        "trains",
        f"{format_count(cost.channels)} of {format_count(total)} input channels "
        f"({format_percent(cost.channels / max(total, 1))}), "
        f"in {drawn} of {len(plan.table)} layers" + _neurons(plan),
    )
    if plan.head:
        yield "always trained", f"{', '.join(plan.head)}: {format_count(plan.head_parameters)} parameters"
    else:
        why = "no output is of one layer, or that is shared, frozen, quantised, a language model's, or head= is empty"
        yield "always trained", f'no layer: {why}; name one as head="..."'
    yield "draws from", draws_from(plan)
    if plan.held:
        some = ", ".join(plan.held[:4]) + (f" and {len(plan.held) - 4} more" if len(plan.held) > 4 else "")
        yield "frozen by hand", f"{len(plan.held)} of {len(plan.table)} layers: {some}"
    if plan.needs:
        when = "before every epoch" if plan.needs_each_epoch else "once, before the first epoch"
        so_far = "" if plan.observed else "; until then, a uniform draw (or the first channels) is shown instead"
        yield "measures", f"{', '.join(plan.needs)}, {when}{so_far}"
    if plan.micro_batch is not None:
        yield "micro-batches", f"{plan.micro_batch} samples a forward and backward pass"
    if plan.read_ahead_bytes:
        yield "read ahead", f"{format_bytes(plan.read_ahead_bytes)} of batches that the loader holds beside the step's"
    if plan.budget is not None:
        yield from plan.budget.scope.facts(plan.predicted_peak_bytes)
    without = plan.mean_sparsity
    yield "saves", f"{format_bytes(cost.saved_channel_bytes)} of activations, those of the channels that train"
    yield from _recomputation(plan)
    if plan.step is not None:
        yield from plan.step.facts()
    yield "updating adds", f"{format_bytes(cost.update_bytes)} ({format_count(cost.elements)} elements a sample)"
    if cost.float_bytes:
        kept = "in floating point beside quantised weights, once they have trained"
        yield "float channels", f"{format_bytes(cost.float_bytes)} reserved, {kept}"
    yield (
        "skips",
        f"{format_fine_percent(without.weight)} of the weight gradients, "
        f"{format_fine_percent(without.activation)} of the activations, "
        f"{format_fine_percent(without.flops)} of the weight-gradient FLOPs"
        + (f" (mean of {without.draws} epochs' draws)" if without.draws > 1 else ""),
    )
    if least_budget_bytes is not None:
        yield "minimum budget", f"peak:{format_bytes(least_budget_bytes)}"


def _neurons(plan: Plan) -> str:
    chosen = plan.selection.outputs
    if not chosen:
        return ""
    there = sum(plan.table[name].outputs for name in chosen)
    trained = sum(len(outputs) for outputs in chosen.values())
    return f"; in {len(chosen)} of these only {format_count(trained)} of {format_count(there)} output channels"


def draws_from(plan: Plan) -> str:
    """Say which layers channels are drawn from, and who says so."""
    pool = f"{len(plan.pool)} of {len(plan.table)} layers"
    whence = {
        "online": ": all, until the first epoch has shown which matter",
        "none": ": this policy needs no ranking",
        "structural": ", by a guess from the layers' shapes (rank on your data to know)",
        "prior": ", by the ranking that is known for this architecture",
    }.get(plan.ranking, f", by a ranking that was {plan.ranking}")
    return pool + whence + (f", measured on {plan.measured_on}" if plan.measured_on else "")


def _recomputation(plan: Plan) -> Iterable[tuple[str, str]]:
    if not plan.recomputable:
        return
    chosen = len(plan.recomputed)
    first = ", ".join(dict.fromkeys(name or "the model" for name in plan.recomputed[:4]))
    names = f" ({first}{', …' if chosen > 4 else ''})" if chosen else ""
    yield "recomputed", f"{format_count(chosen)} of {plan.recomputable} segments of the forward pass{names}"
    yield "extra time", f"at most {format_percent(plan.recomputed_share)} of a forward pass"


def _peak(plan: Plan) -> Table:
    peak = max(1, sum(plan.predicted_parts.values()))
    table = Table(title="Predicted peak of a step", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for part, amount in _in_order(plan.predicted_parts):
        table.add_row(escape(part), format_bytes(amount), "█" * round(BAR_WIDTH * amount / peak))
    table.add_section()
    table.add_row("peak", format_bytes(peak), "")
    return table


def _phases(plan: Plan) -> Table:
    highest = max(1, *plan.predicted_phases.values())
    table = Table(title="Predicted peak of each phase", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for phase, amount in plan.predicted_phases.items():
        table.add_row(escape(phase), format_bytes(amount), "█" * round(BAR_WIDTH * amount / highest))
    return table


def _in_order(parts: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    return ((part, parts[part]) for part in (*PARTS, *(part for part in parts if part not in PARTS)) if parts.get(part))


def _layers(plan: Plan, rows: int | None) -> Table:
    # Narrow enough for a terminal of 80 columns.
    table = Table(title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for heading in ("channels", "drawn", "C^W", "C^A", "saved"):
        table.add_column(heading, justify="right", no_wrap=True)
    pool, layers = set(plan.pool), list(plan.table)
    if rows is not None and len(layers) > rows:
        layers = layers[:rows]
        table.caption = f"and {len(plan.table) - rows} more layers (--layers shows them)"
    for layer in layers:
        drawn = len(plan.selection.channels.get(layer.name, ()))
        saved = drawn * layer.activation_elements * plan.table.batch * plan.table.element_bytes
        table.add_row(
            escape(layer.name),
            escape(layer.kind if layer.groups == 1 else f"{layer.kind} /{layer.groups}"),
            f"{layer.channels}",
            f"{drawn}" if layer.name in pool else "–",
            f"{layer.weight_elements}",
            f"{layer.activation_elements}",
            format_bytes(saved) if drawn else "",
        )
    for name in plan.head:
        table.add_row(escape(name), "head", "", "all", "", "", "")
    return table
