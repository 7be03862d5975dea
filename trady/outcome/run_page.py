"""The page of one run, and the page of several."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from trady.errors import DataError
from trady.outcome import figures
from trady.outcome.finished_run import FinishedRun, read_run
from trady.records.files import write_lines
from trady.records.translated import file_errors
from trady.report.page import Code, Figure, Part, Section, Table, Text, page
from trady.report.units import format_bytes, format_count, format_percent
from trady.training.metrics import EpochMetrics

#: Its name in a run folder.
PAGE = "report.html"

_PHASES = {
    "step": "a training step",
    "evaluation": "evaluation",
    "saving": "writing a checkpoint",
    "finishing": "becoming the plain model again",
}


@file_errors()
def write_page(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run, or of several beside each other.

    Args:
        runs: Run folders.
        out: The file; ``report.html`` in the folder of the only run by default.

    Returns:
        Where the page is.

    Raises:
        CheckpointError: A folder is no run, or a file of it is damaged.
        DataError: There are several runs, and no ``out``.
        TrainingError: matplotlib is not installed.
    """
    figures.check_installed()
    if out is None and len(runs) != 1:
        raise DataError(f"{len(runs)} runs have no folder in common: say where the page goes, e.g. --out report.html")
    read = [read_run(run) for run in runs]
    path = read[0].path / PAGE if out is None else Path(out)
    write_lines(path, [page_of(read[0]) if len(read) == 1 else page_of_several(read)])
    return path


def page_of(run: FinishedRun) -> str:
    """Return the page of one run."""
    sections = [
        Section("What fitted", _fitted(run)),
        Section("What was learned", _learned(run)),
        *([Section("Where it was learned", _where(run))] if run.plan is not None else []),
        Section("How to do it again", _again(run)),
    ]
    return page(run.name, verdict(run), sections)


def verdict(run: FinishedRun) -> str:
    """Return what came out, in two sentences."""
    said, last, best = run.description, run.last, run.best
    left = "" if len(run.history) >= said.epochs else f" of {said.epochs}: the run is not finished"
    better = "" if best.quality <= last.quality else f", {_reached(best)} after epoch {best.epoch + 1}"
    what = f"{_model(run)} reaches {_reached(last)} on {_evaluated(run)} after {_epochs(len(run.history))}"
    limit = run.limit_bytes
    kept = "" if limit is None else f", {format_percent(run.peak_bytes / limit)} of the {format_bytes(limit)} allowed"
    return f"{what}{left}{better}. A training step peaks at {format_bytes(run.peak_bytes)}, weights included{kept}."


def _reached(epoch: EpochMetrics) -> str:
    """What an epoch reached: the accuracy alone, or all that was measured."""
    if epoch.accuracy is not None and not epoch.measures:
        return f"{epoch.accuracy:.1%}"
    return str(epoch) or f"an evaluation loss of {epoch.evaluation_loss:.4f}"


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count > 1)}"


def _model(run: FinishedRun) -> str:
    model = run.description.model
    return model.name or model.kind.rpartition(".")[2]


def _evaluated(run: FinishedRun) -> str:
    count = run.description.data.get("evaluation examples")
    held_out = "the evaluation data" if not isinstance(count, int) else f"{format_count(count)} evaluation examples"
    classes = len(run.description.classes)
    return f"{held_out} of {classes} classes" if classes else held_out


def _fitted(run: FinishedRun) -> list[Part]:
    plan, last = run.plan, run.last
    parts: list[Part] = [
        Figure(
            figures.memory(run),
            "The peak of a training step as it was predicted before the first one, by what it is made of, and as it "
            "was measured: the highest of the first steps of all epochs. Bytes of tensors, to the byte.",
            figures.CSS_WIDTH,
        )
    ]
    phases = plan.predicted_phases if plan is not None else {}
    rows = [[_PHASES.get(name, name), format_bytes(size)] for name, size in phases.items()]
    if rows:
        parts.append(Table(["phase", "peak"], rows, "Predicted tensor memory of what a run does, weights included."))
    facts = [
        ["budget", run.budget],
        ["policy", run.description.policy],
        ["kept from forward to backward", format_bytes(last.saved_bytes)],
        ["elements that a step updates", format_count(last.trainable_parameters)],
        ["samples of a pass", "the whole batch" if last.micro_batch is None else str(last.micro_batch)],
    ]
    if plan is not None and plan.step is not None:
        facts.append(["operations of a step ÷ full fine-tuning", f"{plan.step.over_full:.2f}"])
    if last.process_peak_bytes is not None:
        facts.append(["resident in the process, at most", format_bytes(last.process_peak_bytes)])
    return [*parts, Table(["", ""], facts)]


