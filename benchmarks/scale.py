"""A Llama of 70 billion parameters on 64 GPUs: memory of a rank, bytes on the wire and their time, method by method.

The shape is simulated without weights, with 2 and with 4 blocks; every part of a peak grows by the same for each block
after that, which a third simulation checks (``--check 6``). Sharded figures are arithmetic: weights, gradients and
optimizer state of a rank are a part of the whole, and two blocks are gathered at a time (arXiv 1910.02054, 2304.11277).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import trady
from benchmarks.options import add_json, console_for, main, write_json
from trady.estimates.report import MethodFit
from trady.planning.traffic import in_a_ring
from trady.report.units import format_bytes, format_count

#: Llama-2-70B (https://huggingface.co/meta-llama/Llama-2-70b-hf).
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
}
BLOCKS, TOKENS, RANKS, GBIT, RANK = 80, 2048, 64, 400, 16
METHODS = ("checkpoint", "lora-checkpoint", "qlora-checkpoint", "trady")
#: How far a peak of the third simulation may be from what the first two say.
CHECK_BAR = 0.01

#: Parts of a peak that lie in parts on several ranks where weights are sharded.
_SHARDED = ("weights", "gradients", "compact parameters", "compact gradients", "optimizer state")
#: Bytes of an element of what trains: adapters of peft beside weights of half precision are float32.
_TRAINED_BYTES = {"lora": 4, "qlora": 4}
_SHARE, _LORA, _QLORA = "TraDy, 2 % of the channels", "LoRA + checkpointing", "QLoRA, 4 bits + checkpointing"


@dataclass(frozen=True)
class Row:
    """What a method takes on a rank.

    Attributes:
        method: For people.
        trained: Parameters that train.
        peak_bytes: Of a step, the whole model on every rank.
        sharded_bytes: The same with weights, gradients and state in as many parts as there are ranks, and two blocks
            gathered.
        sent_bytes: What a rank sends in a step, the whole model on every rank: gradients of what trains.
        sharded_sent_bytes: The same with sharded weights: these are gathered for both passes; gradients of all weights
            are summed up in parts, those of a few channels or adapters as before.
    """

    method: str
    trained: int
    peak_bytes: int
    sharded_bytes: int
    sent_bytes: int
    sharded_sent_bytes: int

    def seconds(self, nbytes: int, gbit: float) -> float:
        """The time of so many bytes."""
        return 8 * nbytes / (1e9 * gbit)


def simulated(blocks: int, config: Mapping[str, Any] = CONFIG, tokens: int = TOKENS) -> dict[str, MethodFit]:
    """Simulate a step of every method, for this many blocks; by title."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**config, "num_hidden_layers": blocks}), encoding="utf-8")
        report = trady.fit(
            str(path), methods=METHODS, batch_size=1, length=tokens, dtype="bfloat16", rank=RANK, device="cuda",
            optimizer="adamw",
        )  # fmt: skip
    return {row.title: row for row in report.rows if row.peak_bytes}


def extended(two: MethodFit, four: MethodFit, blocks: int) -> tuple[int, dict[str, int]]:
    """Return trained parameters and the parts of a peak for more blocks: each pair adds what the second one has."""

    def at(first: int, second: int) -> int:
        return second + (second - first) * (blocks - 4) // 2

    first, second = two.parts or {}, four.parts or {}
    parts = {name: at(first.get(name, 0), second.get(name, 0)) for name in {**first, **second}}
    return at(two.trainable_parameters or 0, four.trainable_parameters or 0), parts


