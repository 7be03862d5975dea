"""Options that several commands have, and how their results leave."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from trady.planning.request import Request
    from trady.policies import Policy as PolicyObject

#: Where a context keeps the words of the command line.
COMMAND_LINE = "trady command line"

Model = Annotated[
    str,
    typer.Argument(
        help="efficientnet-lite0; a run folder, to go on from; a folder or a Hub name (transformers); or "
        "package.module:function."
    ),
]

PlannedModel = Annotated[
    str,
    typer.Argument(
        help="efficientnet-lite0; a folder, a config.json or a Hub name (transformers; weights are not needed); "
        "or package.module:function."
    ),
]

Dataset = Annotated[str, typer.Argument(help="fashion-mnist; a .npz file; or a folder of images.")]

#: The registry's names; a test holds them equal, so that ``--help`` need not load it.
POLICIES = (
    "dynamic-norm, dynamic-random, dynamic-rgn, fisher, full, head, medyate, sparse-update, static-norm, "
    "static-random, static-rgn, static-topk-random, trady, trady+, velocity"
)

Policy = Annotated[str, typer.Option(help=f"Where to update: {POLICIES}.")]

Scheme = Annotated[
    str | None, typer.Option("--scheme", help="For --policy sparse-update: a scheme that trady search has written.")
]

Recompute = Annotated[
    str,
    typer.Option(
        help="What the backward pass recomputes instead of keeping it: as little as the budget allows (auto), "
        "all, or none."
    ),
]

Fidelity = Annotated[
    str,
    typer.Option(
        help="How exactly smooth activations that are kept (GELU, SiLU, Mish) are differentiated: exact, 8bit or 4bit."
    ),
]

MicroBatch = Annotated[
    str | None,
    typer.Option(
        help="Samples a forward and backward pass; a step adds up several. auto: as many as the budget allows. "
        "most: few enough that nearly as many weights train as can."
    ),
]

Train = Annotated[
    list[str] | None, typer.Option("--train", help="Draw from these layers alone: names or patterns; repeat for more.")
]

Freeze = Annotated[
    list[str] | None,
    typer.Option("--freeze", help="Keep these layers as they are: names or patterns; repeat for more."),
]

OverBudget = Annotated[
    str,
    typer.Option(
        help="Where not even one sample of a batch fits: train fewer channels from then on (adapt), refuse, or warn."
    ),
]

MaxStepFlops = Annotated[
    str | None,
    typer.Option(
        help='What a step may take of the operations of full fine-tuning, e.g. "0.6x": channels are drawn from layers '
        "that the backward pass reaches within that."
    ),
]

RankingFile = Annotated[
    str | None,
    typer.Option(
        "--ranking",
        help="A layer ranking that trady rank has written, or: online (learn it in the first epoch), structural "
        "(guess it from shapes). Without: the prior of this structure, else online.",
    ),
]

ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Height and width of the images; the model's own by default.")
]

BatchSize = Annotated[int, typer.Option(min=1, help="Images a step.")]

Classes = Annotated[int, typer.Option(min=1, help="Outputs of the head.")]

Limit = Annotated[int | None, typer.Option(min=1, help="Up to n images, drawn with the seed, a part.")]

OnUnreadable = Annotated[str, typer.Option(help="An image that cannot be read: refuse it, or skip it.")]

Seed = Annotated[int, typer.Option(help="Seed of everything random.")]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


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
        budget=budget,
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


def print_json(value: Any) -> None:
    """Print a result for machines."""
    typer.echo(json.dumps(value, indent=2))


def print_rich(value: Any, width: int = 120) -> None:
    """Print a result for people, as wide as it needs to be where nobody's terminal limits it."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=width)
    console.print(value)
