"""Options that several commands have, and how their results leave."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trady.cli import choices
from trady.cli.choices import choice

if TYPE_CHECKING:
    from trady.planning.budget import Budget
    from trady.planning.request import Request
    from trady.policies import Policy as PolicyObject
    from trady.training.run_folder import RunFolder

#: Where a context keeps the words of the command line.
COMMAND_LINE = "trady command line"

#: Panels of ``--help``.
BUDGET, TRAINS, TRAINING, DATA, FOLDER, OUTPUT = (
    "What it may take",
    "What trains",
    "How it trains",
    "Data",
    "Run folder",
    "Output",
)

Model = Annotated[
    str,
    typer.Argument(
        help="efficientnet-lite0; a run folder, to go on from; a folder or a Hub name (transformers); or "
        "package.module:function. trady models lists them.",
        callback=choices.check_model,
        autocompletion=choices.complete_model,
    ),
]

PlannedModel = Annotated[
    str,
    typer.Argument(
        help="efficientnet-lite0; a folder, a config.json or a Hub name (transformers; weights are not needed); "
        "or package.module:function.",
        callback=choices.check_model,
        autocompletion=choices.complete_model,
    ),
]


def _dataset(text: str) -> Any:
    return typer.Argument(help=text, callback=choices.check_dataset, autocompletion=choices.complete_dataset)


Images = Annotated[str, _dataset("fashion-mnist; a .npz file; or a folder of images.")]

Dataset = Annotated[
    str,
    _dataset(
        "Images: fashion-mnist; a .npz file; a folder. Texts: a table (.csv, .tsv, .jsonl, .parquet), a .txt file, a "
        "folder of them, or a Hub name."
    ),
]

#: The registries' names; a test holds them equal, so that ``--help`` and a typo need not load them.
POLICIES = (
    "dynamic-norm",
    "dynamic-random",
    "dynamic-rgn",
    "fisher",
    "full",
    "head",
    "medyate",
    "sparse-update",
    "static-norm",
    "static-random",
    "static-rgn",
    "static-topk-random",
    "trady",
    "trady+",
    "velocity",
)

OPTIMIZERS = ("sgd", "adam", "adamw", "sgd-in-backward", "adamw-in-backward")

AUGMENTATIONS = ("none", "light", "paper")

DTYPES = ("float32", "bfloat16", "float16")

Policy = Annotated[str, choice(possible=POLICIES, panel=TRAINS, text=f"Where to update: {', '.join(POLICIES)}.")]

Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        help="For --policy sparse-update: a scheme that trady search has written.",
        rich_help_panel=TRAINS,
    ),
]

Recompute = Annotated[
    str,
    choice(
        possible=("auto", "all", "none"),
        panel=BUDGET,
        text="What the backward pass recomputes instead of keeping it: as little as the budget allows (auto), "
        "all, or none.",
    ),
]

Fidelity = Annotated[
    str,
    choice(
        possible=("exact", "8bit", "4bit"),
        panel=BUDGET,
        text="How exactly smooth activations that are kept (GELU, SiLU, Mish) are differentiated: exact, 8bit or 4bit.",
    ),
]

MicroBatch = Annotated[
    str | None,
    typer.Option(
        help="Samples a forward and backward pass; a step adds up several. auto: as many as the budget allows. "
        "most: few enough that nearly as many weights train as can.",
        rich_help_panel=BUDGET,
        autocompletion=choices.completing(("auto", "most")),
    ),
]

Train = Annotated[
    list[str] | None,
    typer.Option(
        "--train",
        help="Draw from these layers alone: names or patterns; repeat for more.",
        rich_help_panel=TRAINS,
    ),
]

Freeze = Annotated[
    list[str] | None,
    typer.Option(
        "--freeze",
        help="Keep these layers as they are: names or patterns; repeat for more.",
        rich_help_panel=TRAINS,
    ),
]

OverBudget = Annotated[
    str,
    choice(
        possible=("adapt", "refuse", "warn"),
        panel=BUDGET,
        text="Where not even one sample of a batch fits: train fewer channels from then on (adapt), refuse, or warn.",
    ),
]

MaxStepFlops = Annotated[
    str | None,
    typer.Option(
        help='What a step may take of the operations of full fine-tuning, e.g. "0.6x": channels are drawn from layers '
        "that the backward pass reaches within that.",
        rich_help_panel=BUDGET,
    ),
]

RankingFile = Annotated[
    str | None,
    typer.Option(
        "--ranking",
        help="A layer ranking that trady rank has written, or: online (learn it in the first epoch), structural "
        "(guess it from shapes). Without: the prior of this structure, else online.",
        rich_help_panel=TRAINS,
        callback=choices.check_ranking,
        autocompletion=choices.complete_ranking,
    ),
]

ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Height and width of the images; the model's own by default.", rich_help_panel=DATA),
]

BatchSize = Annotated[int, typer.Option(min=1, help="Samples a step.", rich_help_panel=TRAINING)]

Classes = Annotated[int, typer.Option(min=1, help="Outputs of the head.", rich_help_panel=DATA)]

Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Up to n examples, drawn with the seed, a part.", rich_help_panel=DATA),
]

OnUnreadable = Annotated[
    str,
    choice(
        possible=("refuse", "skip"), panel=DATA, text="Files that cannot be read: refuse them, all named, or skip them."
    ),
]

Dtype = Annotated[
    str | None,
    choice(possible=DTYPES, panel=TRAINING, text="float32, bfloat16 or float16; the model's own by default."),
]

Seed = Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=TRAINING)]

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else.", rich_help_panel=OUTPUT)
]

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Say nothing on standard error but warnings and errors.",
        rich_help_panel=OUTPUT,
    ),
]

LogFile = Annotated[
    str | None,
    typer.Option("--log-file", help="Also append what is said, with the time, to this file.", rich_help_panel=OUTPUT),
]


def read_budget(text: str | None, policy: str = "trady") -> str | Budget | None:
    """Read a budget; a share such as ``80%`` is of the memory that is free now.

    Raises:
        BudgetError: It cannot be read, or is for a policy that takes none.
    """
    from trady.errors import BudgetError
    from trady.planning.budget import Budget, parse_budget
    from trady.planning.scopes import PEAK
    from trady.process.free import free_memory
    from trady.report.units import format_bytes

    if text is None or text == "auto":
        return text
    if policy == "full":
        raise BudgetError(
            "--policy full trains everything with plain PyTorch, which keeps to no budget: leave --budget out, or take "
            f"--policy trady, which trains as much as --budget {text!r} has room for"
        )
    if not text.strip().endswith("%"):
        return parse_budget(text)
    try:
        share = float(text.strip().removesuffix("%"))
    except ValueError:
        share = math.nan
    if not 0 < share <= 100:
        raise BudgetError(f"--budget {text!r} is no share of what is free; type e.g. --budget 80%")
    free, where = free_memory()
    if free is None:
        raise BudgetError(f"this system does not say what memory is free; type an amount, not {text!r}: --budget 2GiB")
    amount = int(free * share / 100) >> 20 << 20
    if not amount:
        raise BudgetError(f"--budget {text!r} is less than 1 MiB: {where} has {format_bytes(free)} free")
    return Budget(PEAK, amount)


def read_limit(text: str, option: str) -> float | Literal["auto"]:
    """Read a number, or ``auto``.

    Raises:
        typer.BadParameter: It is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto", param_hint=option) from None


