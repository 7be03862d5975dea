"""What is the head of a network, which of its modules repeat, and the mode in which a frozen network trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

#: Of the parameters that the best class of blocks has, those that a class of smaller blocks must have.
_AS_GOOD = 0.8


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the last linear layer; ``None`` where its weight is tied to another module's."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        return None
    owners = [module for module in model.modules() if any(p is linear[-1].weight for p in module.parameters(False))]
    return linear[-1] if len(owners) == 1 else None


def train_with_fixed_statistics(model: nn.Module) -> None:
    """Training mode, so that dropout is as in full fine-tuning; batch normalisation in evaluation mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def blocks_of(model: nn.Module, classes: tuple[str, ...] = ()) -> list[nn.Module]:
    """Return the modules that a network repeats, in their order: layers of a transformer, residual blocks.

    Args:
        model: The network.
        classes: Their class names. Without any it is the class that stands several times in a ``ModuleList`` or
            ``Sequential`` and holds most of the parameters; of a class and the one inside of it, the inner one, as
            long as a block has two weights.

    """
    if classes:
        return [module for module in model.modules() if type(module).__name__ in classes]
    found: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
    for module in _listed(model):
        if _weights(module) > 1:
            found[type(module)].append(module)
    repeated = [blocks for blocks in found.values() if len(blocks) > 1]
    most = max(map(_elements, repeated), default=0)
    return max((blocks for blocks in repeated if _elements(blocks) >= _AS_GOOD * most), key=len, default=[])


def _listed(model: nn.Module) -> Iterator[nn.Module]:
    seen: set[int] = set()
    for parent in model.modules():
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            for child in parent.children():
                if id(child) not in seen and not isinstance(child, nn.ModuleList):
                    seen.add(id(child))
                    yield child


def _weights(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _elements(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
