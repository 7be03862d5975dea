"""Quantised layers back in floating point, with what training has changed in their weights."""

from __future__ import annotations

from torch import nn

from trady.model.prepared import refuse_prepared
from trady.quantized.linear import QuantizedLinear, route


def dequantize(model: nn.Module) -> nn.Module:
    """Turn every quantised linear layer into a ``torch.nn.Linear`` in floating point, float channels in its weight.

    This is the only lossless way to a single weight: quantised again, the float channels would be rounded to steps
    larger than what training has changed.

    Args:
        model: A model that is finished, or was never prepared; its modules are replaced in place.

    Returns:
        The model; a new module if the model is itself such a layer.

    Raises:
        StateError: It is prepared: call ``finish()`` on its tuner first.

    """
    refuse_prepared(model)
    layers = {id(layer.module): layer for layer in route(model).values()}
    plain = {key: _plain(layer) for key, layer in layers.items()}
    for module in model.modules():
        for name, child in module._modules.items():
            if id(child) in plain:
                module._modules[name] = plain[id(child)]
    return plain.get(id(model), model)


def _plain(layer: QuantizedLinear) -> nn.Module:
    outputs, inputs = layer.shape
    plain = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.dense(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=layer.bias.requires_grad)
    return plain.train(layer.module.training)
