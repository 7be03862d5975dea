"""Ways to fine-tune, each as what it does to a model; they can be asked for by name.

A method is one function and one registration. It is given a model of its own, with or without memory, and leaves it in
the mode in which it trains, with ``requires_grad`` where it trains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from trady.errors import ModelError
from trady.estimates.adapters import ALL, RANK, add_adapters
from trady.estimates.checkpointing import checkpoint_blocks
from trady.estimates.heads import blocks_of, head_of, train_with_fixed_statistics
from trady.estimates.quantized_base import quantize_base
from trady.estimates.unsuitable import UnsuitableMethodError


@dataclass(frozen=True)
class Settings:
    """What methods are told beside the model.

    Attributes:
        rank: Of adapters.
        targets: Where adapters stand (:func:`trady.estimates.adapters.add_adapters`).
        block_classes: Class names of the model's blocks; without any they are found.
        convolutions: Whether adapters stand beside convolutions too; ``None`` is where the model lives in them.
    """

    rank: int = RANK
    targets: str | Sequence[str] = ALL
    block_classes: tuple[str, ...] = ()
    convolutions: bool | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"the rank of adapters is {self.rank}; it is at least 1")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: What a user types.
        title: For people.
        apply: Changes a model in place; returns what a reader should know, or nothing.
    """

    name: str
    title: str
    apply: Callable[[nn.Module, Settings], str]


def _full(model: nn.Module, settings: Settings, *, checkpoint: bool = False) -> str:
    model.requires_grad_(True).train()
    return checkpoint_blocks(model, settings.block_classes) if checkpoint else ""


def _lora(model: nn.Module, settings: Settings, *, bits: int | None = None, checkpoint: bool = False) -> str:
    notes = [] if bits is None else [quantize_base(model, bits)]
    where = checkpoint_blocks(model, settings.block_classes) if checkpoint else ""
    notes += [
        add_adapters(model, rank=settings.rank, targets=settings.targets, convolutions=settings.convolutions),
        where,
    ]
    train_with_fixed_statistics(model)
    return ", ".join(filter(None, notes))


def _bitfit(model: nn.Module, settings: Settings) -> str:
    biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    body = set(model.parameters()) - set((head_of(model) or nn.Module()).parameters())
    if body.isdisjoint(biases):
        raise UnsuitableMethodError("the network has no bias in front of its head")
    model.requires_grad_(False)
    train_with_fixed_statistics(model)
    for bias in biases:
        bias.requires_grad_(True)
    return f"{len(biases)} biases"


def _head(model: nn.Module, settings: Settings) -> str:
    head = head_of(model)
    if head is None:
        raise UnsuitableMethodError(
            "the output layer is tied to the embedding: there is no head that could train alone"
            if any(isinstance(module, nn.Linear) for module in model.modules())
            else "the network has no linear layer that would be its head"
        )
    model.requires_grad_(False)
    train_with_fixed_statistics(model)
    head.requires_grad_(True)
    return ""


def _last(model: nn.Module, settings: Settings, *, count: int) -> str:
    blocks = blocks_of(model, settings.block_classes)
    if count > len(blocks):
        raise UnsuitableMethodError(f"the network has {len(blocks) or 'no'} blocks that repeat")
    model.requires_grad_(False)
    parameters = list(model.parameters())
    first = next(blocks[-count].parameters())
    place = next(i for i, parameter in enumerate(parameters) if parameter is first)
    for parameter in parameters[place:]:  # and all that is registered behind them: the last normalisation, the head
        parameter.requires_grad_(True)
    train_with_fixed_statistics(model)
    return f"{count} of {len(blocks)} {type(blocks[0]).__name__}, and what stands behind them"


#: In the order of tables.
METHODS: dict[str, Method] = {}


def register_method(name: str, title: str, apply: Callable[[nn.Module, Settings], str]) -> None:
    """Have a method known by a name."""
    METHODS[name] = Method(name, title, apply)


register_method("full", "full fine-tuning", _full)
register_method("checkpoint", "full + checkpointing", partial(_full, checkpoint=True))
register_method("lora", "LoRA", _lora)
register_method("lora-checkpoint", "LoRA + checkpointing", partial(_lora, checkpoint=True))
register_method("qlora", "QLoRA, 4 bits", partial(_lora, bits=4))
register_method("qlora-checkpoint", "QLoRA, 4 bits + checkpointing", partial(_lora, bits=4, checkpoint=True))
register_method("qlora-8bit", "QLoRA, 8 bits", partial(_lora, bits=8))
register_method("qlora-8bit-checkpoint", "QLoRA, 8 bits + checkpointing", partial(_lora, bits=8, checkpoint=True))
register_method("bitfit", "BitFit", _bitfit)
register_method("head", "head only", _head)

#: TraDy itself: no model that is changed, but a budget that is planned for.
TRADY = "trady"

_LAST = re.compile(r"last-([1-9][0-9]{0,3})")


def read_method(name: str) -> Method:
    """Return the method of a name; ``last-2`` is that of the last two blocks.

    Raises:
        ModelError: There is no such method.

    """
    if (match := _LAST.fullmatch(name)) is not None:
        count = int(match[1])
        return Method(name, f"last {count} block{'s' * (count > 1)}", partial(_last, count=count))
    if name not in METHODS:
        raise ModelError(f"no method {name!r}; there are {', '.join(METHODS)}, last-N (the last N blocks) and {TRADY}")
    return METHODS[name]
