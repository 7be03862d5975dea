"""``python -m benchmarks.paper``: run the next part of the experiment, and write its table.

Every call goes on where the last one ended; finished cells are in ``results/results.jsonl``, so a fresh checkout goes
on too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import options
from trady.compare.run import compare
from trady.compare.show import view
from trady.errors import DataError
from trady.policies import Scheme

FOLDER = Path(__file__).parent

#: Where the schemes of a model of the matrix are, and the number of layers that they count.
SCHEMES = {"mbv2": ("mbv2-w0.35", 51), "mcunet": ("mcunet-5fps", 42)}


def write_schemes(published: Path, folder: Path) -> Path:
    """Write every scheme into a file of its own, as ``trady finetune --scheme`` takes them.

    Args:
        published: Backbone to budget to layers and ratios, as JSON (mit-han-lab/tiny-training).
        folder: Where they go, as ``mbv2-49kB.json``.

    Raises:
        DataError: The file is missing or holds something else.

    """
    try:
        tables = json.loads(published.read_text(encoding="utf-8"))
        folder.mkdir(parents=True, exist_ok=True)
        for short, (name, layers) in SCHEMES.items():
            for budget, scheme in tables[name].items():
                of_layers, ratios = scheme["layer_indices"], scheme["channel_ratios"]
                Scheme(tuple(of_layers), tuple(ratios), layers).save(
                    folder / f"{short}-{budget.replace('kb', 'kB')}.json"
                )
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{published} has no sparse-update schemes ({error}); name their file with --schemes"
        ) from error
    return folder


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that are left, for as long as there is time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    options.add_models(parser)
    parser.add_argument(
        "--schemes",
        type=Path,
        metavar="JSON",
        help="published sparse-update schemes (default: sparse_update_schemes.json in data/ beside the models' folder)",
    )
    parser.add_argument("--matrix", type=Path, default=FOLDER / "matrix.toml", help="another matrix file")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: results, or results-NAME of NAME.toml)"
    )
    parser.add_argument("--max-minutes", type=float, default=85.0, help="length of a part (default: 85)")
    parser.add_argument("--workers", type=int, help="cells at a time (default: one a processor)")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="where cells run; several share a GPU (default: cuda where there is one)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run cells again that failed")
    parser.add_argument("--summary-only", action="store_true", help="run nothing")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nobody has asked PyTorch for a device yet
    elif chosen.device is not None:
        options.device_of(chosen)
    usual = chosen.matrix.resolve() == (FOLDER / "matrix.toml").resolve()
    chosen.out = chosen.out or FOLDER / ("results" if usual else f"results-{chosen.matrix.stem}")
    models = options.models_folder(chosen.models).absolute()
    published = chosen.schemes or models.parent / "data" / "sparse_update_schemes.json"
    os.environ["TRADY_MODELS"] = str(models)
    os.environ["TRADY_SCHEMES"] = str(write_schemes(published, chosen.out.absolute() / "schemes"))
    try:
        table = compare(
            chosen.matrix,
            chosen.out,
            workers=chosen.workers,
            max_minutes=chosen.max_minutes,
            retry_failed=chosen.retry_failed,
            summary_only=chosen.summary_only,
        )
    except KeyboardInterrupt:
        Console(stderr=True).print(f"stopped; what is done is kept in {chosen.out}: the same command goes on")
        return 130
    options.console_for(None).print(view(table.summary))
    counts = Counter(row.status for row in table.rows)
    Console().print(", ".join(f"{count} cells {status}" for status, count in counts.items()))
    return 0


if __name__ == "__main__":
    options.main(run)