def row_of(
    title: str, trained: int, parts: Mapping[str, int], weights: int, ranks: int, blocks: int, rest: int | None = None
) -> Row:
    """Say what a method takes on each of some ranks.

    Args:
        title: Of the method.
        trained: Parameters that train.
        parts: Of the peak.
        weights: Bytes of the model, which are gathered where they are sharded.
        ranks: How many.
        blocks: Of the model, of which two are there at a time, and the gradient of one where all weights train.
        rest: What the backward pass has beside what is sharded, where the peak is in the optimizer's step.
    """
    width = next((width for name, width in _TRAINED_BYTES.items() if title.lower().startswith(name)), 2)
    gradients, whole = trained * width, title.startswith("full")
    sharded = sum(parts.get(name, 0) for name in _SHARDED)
    gathered = (3 if whole else 2) * weights // blocks
    sums = (ranks - 1) * gradients // ranks if whole else in_a_ring(gradients, ranks)
    peak = sum(parts.values())
    rest = peak - sharded if rest is None else rest
    return Row(
        title,
        trained,
        peak,
        rest + sharded // ranks + gathered,
        in_a_ring(gradients, ranks),
        2 * (ranks - 1) * weights // ranks + sums,
    )


def rows_of(
    two: Mapping[str, MethodFit], four: Mapping[str, MethodFit], blocks: int = BLOCKS, ranks: int = RANKS
) -> list[Row]:
    """Say what every method takes, and TraDy beside weights of 4 bits."""
    found = {title: extended(two[title], four[title], blocks) for title in two if title in four}
    # Full fine-tuning peaks in the step of AdamW; its backward pass has the activations of the one beside adapters.
    backward = sum(size for name, size in found[_LORA][1].items() if name not in _SHARDED)
    rows = [
        row_of(title, trained, parts, parts["weights"], ranks, blocks, backward if title.startswith("full") else None)
        for title, (trained, parts) in found.items()
    ]
    if _SHARE in found and _QLORA in found:
        trained, parts = found[_SHARE]
        adapters, quantised = found[_QLORA]
        stored = quantised["weights"] - _TRAINED_BYTES["qlora"] * adapters
        rows.append(row_of(f"{_SHARE}, 4 bits", trained, {**parts, "weights": stored}, stored, ranks, blocks))
    return rows


def table_of(rows: list[Row], ranks: int, gbit: float) -> Table:
    """Show them."""
    table = Table(title=f"{ranks} ranks, {TOKENS} tokens each, bfloat16, AdamW, {gbit:g} Gbit/s for each rank")
    for heading in ("method", "trains", "rank, whole", "rank, sharded", "sent, whole", "s", "sent, sharded", "s"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(
            row.method,
            format_count(row.trained),
            format_bytes(row.peak_bytes),
            format_bytes(row.sharded_bytes),
            format_bytes(row.sent_bytes),
            f"{row.seconds(row.sent_bytes, gbit):.3f}",
            format_bytes(row.sharded_sent_bytes),
            f"{row.seconds(row.sharded_sent_bytes, gbit):.3f}",
        )
    return table


def run(options: argparse.Namespace, console: Console) -> int:
    """Simulate, print and write; return the exit code."""
    started = time.process_time()
    two, four = simulated(2), simulated(4)
    rows, errors = rows_of(two, four, BLOCKS, options.ranks), {}
    if options.check:
        for title, row in simulated(options.check).items():
            expected = sum(extended(two[title], four[title], options.check)[1].values())
            errors[title] = abs(expected - (row.peak_bytes or 0)) / expected
    console.print(table_of(rows, options.ranks, options.gbit))
    for title, error in errors.items():
        console.print(f"{title}: with {options.check} blocks {error:.2%} off what 2 and 4 say", highlight=False)
    seconds = time.process_time() - started
    console.print(f"{seconds:.0f} s of processor time", highlight=False)
    figures = {"ranks": options.ranks, "gbit": options.gbit, "rows": [asdict(row) for row in rows], "errors": errors}
    write_json(options.json, {**figures, "processor_seconds": seconds, "config": CONFIG})
    return int(any(error > CHECK_BAR for error in errors.values()))


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--gbit", type=float, default=GBIT, help="of the link of each rank (default: 400)")
    parser.add_argument("--check", type=int, default=6, metavar="BLOCKS", help="0 checks nothing")
    add_json(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    given = parsed()
    main(lambda: run(given, console_for(given.json)))
