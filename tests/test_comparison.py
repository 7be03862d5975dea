"""What is said of a table of cells: means, tests, wins, tables, figures, the page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pyarrow")

from scipy import stats

from trady.compare import tables
from trady.compare.figures import budget_figure
from trady.compare.report import write_report
from trady.compare.rows import Row
from trady.compare.summary import Summary, summarize
from trady.report.figures import COLORS, looks
from trady.report.page import Table
from trady.report.texts import latex, markdown

SEEDS = (0, 1, 2)
BUDGETS = ("small", "large")
TASKS = [(model, dataset) for model in ("net", "other") for dataset in ("dots", "lines")]


def row(model: str, dataset: str, budget: str | None, policy: str, seed: int, accuracy: float | None) -> Row:
    status = "done" if accuracy is not None else "failed"
    message = None if accuracy is not None else "it broke: 100 % & more"
    return Row(
        model, dataset, budget, None if budget is None else "elements:9", policy, seed, status, "0", message, accuracy,
        best_accuracy=accuracy, step_seconds=0.1, seconds=60.0, peak_bytes=2**20, saved_bytes=2**10, device="cpu",
    )  # fmt: skip


def make_rows(leads: dict[str, float], noise: float = 0.01) -> list[Row]:
    """Cells of policies that lead by so much; ``head`` takes no budget."""
    chance = np.random.default_rng(5)
    return [
        row(*task, budget, policy, seed, 0.5 + lead + noise * float(chance.standard_normal()))
        for seed in SEEDS
        for task in TASKS
        for budget in (None, *BUDGETS)
        for policy, lead in leads.items()
        if (budget is None) == (policy == "head")
    ]


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarize(make_rows({"good": 0.05, "poor": 0.0, "head": -0.1}))


def accuracies(rows: tuple[Row, ...], policy: str) -> dict[tuple[object, ...], float]:
    return {(r.seed, r.model, r.dataset, r.budget): r.accuracy or 0.0 for r in rows if r.policy == policy}


def test_paired_tests_are_those_of_scipy(summary: Summary) -> None:
    good, poor = accuracies(summary.rows, "good"), accuracies(summary.rows, "poor")
    a, b = [good[key] for key in good], [poor[key] for key in good]
    known = stats.ttest_rel(a, b)
    found = summary.test("good", "poor")
    assert found is not None
    assert found.pairs == len(a) == len(SEEDS) * len(TASKS) * len(BUDGETS)
    assert found.p == pytest.approx(known.pvalue)
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert found.effect == pytest.approx(known.statistic / np.sqrt(len(a)))
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval(0.95)))


def test_p_values_are_adjusted_within_a_budget(summary: Summary) -> None:
    for budget in (None, *BUDGETS):
        family = [test for test in summary.tests if test.budget == budget]
        assert len(family) == 3
        assert [test.adjusted for test in family] == pytest.approx(
            stats.false_discovery_control([test.p for test in family]).tolist()
        )


def test_a_policy_without_a_budget_is_matched_with_every_budget(summary: Summary) -> None:
    against = summary.test("good", "head")
    assert against is not None
    assert against.pairs == len(SEEDS) * len(TASKS) * len(BUDGETS)
    assert summary.mean("head", "small").mean == summary.mean("head", "large").mean == summary.mean("head", None).mean


def test_two_policies_without_a_budget_are_matched_once() -> None:
    rows = [
        row(*task, None, policy, seed, 0.5 + 0.01 * place + 0.001 * seed)
        for task in TASKS
        for seed in SEEDS
        for place, policy in enumerate(("head", "full"))
    ]
    rows += [row(*TASKS[0], budget, "good", 0, 0.5) for budget in BUDGETS]
    found = summarize(rows).test("head", "full")
    assert found is not None
    assert found.pairs == len(TASKS) * len(SEEDS)


def test_means_weigh_tasks_equally_and_spread_is_that_of_seeds(summary: Summary) -> None:
    good = accuracies(summary.rows, "good")
    seeds = [[good[(seed, *task, "small")] for seed in SEEDS] for task in TASKS]
    mean = summary.mean("good", "small")
    assert mean.mean == pytest.approx(np.mean([np.mean(values) for values in seeds]))
    assert mean.spread == pytest.approx(np.sqrt(np.mean([np.var(values, ddof=1) for values in seeds])))
    assert (mean.cells, mean.expected) == (12, 12)


def test_wins_are_counted_by_task(summary: Summary) -> None:
    wins = {(found.row, found.column): found for found in summary.wins}
    assert wins["good", "poor"].tasks == len(TASKS) * len(BUDGETS)
    assert wins["good", "poor"].in_mean + wins["poor", "good"].in_mean == wins["good", "poor"].tasks
    assert wins["good", "head"].in_mean == wins["good", "head"].tasks
    assert wins["good", "head"].significant == wins["good", "head"].tasks
    assert wins["head", "good"].significant == 0
    assert wins["head", "good"].in_mean == 0


def test_equal_differences_have_no_effect_size_and_no_warning() -> None:
    same = summarize(make_rows({"good": 0.0, "poor": 0.0}, noise=0.0)).test("good", "poor")
    lead = summarize(make_rows({"good": 0.25, "poor": 0.0}, noise=0.0)).test("good", "poor")
    assert same is not None
    assert lead is not None
    assert (same.difference, same.p, same.effect) == (0.0, 1.0, None)
    assert (lead.difference, lead.p, lead.effect) == (0.25, None, None)


def test_a_missing_cell_is_left_out_of_its_pairs_and_named(summary: Summary) -> None:
    rows = list(summary.rows)
    gone = next(index for index, row in enumerate(rows) if row.policy == "poor")
    rows[gone] = row(*TASKS[0], "small", "poor", 0, None)
    partial = summarize(rows)
    found = partial.test("good", "poor")
    assert found is not None
    assert found.pairs == len(SEEDS) * len(TASKS) * len(BUDGETS) - 1
    assert "* 11/12" in {line[0]: line[1] for line in tables.accuracy_table(partial).rows}["poor"]
    assert "some of its cells are missing" in tables.accuracy_table(partial).caption
    assert tables.gap_table(partial).rows == [
        ["net dots small poor seed 0", "failed", "it broke: 100 % & more"],
    ]


def test_every_policy_has_a_look_of_its_own_which_the_legend_shows() -> None:
    """Also one without a result in the first panel."""
    pytest.importorskip("matplotlib")
    names = {f"policy-{number}": number / 100 for number in range(20)}
    rows = make_rows({**names, "head": -0.1})
    rows += [row("net", "dots", None, "full", seed, 0.9 if seed else None) for seed in SEEDS]
    figure = budget_figure(summarize(rows))
    [legend] = figure.legends
    shown = {
        text.get_text(): (line.get_color(), line.get_linestyle(), line.get_marker())
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert len(shown) == len(set(shown.values())) == 22
    assert {name for name, (_, line, _) in shown.items() if line == "--"} == {"head", "full"}
    for axis in figure.axes:
        for line in axis.get_lines():
            if line.get_label() in shown:
                look = (line.get_color(), line.get_linestyle(), line.get_marker())
                assert look == shown[str(line.get_label())]


def test_no_two_series_look_alike() -> None:
    found = list(islice(looks(), 90))
    assert len({(look.color, look.marker) for look in found}) == 90
    assert len({look.color for look in found[: len(COLORS)]}) == len(COLORS) == 9


def test_the_report_has_every_table_and_figure_and_needs_no_network(summary: Summary, tmp_path: Path) -> None:
    rows = [*summary.rows[:-1], row("other", "lines", "large", "poor", 2, None)]
    page = write_report(summarize(rows), tmp_path, "A comparison").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert "<script" not in page
    assert "it broke: 100 % &amp; more" in page
    for name in ("wins", "accuracy-by-budget"):
        assert ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["cells"] == {"done": len(rows) - 1, "failed": 1}
    assert (tmp_path / "tables" / "accuracy.md").read_text().count("\n| ") == 4
    assert r"\toprule" in (tmp_path / "tables" / "tests.tex").read_text()


def test_a_table_with_nothing_done_is_a_report_too(tmp_path: Path) -> None:
    rows = [row("net", "dots", "small", policy, 0, None) for policy in ("good", "poor")]
    summary = summarize(rows)
    assert summary.mean("good", None).mean is None
    assert "2 of 2" in write_report(summary, tmp_path, "Nothing").read_text() or summary.gaps


def test_tables_as_text_escape_what_their_formats_mean() -> None:
    table = Table(["a_b", "50 % | more"], [["x & y", "1 ± 2"]], "Cost in $")
    assert latex(table).splitlines()[2:] == [
        r"\caption{Cost in \$}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b & 50 \% | more \\",
        r"\midrule",
        r"x \& y & 1 $\pm$ 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    assert markdown(table).splitlines() == [
        "Cost in $",
        "",
        "| a_b   | 50 % \\| more |",
        "|-------|-------------:|",
        "| x & y |        1 ± 2 |",
    ]
