"""The base of QLoRA (arXiv 2305.14314): linear layers stored in 4 or 8 bits by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trady.estimates.heads import head_of
from trady.estimates.unsuitable import UnsuitableMethodError, needs

#: Bits of a weight that bitsandbytes can store.
BITS = (4, 8)


def quantize_base(model: nn.Module, bits: int, where: Callable[[nn.Module, str], bool] | None = None) -> str:
    """Store the linear layers of a model in bits: NF4 with scales quantised again, or int8 with a scale a row.

    Args:
        model: Changed in place; with or without memory.
        bits: 4 or 8.
        where: Takes a module and its name; says whether it is stored so. Without it all are, except the head, as
            transformers leaves it.

    Returns:
        What was stored, for people.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
        UnsuitableMethodError: There is no linear layer.

    """
    library = needs("bitsandbytes", "benchmarks")
    layers = library.nn
    # It keeps the first table of codes that it makes for all that comes: that must be one with values.
    library.functional.quantize_4bit(torch.zeros(64), compress_statistics=True)
    untouched = {id(head_of(model)), id(getattr(model, "lm_head", None))}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and (id(module) not in untouched if where is None else where(module, name))
    ]
    if not found:
        raise UnsuitableMethodError(f"the network has no linear layer in front of its head to store in {bits} bits")
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _stored(layers, module, bits).train(module.training))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # peft asks
    kind = "NF4, scales quantised again" if bits == 4 else "int8"
    return f"{len(found)} linear layers in {bits} bits ({kind})"


def _stored(layers: Any, plain: nn.Module, bits: int) -> nn.Module:
    weight: torch.Tensor = plain.weight.detach()  # type: ignore[operator]
    if not isinstance(plain, nn.Linear):  # transformers' Conv1D
        weight = weight.t().contiguous()
    outputs, inputs = weight.shape
    bias = plain._parameters.get("bias")
    with torch.device("meta"):
        layer: Any = (
            layers.Linear4bit(inputs, outputs, False, quant_type="nf4", compute_dtype=weight.dtype)
            if bits == 4
            else layers.Linear8bitLt(inputs, outputs, False, has_fp16_weights=False)
        )
    if bits == 4:
        # It would repack its weights in evaluation mode, and let no gradient through from then on.
        layer.support_avx512bf16_for_cpu = False
        fresh = layers.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    else:
        fresh = layers.Int8Params(weight, requires_grad=False)
    layer.weight = fresh._quantize(weight.device)
    layer.bias = bias
    return layer  # type: ignore[no-any-return]
