"""LoRA (arXiv 2106.09685) by peft: adapters beside the layers of a frozen network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from trady.estimates.heads import head_of
from trady.estimates.unsuitable import UnsuitableMethodError, needs

#: The rank of peft's documentation.
RANK = 8

#: Adapters beside every layer but the head, and where peft puts them by itself.
ALL, PEFTS_OWN = "all", "peft"

_HALF = (torch.float16, torch.bfloat16)


def add_adapters(
    model: nn.Module,
    *,
    rank: int = RANK,
    targets: str | Sequence[str] = ALL,
    convolutions: bool | None = None,
    **variant: bool,
) -> str:
    """Freeze a model, put an adapter beside its layers, and let those and the head train.

    A head that has a vocabulary's size stays frozen, as peft leaves it. Adapters beside weights of half precision are
    float32, as ``peft.get_peft_model`` makes them.

    Args:
        model: Changed in place; with or without memory.
        rank: Of the adapters.
        targets: ``"all"`` is every layer but the head, ``"peft"`` where peft puts them for models of this type; or
            names of layers, the whole or what follows the last points: ``q_proj``, ``mlp.down_proj``.
        convolutions: Whether ``"all"`` takes convolutions too; ``None`` is where the model lives in them. Those with
            groups never are (peft's rank must be divisible by the groups), nor subclasses of ``nn.Conv2d`` with a
            kernel (peft builds one of the same class for the adapter, without that class's own arguments).
        variant: Switches of ``peft.LoraConfig``, such as ``use_dora``.

    Returns:
        What was targeted, for people.

    Raises:
        MissingPackageError: peft is not installed.
        UnsuitableMethodError: There is no such layer.

    """
    peft = needs("peft", "benchmarks")
    convolutions = lives_in_convolutions(model) if convolutions is None else convolutions
    if convolutions:
        _make_pointwise_plain(model)
    head, language_model = head_of(model), hasattr(model, "lm_head")
    names = _possible(model, head, convolutions)
    if targets == PEFTS_OWN:
        wanted, fans = None, False
    else:
        chosen = names if targets == ALL else _chosen(names, [targets] if isinstance(targets, str) else targets)
        wanted, fans, names = [name for kind in chosen.values() for name in kind], bool(chosen.get("Conv1D")), chosen
        if not wanted:
            raise UnsuitableMethodError("the network has no layer that an adapter could stand beside")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=wanted, fan_in_fan_out=fans, **variant
    )
    model.requires_grad_(False)
    bare = any(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta") if bare else nullcontext():
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UnsuitableMethodError(f"peft finds no layers in a {type(model).__name__}: {error}") from error
    _complete(model)
    if head is not None and not language_model:
        head.requires_grad_(True)
    if wanted is None:
        placed = sum(hasattr(module, "lora_A") for module in model.modules())
        found = f"{placed} layers of peft's own choice"
    else:
        found = " and ".join(f"{len(layers)} {kind} layers" for kind, layers in names.items() if layers)
    return f"rank {rank} on {found}" + ("" if language_model else ", and the head")


def lives_in_convolutions(model: nn.Module) -> bool:
    """Whether a network has most of its convolutions and linear layers' weights in convolutions, the head aside."""
    head = head_of(model)
    of_kind = {nn.Conv2d: 0, nn.Linear: 0}
    for module in model.modules():
        for kind in of_kind:
            if isinstance(module, kind) and module is not head:
                of_kind[kind] += module.weight.numel()  # type: ignore[operator]
    return of_kind[nn.Conv2d] > of_kind[nn.Linear]


def _possible(model: nn.Module, head: nn.Module | None, convolutions: bool) -> dict[str, list[str]]:
    untouched = {id(head), id(getattr(model, "lm_head", None))}
    names: dict[str, list[str]] = {"linear": [], "Conv1D": [], "convolution": []}
    for name, module in model.named_modules():
        if id(module) in untouched:
            continue
        if isinstance(module, nn.Linear):
            names["linear"].append(name)
        elif type(module).__name__ == "Conv1D":  # a linear layer of transformers with its weight transposed
            names["Conv1D"].append(name)
        elif convolutions and type(module) is nn.Conv2d and module.groups == 1:
            names["convolution"].append(name)
    return names


def _chosen(names: dict[str, list[str]], targets: Sequence[str]) -> dict[str, list[str]]:
    """Return the layers that are meant.

    Raises:
        UnsuitableMethodError: A target is no layer's name.

    """
    everything = [name for kind in names.values() for name in kind]
    for target in targets:
        if not any(_matches(name, target) for name in everything):
            there = dict.fromkeys(name.rpartition(".")[2] for name in everything)
            raise UnsuitableMethodError(
                f"no layer is called {target!r}; adapters can stand beside {', '.join(there) or 'none'}, or {ALL!r}"
            )
    return {
        kind: [name for name in found if any(_matches(name, target) for target in targets)]
        for kind, found in names.items()
    }


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _complete(model: nn.Module) -> None:
    """Do to fresh adapters what ``get_peft_model`` does, and what MobileNetV2 needs."""
    for module in model.modules():
        base: Any = getattr(module, "base_layer", None)
        if isinstance(base, nn.Conv2d):  # MobileNetV2 of transformers reads them, to pad as TensorFlow does
            for name in ("kernel_size", "stride", "dilation"):
                setattr(module, name, getattr(base, name))
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()


def _make_pointwise_plain(model: nn.Module) -> None:
    """Put an ``nn.Conv2d`` of the same weights where a subclass of it is 1×1: it has nothing to pad."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if (
                isinstance(module, nn.Conv2d)
                and type(module) is not nn.Conv2d
                and (*module.kernel_size, *module.stride, module.groups) == (1, 1, 1, 1, 1)
            ):
                plain = nn.Conv2d(module.in_channels, module.out_channels, 1, bias=module.bias is not None)
                plain.weight, plain.bias = module.weight, module.bias
                setattr(parent, name, plain)
