"""A plan as a person reads it: what trains, what is kept, what is computed anew, where the peak comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from trady.budget import parse_budget
from trady.memory.recorder import PARTS
from trady.report.units import BAR_WIDTH, format_bytes, format_count, format_fine_percent, format_percent, range_bar

if TYPE_CHECKING:
    from trady.forecast import Cell, Point
    from trady.plan import Plan

#: So many layers are shown one by one.
ROWS = 24


def view(plan: Plan, *, least_budget_bytes: int | None = None, rows: int | None = ROWS) -> RenderableType:
    """Show a plan.

    Args:
        plan: The plan.
        least_budget_bytes: The least peak budget that is possible, if it is known.
        rows: Show at most so many layers; ``None`` shows all, 0 none.

    """
    parts: list[RenderableType] = [_choice(plan, least_budget_bytes)]
    if plan.predicted_parts:
        parts.append(_peak(plan))
    if rows != 0:
        parts.append(_layers(plan, rows))
    return Group(*parts)


def curve_view(points: Sequence[Point], budget_bytes: int | None) -> RenderableType:
    """Show peaks over shares of channels, with a bar of the least and the most for each."""
    choice = any(point.kept_peak_bytes != point.recomputed_peak_bytes for point in points)
    table = Table(title="Peak of a step, by the share of channels that trains in every layer", title_justify="left")
    table.add_column("trains", justify="right")
    table.add_column("channels", justify="right")
    for heading in ("all computed anew", "all kept") if choice else ("peak",):
        table.add_column(heading, justify="right", no_wrap=True)
    top = max(max(p.kept_peak_bytes, p.recomputed_peak_bytes) for p in points)
    limit = ", ◆ where the budget is" if budget_bytes is not None and budget_bytes <= top else ""
    table.add_column(f"0 to {format_bytes(top)}{limit}", no_wrap=True)
    for point in points:
        low, high = sorted((point.recomputed_peak_bytes, point.kept_peak_bytes))
        peaks = (point.recomputed_peak_bytes, point.kept_peak_bytes) if choice else (high,)
        table.add_row(
            format_percent(point.share),
            format_count(point.channels),
            *map(format_bytes, peaks),
            range_bar(low, high, top, budget_bytes),
        )
    return table


def sweep_view(cells: Sequence[Cell], unit: str) -> RenderableType:
    """Show what several budgets buy with several batch sizes; ``unit`` is what a batch counts."""
    budgets, batches = (
        list(dict.fromkeys(keys)) for keys in zip(*((c.budget, c.batch_size) for c in cells), strict=True)
    )
    found = {(cell.budget, cell.batch_size): cell for cell in cells}
    table = Table(
        title="Channels that train, predicted peak of a step, and what is computed anew of a forward pass",
        title_justify="left",
        show_lines=True,
    )
    table.add_column("budget")
    for batch in batches:
        table.add_column(f"{batch} {unit}", justify="right")
    for budget in budgets:
        table.add_row(budget, *(_cell(found[budget, batch]) for batch in batches))
    return table


def _cell(cell: Cell) -> str:
    if not cell.possible:
        in_bytes = parse_budget(cell.budget).scope.in_bytes
        least = format_bytes(cell.predicted_peak_bytes) if in_bytes else f"{cell.predicted_peak_bytes} elements"
        return f"impossible\nleast {least}"
    lines = [f"{format_percent(cell.channel_share)} of the channels", format_bytes(cell.predicted_peak_bytes)]
    if cell.recomputed_share:
        lines.append(f"{format_percent(cell.recomputed_share)} computed anew")
    if cell.micro_batch is not None:
        lines.append(f"{cell.micro_batch} at a time")
    return "\n".join(lines)


def _choice(plan: Plan, least_budget_bytes: int | None) -> Table:
    limit = plan.budget if plan.budget is not None else "no budget"
    table = Table(
        title=f"{plan.model}: {plan.policy} in {limit}, {plan.table.batch} samples at a time",
        title_justify="left",
        show_header=False,
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(plan, least_budget_bytes):
        table.add_row(name, value)
    return table


def _facts(plan: Plan, least_budget_bytes: int | None) -> Iterable[tuple[str, str]]:
    cost, total = plan.cost, plan.table.channel_count
    drawn = sum(1 for channels in plan.selection.channels.values() if len(channels))
    yield (
        "trains",
        f"{format_count(cost.channels)} of {format_count(total)} input channels ({format_percent(cost.channels / max(total, 1))}), "
        f"in {drawn} of {len(plan.table)} layers" + _neurons(plan),
    )
    if plan.head:
        yield "trains always", f"{', '.join(plan.head)}: {format_count(plan.head_parameters)} parameters"
    yield "draws from", _pool(plan)
    if plan.needs:
        when = "before every epoch" if plan.needs_each_epoch else "once, before the first epoch"
        so_far = "" if plan.observed else "; until then, channels drawn uniformly (or the first ones) stand in here"
        yield "measures", f"{', '.join(plan.needs)}, {when}{so_far}"
    if plan.micro_batch is not None:
        yield "micro-batches", f"{plan.micro_batch} samples a forward and backward pass"
    without = plan.mean_sparsity
    yield "keeps", f"{format_bytes(cost.saved_channel_bytes)} of the channels that train"
    yield from _recomputation(plan)
    yield "updating adds", f"{format_bytes(cost.update_bytes)} ({format_count(cost.elements)} elements a sample)"
    if cost.float_bytes:
        kept = "in floating point beside quantised weights, once they have trained"
        yield "float channels", f"{format_bytes(cost.float_bytes)} reserved, {kept}"
    yield (
        "does without",
        f"{format_fine_percent(without.weight)} of the weight gradients, "
        f"{format_fine_percent(without.activation)} of the activations, "
        f"{format_fine_percent(without.flops)} of the weight-gradient FLOPs"
        + (f" (mean of {without.draws} epochs' draws)" if without.draws > 1 else ""),
    )
    if least_budget_bytes is not None:
        yield "least budget", f"peak:{format_bytes(least_budget_bytes)}"


def _neurons(plan: Plan) -> str:
    chosen = plan.selection.outputs
    if not chosen:
        return ""
    there = sum(plan.table[name].outputs for name in chosen)
    trained = sum(len(outputs) for outputs in chosen.values())
    return f"; in {len(chosen)} of these only {format_count(trained)} of {format_count(there)} output channels"


def _pool(plan: Plan) -> str:
    pool = f"{len(plan.pool)} of {len(plan.table)} layers"
    whence = {
        "online": ": all, until the first epoch has shown which matter",
        "none": ": this policy needs no ranking",
        "structural": ", by a guess from the layers' shapes (rank on your data to know)",
    }.get(plan.ranking, f", by a ranking that is {plan.ranking}")
    return pool + whence + (f", measured on {plan.measured_on}" if plan.measured_on else "")


def _recomputation(plan: Plan) -> Iterable[tuple[str, str]]:
    if not plan.recomputable:
        return
    chosen = len(plan.recomputed)
    first = ", ".join(dict.fromkeys(name or "the model" for name in plan.recomputed[:4]))
    names = f" ({first}{', …' if chosen > 4 else ''})" if chosen else ""
    yield "computes anew", f"{format_count(chosen)} of {plan.recomputable} stretches of the forward pass{names}"
    yield "extra time", f"at most {format_percent(plan.recomputed_share)} of a forward pass"


def _peak(plan: Plan) -> Table:
    peak = sum(plan.predicted_parts.values())
    table = Table(title="Predicted peak of a step", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for part, amount in _in_order(plan.predicted_parts):
        table.add_row(part, format_bytes(amount), "█" * round(BAR_WIDTH * amount / peak))
    table.add_section()
    table.add_row("peak", format_bytes(peak), "")
    return table


def _in_order(parts: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    return ((part, parts[part]) for part in (*PARTS, *(part for part in parts if part not in PARTS)) if parts.get(part))


def _layers(plan: Plan, rows: int | None) -> Table:
    table = Table(title_justify="left", caption_justify="left")
    for heading in ("layer", "kind", "in the pool"):
        table.add_column(heading)
    for heading in ("channels", "drawn now", "C^W", "C^A", "saved now"):
        table.add_column(heading, justify="right")
    pool, layers = set(plan.pool), list(plan.table)
    if rows is not None and len(layers) > rows:
        layers = layers[:rows]
        table.caption = f"and {len(plan.table) - rows} more layers"
    for layer in layers:
        drawn = len(plan.selection.channels.get(layer.name, ()))
        saved = drawn * layer.activation_elements * plan.table.batch * plan.table.element_bytes
        table.add_row(
            layer.name,
            layer.kind if layer.groups == 1 else f"{layer.kind}, {layer.groups} groups",
            "yes" if layer.name in pool else "",
            f"{layer.channels}",
            f"{drawn}" if drawn else "",
            f"{layer.weight_elements}",
            f"{layer.activation_elements}",
            format_bytes(saved) if drawn else "",
        )
    for name in plan.head:
        table.add_row(name, "head", "", "", "all", "", "", "")
    return table
