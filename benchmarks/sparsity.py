"""What a B_mem of 27 946 elements leaves untouched in MobileNetV2-w0.35, seed by seed.

Channels are drawn again in every epoch, so the sparsities and the reduction of weight-gradient FLOPs that a plan
reports are means over the draws of 20 epochs; those of its first draw are shown beside them. One real step is
measured, and the input channels that it saves must be the plan's to the byte. The pool is that of the
first epoch (all layers); with labelled images at hand, also that of a measured ranking (top-K layers).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import median

import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import trady
from benchmarks.backbones import batches, load_backbone, load_images
from benchmarks.methods import trady_step
from benchmarks.options import add_images, add_json, add_models, images_file, main, models_folder, write_json
from benchmarks.workloads import B_MEM, WORKLOADS, Workload

BACKBONE = "mbv2-w0.35"

#: Least share of the plan under every seed.
BARS = {"weight_sparsity": 0.90, "activation_sparsity": 0.975, "flops_reduction": 0.95}

ALL_LAYERS, TOP_K_LAYERS = "all layers", "top-K layers"


@dataclass(frozen=True)
class Draw:
    """The channels of one seed.

    Attributes:
        pool: Which layers the channels came from.
        layers: Number of these layers.
        seed: Seed of the draw.
        channels: Selected input channels.
        weight_sparsity: Share of weight elements without a gradient, as the plan reports it.
        activation_sparsity: Share of layer inputs that is not saved.
        flops_reduction: Share of weight-gradient multiply-adds that is not executed.
        first_draw: The same three, of the first draw alone.
        planned_channel_bytes: Saved input channels, as accounted for.
        measured_channel_bytes: The same, as the ledger saw them in a step.
        least_activation_sparsity: What any draw keeps to: the budget spent on activations alone.
    """

    pool: str
    layers: int
    seed: int
    channels: int
    weight_sparsity: float
    activation_sparsity: float
    flops_reduction: float
    first_draw: tuple[float, float, float]
    planned_channel_bytes: int
    measured_channel_bytes: int
    least_activation_sparsity: float


def draws(
    workload: Workload, models: Path, seeds: Sequence[int], ranking: trady.LayerRanking | None = None
) -> Iterator[Draw]:
    """Plan and run one step under every seed.

    Args:
        workload: The workload; its model is built once.
        models: Folder of the backbones.
        seeds: One draw each.
        ranking: Gives the pool of top-K layers; ``None`` is the first epoch, with all layers in the pool.

    """
    task = workload.make(models)
    for seed in seeds:
        with trady_step(workload, task, seed, ranking) as step:
            plan, planned = step.tuner.plan, step.tuner.cost().saved_channel_bytes
            ledger = step.ledger()
        yield Draw(
            pool=ALL_LAYERS if ranking is None else TOP_K_LAYERS,
            layers=len(plan.pool),
            seed=seed,
            channels=plan.cost.channels,
            weight_sparsity=plan.mean_sparsity.weight,
            activation_sparsity=plan.mean_sparsity.activation,
            flops_reduction=plan.mean_sparsity.flops,
            first_draw=(plan.cost.weight_sparsity, plan.cost.activation_sparsity, plan.cost.flops_reduction),
            planned_channel_bytes=planned,
            measured_channel_bytes=ledger.saved_bytes_of("channels"),
            least_activation_sparsity=1 - trady.parse_budget(B_MEM).amount / _activations(plan.table),
        )


def _activations(table: trady.ChannelTable) -> int:
    return sum(layer.channels * layer.activation_elements for layer in table)


def measured_ranking(models: Path, images: Path) -> trady.LayerRanking:
    """Rank the layers on ImageNet images, with the trained classifier."""
    return trady.rank(load_backbone(BACKBONE, models), batches(*load_images(images)), F.cross_entropy)


def faults(drawn: Sequence[Draw]) -> list[str]:
    """List what falls short of the bars, seed by seed."""
    found = []
    for draw in drawn:
        where = f"{draw.pool}, seed {draw.seed}"
        for name, bar in BARS.items():
            value = getattr(draw, name)
            if value < bar:
                found.append(f"{where}: {name} {value:.4f}, at least {bar}")
        if draw.planned_channel_bytes != draw.measured_channel_bytes:
            found.append(
                f"{where}: saved channels {draw.measured_channel_bytes} bytes, planned {draw.planned_channel_bytes}"
            )
    return found


def as_table(drawn: Sequence[Draw]) -> Table:
    """Return, for each pool, the lowest figure over all seeds and the median."""
    table = Table(title=f"{BACKBONE} at {B_MEM}, policy trady", title_justify="left")
    table.add_column("channels from")
    for column in ("bar", "lowest", "median", "seeds that meet it", "lowest first draw"):
        table.add_column(column, justify="right")
    for pool, members in groupby(drawn, key=lambda draw: draw.pool):
        group = list(members)
        for place, (name, bar) in enumerate(BARS.items()):
            values = [getattr(draw, name) for draw in group]
            single = min(draw.first_draw[place] for draw in group)
            met = sum(value >= bar for value in values)
            label = f"{pool} ({group[0].layers}): {name.replace('_', ' ')}"
            table.add_row(
                label,
                f"{bar}",
                f"{min(values):.4f}",
                f"{median(values):.4f}",
                f"{met} of {len(group)}",
                f"{single:.4f}",
            )
        exact = sum(draw.planned_channel_bytes == draw.measured_channel_bytes for draw in group)
        table.add_row(f"{pool}: saved channel bytes", "the plan's", "", "", f"{exact} of {len(group)}", "")
    least = drawn[0].least_activation_sparsity
    table.caption = f"No draw of this budget has an activation sparsity below {least:.4f}."
    table.caption_justify = "left"
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Draw, measure, print, and return 1 if a bar is missed under any seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="seeds to draw with (default: 10)")
    add_models(parser)
    add_images(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    models, seeds, workload = models_folder(options.models), range(max(1, options.seeds)), WORKLOADS[BACKBONE]
    images = images_file(options.images, models)
    console = Console(stderr=options.json == "-")
    drawn = list(draws(workload, models, seeds))
    if options.images or images.exists():
        drawn += draws(workload, models, seeds, measured_ranking(models, images))
    else:
        console.print(f"no measured ranking: {images} is missing (--images NPZ)")
    console.print(as_table(drawn))
    found = faults(drawn)
    for fault in found:
        console.print(f"[red]FAIL[/]  {fault}")
    if not found:
        console.print("[green]pass[/]  every bar, under every seed")
    write_json(options.json, {"draws": [asdict(draw) for draw in drawn], "bars": BARS, "faults": found})
    return int(bool(found))


if __name__ == "__main__":
    main(run)