def read_policy(name: str, scheme: str | None) -> str | PolicyObject:
    """Return a policy by name, or sparse-update with the scheme of a file.

    Raises:
        PolicyError: There is no such policy, or the scheme is missing, cannot be read, or is for no policy.
    """
    from trady.errors import PolicyError
    from trady.policies import Scheme as SchemeFile
    from trady.policies import SparseUpdate, get_policy

    get_policy(name)
    if name == SparseUpdate.name:
        if scheme is None:
            SparseUpdate().check_scheme()
        return SparseUpdate(SchemeFile.load(str(scheme)))
    if scheme is not None:
        raise PolicyError(f"--scheme is for --policy sparse-update, not for {name}")
    return name


def read_request(
    *,
    budget: str | None = None,
    policy: str = "trady",
    scheme: str | None = None,
    ranking: str | None = None,
    seed: int = 0,
    recompute: str = "auto",
    fidelity: str = "exact",
    micro_batch: str | None = None,
    train: list[str] | None = None,
    freeze: list[str] | None = None,
    calls_per_step: int = 1,
    accumulates: bool = False,
    over_budget: str = "adapt",
    max_step_flops: str | None = None,
    ranks: int = 1,
) -> Request:
    """Read what is asked for, from the words of a command line.

    Raises:
        BudgetError: The budget cannot be read, or a word is not known.
        PolicyError: See :func:`read_policy`.
        RankingError: The ranking cannot be read.

    """
    from trady.planning.process_memory import ready_for
    from trady.planning.request import Request
    from trady.ranking.priors import read_ranking

    request = Request(
        budget=read_budget(budget, policy),
        policy=read_policy(policy, scheme),
        ranking=None if ranking is None else read_ranking(ranking),
        seed=seed,
        recompute=recompute,
        fidelity=fidelity,
        micro_batch=int(micro_batch) if micro_batch is not None and micro_batch.isdecimal() else micro_batch,
        train=train or None,
        freeze=freeze or None,
        calls_per_step=calls_per_step,
        accumulates=accumulates,
        over_budget=over_budget,
        max_step_flops=max_step_flops,
        ranks=ranks,
    )
    ready_for(request.limit)  # before a model or a data set is read
    return request


def with_budget_of(request: Request, folder: RunFolder) -> Request:
    """Return a request with the budget that the run in a folder has found."""
    from dataclasses import replace

    from trady.planning.plan import Plan

    return replace(request, budget=Plan.load(folder.plan).budget) if folder.plan.exists() else request


def print_json(value: Any) -> None:
    """Print a result for machines."""
    typer.echo(json.dumps(value, indent=2))


def print_rich(value: Any, width: int = 120) -> None:
    """Print a result for people, as wide as it needs to be where neither a terminal nor ``$COLUMNS`` limits it."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        console = Console(highlight=False, width=width)
    console.print(value)