def _learned(run: FinishedRun) -> list[Part]:
    rows = [
        [
            str(e.epoch + 1), f"{e.train_loss:.4f}", f"{e.evaluation_loss:.4f}", _accuracy(e, 2), f"{e.lr:.2g}",
            f"{e.samples_per_second:.0f}", format_bytes(e.peak_bytes), f"{e.seconds:.1f} s",
        ]
        for e in run.history
    ]  # fmt: skip
    header = ["epoch", "training loss", "evaluation loss", "accuracy", "rate", "samples/s", "peak", "time"]
    return [
        Figure(
            figures.learning(run),
            "Mean loss of an epoch's training examples while it ran, and loss and top-1 accuracy on the evaluation "
            "data after it.",
            figures.CSS_WIDTH,
        ),
        Table(header, rows, "By epoch."),
    ]


def _where(run: FinishedRun) -> list[Part]:
    assert run.plan is not None
    plan, draws = run.plan, len({epoch.selection_hash for epoch in run.history})
    redrawn = "the same ones in every epoch" if draws == 1 else f"{draws} different choices over the epochs"
    parts: list[Part] = [
        Text(
            f"{format_count(run.last.channels)} input channels train, {redrawn}, in {len(plan.pool)} of "
            f"{len(plan.table.names)} layers. The ranking of layers is {plan.ranking}"
            f"{f', measured on {plan.measured_on}' if plan.measured_on else ''}. Beside them trains the head: "
            f"{', '.join(plan.head) or 'none'} ({format_count(plan.head_parameters)} parameters)."
        )
    ]
    if plan.selection.channels:
        parts += [
            Figure(
                figures.places(plan),
                "Share of the input channels of each layer that trained in the first draw. Layers outside of the pool "
                "have none.",
                figures.CSS_WIDTH,
            ),
            Table(
                ["layer", "channels", "trained", "share"],
                [
                    [layer.name, str(layer.channels), str(chosen), format_percent(chosen / layer.channels)]
                    for layer in plan.table
                    if (chosen := len(plan.selection.channels.get(layer.name, ())))
                ],
                "The first draw.",
            ),
        ]
    return parts


def _again(run: FinishedRun) -> list[Part]:
    said = run.description
    command = shlex.join(said.command) if said.command else "# a run of trady.finetune in a program: no command line"
    facts = [
        ["seed", str(said.seed)],
        ["precision", "float32" if said.precision == "no" else said.precision],
        ["device", said.device],
        ["started", said.started],
        *([str(name), str(value)] for name, value in said.data.items() if value is not None),
        *([name, version] for name, version in said.versions.items()),
    ]
    return [Code(command), Table(["", ""], facts, "What the result depends on; data is given by digests.")]


def page_of_several(runs: Sequence[FinishedRun]) -> str:
    """Return the page of several runs: a table, the accuracies, and what each says."""
    named = list(zip(_names(runs), runs, strict=True))
    best = max(runs, key=lambda run: run.last.quality)
    title, winner = f"{len(runs)} runs", next(name for name, run in named if run is best)
    lead = f"The best after the last epoch is {winner}, with {_reached(best.last)}."
    if len({_task(run) for run in runs}) > 1:
        lead += " They are of other data, so what they reach says nothing of each other."
    elif len({run.description.seed for run in runs}) == 1:
        lead += (
            " One run each says nothing of chance: trady compare repeats runs with other seeds and tests differences."
        )
    rows = [
        [
            name, _model(run), run.description.policy, run.budget, _accuracy(run.last), _accuracy(run.best),
            f"{run.last.evaluation_loss:.4f}", format_bytes(run.peak_bytes),
            format_count(run.last.trainable_parameters), f"{sum(epoch.seconds for epoch in run.history):.0f} s",
        ]
        for name, run in named
    ]  # fmt: skip
    header = ["run", "model", "policy", "budget", "accuracy", "best", "loss", "peak", "elements", "time"]
    caption = "After the last epoch, accuracy also after the best one; the highest measured peak, weights included."
    drawing = Figure(figures.side_by_side(named), "On the evaluation data, by epoch.", figures.CSS_WIDTH)
    sections = [Section("Side by side", [Table(header, rows, caption), drawing])]
    sections += [Section(name, [Text(verdict(run)), *_fitted(run)[:1]]) for name, run in named]
    return page(title, lead, sections)


def _accuracy(epoch: EpochMetrics, digits: int = 1) -> str:
    return "" if epoch.accuracy is None else f"{epoch.accuracy:.{digits}%}"


def _task(run: FinishedRun) -> object:
    data = run.description.data
    return data.get("evaluation labels"), data.get("evaluation examples"), run.description.classes


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """Names of folders; their paths where two are called the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]
