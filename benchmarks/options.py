"""What the commands share: where files are looked for, the choice of workloads, JSON, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trady.errors import ModelError, TradyError

#: Beside the repository.
DEFAULT_MODELS = Path(__file__).resolve().parent.parent.parent / "shared" / "models"


def add_models(parser: argparse.ArgumentParser) -> None:
    """Offer ``--models``."""
    parser.add_argument(
        "--models",
        metavar="DIR",
        help="folder with the backbones' .json and .safetensors files "
        "(default: $TRADY_MODELS, or ../shared/models beside the repository)",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Offer ``--images``."""
    parser.add_argument(
        "--images",
        metavar="NPZ",
        help="labelled ImageNet images (default: imagenet-samples-250.npz in data/ beside the models' folder)",
    )


def add_workloads(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Offer ``--workload``."""
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=list(names),
        default=list(names),
        metavar="NAME",
        help=f"which ones (default: all of {', '.join(names)})",
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Offer ``--channels-last``."""
    parser.add_argument("--channels-last", action="store_true", help="model and images in PyTorch's other layout")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Offer ``--device``."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where steps run (default: cpu)")


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device that :func:`add_device` asked for.

    Raises:
        ModelError: There is none.

    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: PyTorch finds no CUDA device here; --device cpu accounts for the same steps")
    return torch.device(options.device)


def add_methods(parser: argparse.ArgumentParser, names: Collection[str], default: Collection[str]) -> None:
    """Offer ``--method``."""
    usual = "all" if set(default) == set(names) else ", ".join(default)
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(names),
        default=list(default),
        metavar="NAME",
        help=f"which methods, out of {', '.join(names)} (default: {usual})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Offer ``--json``."""
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file; - is standard output")


def console_for(json_target: str | None) -> Console:
    """Return where tables go: standard output, unless that is JSON's; wide enough for them where it is a file."""
    console = Console(stderr=json_target == "-")
    return console if console.is_terminal else Console(stderr=json_target == "-", width=max(console.width, 140))


def models_folder(given: str | None) -> Path:
    """Return the folder of the backbones: the one given, that of the environment, or the default."""
    return Path(given or os.environ.get("TRADY_MODELS") or DEFAULT_MODELS)


def images_file(given: str | None, models: Path) -> Path:
    """Return the file of labelled images: the one given, or the default beside the models."""
    return Path(given) if given else models.parent / "data" / "imagenet-samples-250.npz"


def write_json(target: str | None, figures: dict[str, Any]) -> None:
    """Write a command's figures, together with the machine they are of."""
    if target is None:
        return
    text = json.dumps({"machine": machine(), **figures}, indent=1)
    if target == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What timings depend on."""
    return {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
    }


def main(run: Callable[[], int]) -> None:
    """Run a command and leave with its exit code: 1 for a missed bar, 2 for what the user can mend."""
    try:
        code = run()
    except TradyError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 2
    sys.exit(code)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Context in which SIGTERM does what Ctrl-C does, so that what was measured until then is written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
