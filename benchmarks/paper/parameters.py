"""``python -m benchmarks.paper.parameters``: whether a policy is as good as the number of weights it trains.

At equal B_mem policies train very different numbers of weights: a channel behind a large map is dear. Within each
backbone, data set and budget this ranks the policies that train input channels in one common recipe by that number and
by accuracy (means over seeds), and gives Spearman's correlation of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import options
from benchmarks.paper.__main__ import FOLDER
from trady.ranking.scores import spearman

#: Neither the oracles nor velocity: the common rate is too high for what they choose.
POLICIES = ("trady", "trady+", "dynamic-random", "static-random", "static-topk-random", "sparse-update")

Place = tuple[str, str, str]


def read_results(path: Path) -> dict[Place, dict[str, list[tuple[int, float]]]]:
    """Collect (trained weights, accuracy) of the finished cells, by place in the matrix and policy."""
    found: dict[Place, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if cell["status"] == "done" and cell["policy"] in POLICIES:
            place = (cell["budget"], cell["model"], cell["dataset"])
            found[place][cell["policy"]].append((cell["trainable_parameters"], cell["accuracy"]))
    return found


def run(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.parameters", description=__doc__)
    options.add_json(parser)
    parser.add_argument("--results", type=Path, default=FOLDER / "results" / "results.jsonl")
    chosen = parser.parse_args(arguments)
    table = Table(title="Thousand trained weights (and top-1, %), means over seeds")
    for name in ("budget", "model", "data set", *POLICIES, "Spearman"):
        table.add_column(name, justify="left" if name in ("budget", "model", "data set") else "right")
    rows: list[dict[str, Any]] = []
    for place, policies in sorted(read_results(chosen.results).items(), key=lambda item: _in_order(item[0])):
        means = {
            policy: (statistics.fmean(p for p, _ in runs), statistics.fmean(a for _, a in runs))
            for policy, runs in policies.items()
        }
        names = [policy for policy in POLICIES if policy in means]
        agreement = spearman([means[name][0] for name in names], [means[name][1] for name in names])
        rows.append({"place": place, "policies": means, "spearman": agreement})
        cells = [f"{means[n][0] / 1e3:.0f} ({means[n][1]:.1%})" if n in means else "–" for n in POLICIES]
        table.add_row(*place, *cells, f"{agreement:.2f}")
    options.console_for(chosen.json).print(table)
    for budget in dict.fromkeys(row["place"][0] for row in rows):
        of_budget = [row["spearman"] for row in rows if row["place"][0] == budget]
        options.console_for(chosen.json).print(f"{budget}: mean Spearman {statistics.fmean(of_budget):.2f}")
    options.write_json(chosen.json, {"rows": rows})
    return 0


def _in_order(place: Place) -> tuple[int, str, str]:
    budget, model, dataset = place
    return int(budget.partition("kB")[0].partition("-")[0]), model, dataset


if __name__ == "__main__":
    options.main(run)
