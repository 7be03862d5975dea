"""LoRA (arXiv 2106.09685) by peft, as its documentation recommends: adapters of rank 8 on every layer."""

from __future__ import annotations

from torch import nn

from benchmarks.heads import head_of
from benchmarks.tasks import needs

RANK = 8


def add_adapters(model: nn.Module, rank: int = RANK, *, convolutions: bool, **variant: bool) -> str:
    """Freeze a model, put an adapter beside every layer but the head, and let those and the head train.

    A head that has a vocabulary's size stays frozen, as peft leaves it.

    Args:
        model: Changed in place.
        rank: Of the adapters; they are scaled by 2.
        convolutions: Whether convolutions get adapters too. Those with groups never do (peft's rank must be
            divisible by the groups), nor do subclasses of ``nn.Conv2d`` with a kernel (peft builds one of
            the same class for the adapter, without that class's own arguments).
        variant: Switches of ``peft.LoraConfig``, such as ``use_dora``.

    Returns:
        What was targeted, for people.

    Raises:
        MissingPackageError: peft is not installed.

    """
    peft = needs("peft", "benchmarks")
    if convolutions:
        _make_pointwise_plain(model)
    head, language_model = head_of(model), hasattr(model, "lm_head")
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
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[name for kind in names.values() for name in kind],
        fan_in_fan_out=bool(names["Conv1D"]),
        **variant,
    )
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, model)
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Conv2d):  # MobileNetV2 of transformers reads them, to pad as TensorFlow does
            for name in ("kernel_size", "stride", "dilation"):
                setattr(module, name, getattr(base, name))
    if head is not None and not language_model:
        head.requires_grad_(True)
    targets = " and ".join(f"{len(found)} {kind} layers" for kind, found in names.items() if found)
    return f"rank {rank} on {targets}" + ("" if language_model else ", and the head")


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
