"""What people do to fine-tune within little memory, and TraDy: which weights train, with which optimizer and rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.frontier.tasks import FrontierTask, Kind
from benchmarks.skipped import SkippedError
from trady.estimates.adapters import add_adapters
from trady.estimates.heads import head_of

#: Peaks of TraDy's policies, as multiples of that of inference.
RATIOS = (0.75, 1.0, 1.5, 2.0)
#: Smaller ones, which micro-batches make possible.
LOW_RATIOS = (0.1, 0.25, 0.5)

#: Learning rate of trady's policies on images; what is tried there is how far a channel's gradient is clipped.
CLIPPED_RATE = 0.1

Rates = Mapping[Kind, tuple[float, ...]]


@dataclass(frozen=True)
class Tuned:
    """A method of trady: a policy within a peak.

    Attributes:
        policy: Its name.
        ratio: The peak without weights and batch, over that of inference.
        most: Whether a batch is cut so that nearly as many weights train as can (``micro_batch="most"``).
    """

    policy: str
    ratio: float
    most: bool = False


@dataclass(frozen=True)
class Plain:
    """A method in plain PyTorch.

    Attributes:
        arm: Makes whatever trains require a gradient, and nothing else; it may change the model.
        forward_only: Whether the gradient is estimated from two forward passes.
    """

    arm: Callable[[FrontierTask, nn.Module], None]
    forward_only: bool = False


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: What ``--method`` takes.
        title: For people.
        line: Methods of one line of the picture; empty is a point of its own.
        way: How it trains.
        optimizer: Of plain PyTorch or of trady, by what the network reads.
        rates: What is tried, of which the best on held-out training data is taken: learning rates, or for policies of
            trady on images limits of a channel's gradient (``channel_clip``) at the learning rate :data:`CLIPPED_RATE`.
        needs: A package, as (module, extra).
    """

    name: str
    title: str
    line: str
    way: Plain | Tuned
    rates: Rates
    optimizer: Mapping[Kind, str]
    needs: tuple[str, str] | None = None


def _behind(task: FrontierTask, model: nn.Module, blocks: int) -> None:
    """Let the last blocks and all that is registered behind them train."""
    model.requires_grad_(False)
    found = task.blocks(model)
    first = next(found[len(found) - blocks].parameters())
    parameters = list(model.parameters())
    for parameter in parameters[next(i for i, p in enumerate(parameters) if p is first) :]:
        parameter.requires_grad_(True)


def _last_blocks(blocks: int, task: FrontierTask, model: nn.Module) -> None:
    count = len(task.blocks(model))
    if blocks > count:
        raise SkippedError(f"the network has {count} blocks")
    _behind(task, model, blocks)


def _head(task: FrontierTask, model: nn.Module) -> None:
    model.requires_grad_(False)
    head = head_of(model)
    assert head is not None
    head.requires_grad_(True)


def _biases(task: FrontierTask, model: nn.Module) -> None:
    _head(task, model)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "bias":
            parameter.requires_grad_(True)


def _adapters(task: FrontierTask, model: nn.Module, **options: Any) -> None:
    add_adapters(model, convolutions=task.kind == "image", **options)


def _everything(task: FrontierTask, model: nn.Module) -> None:
    model.requires_grad_(True)


_ADAM: Mapping[Kind, str] = {"image": "adamw", "text": "adamw"}
_SMALL: Rates = {"image": (1e-3, 3e-3, 1e-2), "text": (1e-3, 3e-3, 1e-2)}
_WHOLE: Rates = {"image": (3e-4, 1e-3, 3e-3), "text": (5e-5, 1e-4, 3e-4)}
_ADAPTERS: Rates = {"image": (1e-3, 3e-3, 1e-2), "text": (5e-4, 1e-3, 3e-3)}
#: On images a channel's gradient is nearly always longer than its limit, which therefore is what decides its step.
_CHANNELS: Rates = {"image": (0.01, 0.03, 0.1), "text": (5e-4, 1e-3, 2e-3)}
_FORWARD: Rates = {"image": (1e-6, 1e-5, 1e-4), "text": (1e-6, 1e-5, 1e-4)}
#: Plain SGD for convolutional networks, as the paper has it; a BERT hardly moves by it in a few hundred steps.
_OURS: Mapping[Kind, str] = {"image": "sgd", "text": "adamw"}
_PLAIN_SGD: Mapping[Kind, str] = {"image": "sgd", "text": "sgd"}
_PEFT = ("peft", "benchmarks")


