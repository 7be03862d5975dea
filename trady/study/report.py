"""The report of a study: the figures, and one page with all of them, their captions and their numbers."""

from __future__ import annotations

from collections.abc import Iterable

from trady.records.files import write_json, write_lines
from trady.records.translated import file_errors
from trady.report.page import Figure, Part, Section, Table, Text, page
from trady.study.estimate import Estimate
from trady.study.figures import draw_all
from trady.study.folder import StudyFolder
from trady.study.noise import MOST_COORDINATES
from trady.study.stability import Agreement
from trady.study.statistics import Statistics


@file_errors()
def write_report(folder: StudyFolder, found: Statistics) -> None:
    """Write the figures, the page and, last, ``study.json``.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    drawn = draw_all(found, folder.figures)
    write_lines(folder.page, [as_page(found, drawn)])
    write_json(folder.statistics, found.to_json())


def as_page(found: Statistics, drawn: dict[str, str]) -> str:
    """Return the page.

    Args:
        found: Its numbers.
        drawn: Its figures as SVG, by the names of :data:`trady.study.figures.FIGURES`.
    """
    sections = [
        Section("What was run", _runs(found)),
        Section("Heavy tails", _tails(found, drawn)),
        Section("The ranking of layers", _ranking(found, drawn)),
        Section("The channels depend on the task", _channels(found, drawn)),
        Section("RGN against the norm", _kept(found, drawn)),
        Section("Learning the ranking online", _online(found, drawn)),
    ]
    where = (
        "all weights train"
        if found.settings.budget is None
        else f"{found.settings.policy} within {found.settings.budget}"
    )
    lead = (
        f"Stochastic gradients of {found.settings.model} while it is fine-tuned ({where}): {found.layers} layers with "
        f"{found.channels:,} input channels, {len(found.runs)} runs. The three observations are those of TraDy "
        "(arXiv 2510.19675); every number is from this model and these data sets."
    ).replace(",", " ", 1)
    return page(f"Training dynamics of {found.settings.model}", lead, sections)


def _runs(found: Statistics) -> list[Part]:
    settings = found.settings
    images = "all images" if settings.limit is None else f"at most {settings.limit} images of each part"
    every = "Every step" if settings.every == 1 else f"One step in {settings.every}"
    size = "the model's own image size" if settings.image_size is None else f"{settings.image_size} pixels"
    parts: list[Part] = [
        Text(
            f"Each run: {settings.epochs} epochs of {images} at {size}, batches of {settings.batch_size}, plain SGD at "
            f"a rate of {settings.lr} with warm-up and cosine, normalisation statistics fixed. {every} is recorded, "
            f"and at the beginning of each epoch the gradients of {settings.noise_batches} batches at the same weights."
        ),
        Table(
            ["data set", "seed", "recorded steps", "accuracy after the last epoch"],
            [[run.dataset, str(run.seed), str(run.steps), f"{run.accuracy:.1%}"] for run in found.runs],
        ),
    ]
    if found.without_gradient:
        parts.append(Text(f"No gradient ever reached: {', '.join(found.without_gradient)}."))
    return parts


def _tails(found: Statistics, drawn: dict[str, str]) -> list[Part]:
    last = [tails for tails in found.heavy_tails.epochs if tails.epoch == found.settings.epochs - 1]
    indices = "; ".join(
        f"{tails.dataset} {_estimate(tails.stable)}, control {_estimate(tails.gaussian)}" for tails in last
    )
    shares = "; ".join(
        f"{top.dataset} {top.carried.value:.0%}"
        for top in found.heavy_tails.top_shares
        if top.channels == 0.1 and top.epoch == found.settings.epochs - 1
    )
    return [
        Figure(
            drawn["tail-indices"],
            "Alpha-stable tail index of the gradient noise (2 is Gaussian, less is heavier), mean over seeds. The mean "
            f"over layers in the last epoch: {indices}. Noise is the gradient of a batch less the mean of "
            f"{found.settings.noise_batches} at the same weights, up to {MOST_COORDINATES} coordinates a layer; "
            "estimator of Mohammadi et al. 2015, as in Simsekli et al. 2019. The dashed control is Gaussian noise with "
            "the standard deviation of each coordinate: as far as it lies below 2, the tail comes from coordinates of "
            "different scale, and only what lies below the control is heavier than Gaussian coordinate by coordinate.",
            560,
        ),
        Figure(
            drawn["tail-curves"],
            "Share of the noise beyond a number of medians: the median over layers, epochs and seeds. A Gaussian falls "
            "off at once; a straight line would be a power law.",
            560,
        ),
        Table(
            ["data set", "epoch", "α", "control", "interval below 2", "below control", "Hill", "> exponential",
             "< exponential", "< log-normal"],
            [
                [tails.dataset, str(tails.epoch + 1), _estimate(tails.stable), _estimate(tails.gaussian),
                 f"{tails.below_two:.0%}", f"{tails.below_gaussian:.0%}", _estimate(tails.hill),
                 f"{tails.better_than_exponential:.0%}", f"{tails.worse_than_exponential:.0%}",
                 f"{tails.worse_than_lognormal:.0%}"]
                for tails in found.heavy_tails.epochs
            ],
            "Means over layers and seeds with 95 % bootstrap intervals over them; shares are of layers. Hill's index "
            "and the power law are of the largest 5 %; > and < say in how many layers the power law fits that tail "
            "better or worse than the other law (p < 0.05).",
        ),
        Figure(
            drawn["top-shares"],
            f"How much of the squared gradient norm of all layers the largest input channels of a step carry; the top "
            f"tenth in the last epoch: {shares}. Bars: 95 % bootstrap over recorded steps.",
            560,
        ),
        Table(
            ["data set", "epoch", "top 1 %", "top 5 %", "top 10 %"],
            [
                [dataset, str(epoch + 1), *(_percent(top.carried) for top in found.heavy_tails.top_shares
                                            if (top.dataset, top.epoch) == (dataset, epoch))]
                for dataset, epoch in dict.fromkeys((top.dataset, top.epoch) for top in found.heavy_tails.top_shares)
            ],
            "Share of the squared gradient norm.",
        ),
    ]  # fmt: skip


def _ranking(found: Statistics, drawn: dict[str, str]) -> list[Part]:
    stable = found.stability
    parts: list[Part] = [
        Figure(
            drawn["rank-matrix"],
            "Spearman's correlation of layer RGN between any two epochs of any two runs (data set, seed). "
            f"{_spoken(stable.layers)}. Layer RGN is the squared gradient norm of a layer, mean over the recorded "
            "steps of an epoch, over its weights and activations.",
            560,
        ),
        _agreements(
            stable.layers, "Spearman's correlation of layer RGN, between recordings that differ in one thing only."
        ),
        Figure(
            drawn["cumulated-rgn"],
            "Cumulated layer RGN over all runs on a data set. K layers hold 97 % of it: the pool.",
            560,
        ),
        Table(
            ["data set", "seed", "K at 97 %", "of all channels"],
            [
                [pool.dataset, str(pool.seed), f"{pool.k} of {found.layers}", f"{pool.channels_share:.0%}"]
                for pool in stable.pools
            ],
            "The pool of each run.",
        ),
    ]
    if stable.transfers:
        parts.append(
            Table(
                ["pool measured on", "gradient of", "K", "holds of the RGN", "of ‖∂L/∂W‖²", "layers in common"],
                [
                    [transfer.measured_on, transfer.held_on, str(transfer.k), f"{transfer.rgn:.1%}",
                     f"{transfer.squared_norm:.1%}", f"{transfer.overlap:.0%}"]
                    for transfer in stable.transfers
                ],
                "What the pool of one task holds of the gradient of another, that it was not measured on.",
            )
        )  # fmt: skip
    return parts


def _channels(found: Statistics, drawn: dict[str, str]) -> list[Part]:
    tested = "; ".join(
        f"between {kind} {sum(of) / len(of):.0%}"
        for kind in ("tasks", "seeds")
        if (of := [test.rejected_shares for test in found.importance if test.kind == kind])
    )
    return [
        Figure(
            drawn["task-tests"],
            "Channels whose mean share of their layer's gradient norm differs, layer by layer, mean over pairs of runs"
            f"{f': {tested} of all channels' if tested else ''}. Welch's t-test over recorded steps, corrected over "
            "all channels (Benjamini and Hochberg, false discovery rate 5 %). Two seeds of one task are the control: "
            f"steps of one run share its weights, so any two runs differ.{_over_runs(found)}",
            560,
        ),
        Table(
            ["samples", "between", "and", "number", "channels", "norms differ", "shares differ", "layers",
             "p < 0.05"],
            [
                ["runs" if test.kind == "runs" else "steps", test.left, test.right,
                 "{} and {}".format(*test.samples), str(test.channels),
                 f"{test.rejected:.0%}", f"{test.rejected_shares:.0%}", f"{test.layers_rejected:.0%}",
                 f"{test.uncorrected_shares:.0%}"]
                for test in found.importance
            ],
            "Share of channels whose mean differs: of the norm itself, and of its share of the layer's norm, which "
            "does not see that one task has larger gradients throughout. Layers: the share of them in which more than "
            "half of the channels differ by their shares. Last column: shares without the correction, 5 % by chance.",
        ),
        _agreements(
            found.stability.channels,
            "Spearman's correlation of channel norms within a layer, mean over layers with at least 8 channels.",
        ),
    ]  # fmt: skip


def _over_runs(found: Statistics) -> str:
    tests = [test for test in found.importance if test.kind == "runs"]
    if not tests:
        return ""
    share = sum(test.uncorrected_shares for test in tests) / len(tests)
    return (
        f" With one sample a run instead, {share:.0%} of the channels have p < 0.05 before any correction, where 5 % "
        "would be chance: more than that is the task's."
    )


def _kept(found: Statistics, drawn: dict[str, str]) -> list[Part]:
    shown = (0.01, 0.03, 0.12)
    return [
        Figure(
            drawn["kept-gradient"],
            "Share of the squared gradient norm (mean over all recorded steps) that fits in a budget of weights and "
            "activations, taking the channels of highest RGN first, of highest norm first, or at random.",
            560,
        ),
        Table(
            ["data set", "budget", "elements", "by RGN", "by norm", "at random"],
            [
                [point.dataset, f"{point.share:.0%}", _number(point.elements), f"{point.rgn:.1%}", f"{point.norm:.1%}",
                 f"{point.random:.1%}"]
                for point in found.kept
                if any(abs(point.share - share) < 0.1 * share for share in shown)
            ],
            "The same at three budgets.",
        ),
    ]  # fmt: skip


def _online(found: Statistics, drawn: dict[str, str]) -> list[Part]:
    return [
        Figure(
            drawn["online-ranking"],
            "Rank correlation of the layer RGN that is learnt from drawn channels alone with that from all gradients "
            "of the run (dotted: of the same steps only, without the ranking's own drift), and how many of the offline "
            "top-K layers (dashed line: all of them) it finds. Simulated on the recorded gradients: channels of all "
            "layers, drawn again for each batch.",
            560,
        ),
        Table(
            ["budget, elements", "draws", "Spearman", "lowest run", "on the same steps", "of the top K", "K offline",
             "K online"],
            [
                [_number(point.elements), str(point.draws), f"{point.spearman:.3f}", f"{point.spearman_least:.3f}",
                 f"{point.spearman_same_steps:.3f}", f"{point.overlap:.1f}", f"{point.k_offline:.1f}",
                 f"{point.k_online:.1f}"]
                for point in found.online
            ],
            "Means over the runs.",
        ),
    ]  # fmt: skip


def _agreements(agreements: Iterable[Agreement], caption: str) -> Table:
    rows = [
        [f"between {given.between}", str(given.pairs), f"{given.mean:.3f}", f"{given.least:.3f}"]
        for given in agreements
        if given.mean is not None and given.least is not None
    ]
    return Table(["", "pairs", "mean", "lowest"], rows, caption)


def _spoken(agreements: Iterable[Agreement]) -> str:
    named = [f"between {given.between} {given.mean:.2f}" for given in agreements if given.mean is not None]
    return f"On average {', '.join(named)}" if named else "There is one recording only"


def _estimate(estimate: Estimate | None) -> str:
    return "–" if estimate is None else str(estimate)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")