def _tuned(policy: str, title: str, ratio: float) -> Method:
    tuned = Tuned(policy, ratio, most=ratio in LOW_RATIOS)
    return Method(f"{policy}@{ratio:g}", f"{title}, {ratio:g} ×", title, tuned, _CHANNELS, _OURS)


def _blocks(k: int) -> Method:
    title = f"last {k} block{'s' * (k > 1)}"
    return Method(f"last-{k}", title, "last k blocks", Plain(partial(_last_blocks, k)), _WHOLE, _ADAM)


#: In the order in which they are run: what the argument needs most goes first.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("head", "head alone", "", Plain(_head), _SMALL, _ADAM),
        *(_tuned("trady+", "trady+", ratio) for ratio in RATIOS),
        *(_blocks(k) for k in (1, 2, 3, 5)),
        Method("full", "full fine-tuning", "full fine-tuning", Plain(_everything), _WHOLE, _ADAM),
        Method("lora", "LoRA r8", "LoRA", Plain(_adapters), _ADAPTERS, _ADAM, _PEFT),
        *(_tuned("trady", "trady", ratio) for ratio in RATIOS),
        *(_tuned("static-random", "static random", ratio) for ratio in RATIOS),
        Method("bitfit", "BitFit", "BitFit", Plain(_biases), _SMALL, _ADAM),
        *(_tuned("trady+", "trady+", ratio) for ratio in LOW_RATIOS),
        *(_blocks(k) for k in (4, 6, 8, 12, 16)),
        Method("dora", "DoRA r8", "DoRA", Plain(partial(_adapters, use_dora=True)), _ADAPTERS, _ADAM, _PEFT),
        Method("rslora", "rsLoRA r8", "rsLoRA", Plain(partial(_adapters, use_rslora=True)), _ADAPTERS, _ADAM, _PEFT),
        Method("mezo", "MeZO (forward only)", "", Plain(_everything, forward_only=True), _FORWARD, _PLAIN_SGD),
        *(_tuned("trady", "trady", ratio) for ratio in LOW_RATIOS),
        *(_blocks(k) for k in (7, 9, 10, 11, 13, 14, 15, 17)),
    )
}


@contextmanager
def perturbed(parameters: list[nn.Parameter], seed: int, scale: float) -> Iterator[None]:
    """Add scaled normal noise to parameters for a time; the noise is drawn again instead of kept."""
    add_noise(parameters, seed, scale)
    try:
        yield
    finally:
        add_noise(parameters, seed, -scale)


@torch.no_grad()
def add_noise(parameters: list[nn.Parameter], seed: int, scale: float) -> None:
    """Add ``scale`` times the normal noise of a seed to parameters, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def forward_only_step(parameters: list[nn.Parameter], loss: Callable[[], Tensor], rate: float, seed: int) -> float:
    """One step of MeZO (arXiv 2305.17333): two losses, and the noise once more for the update.

    Returns:
        The mean of the two losses.
    """
    epsilon = 1e-3
    with torch.no_grad():
        with perturbed(parameters, seed, epsilon):
            above = float(loss())
        with perturbed(parameters, seed, -epsilon):
            below = float(loss())
    add_noise(parameters, seed, -rate * (above - below) / (2 * epsilon))
    return (above + below) / 2
