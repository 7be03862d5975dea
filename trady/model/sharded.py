"""Models whose weights lie in parts on several devices, which cannot be armed; and wrappers that leave them whole."""

from __future__ import annotations

from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trady.errors import ModelError

_INSTEAD = (
    "channels are read from whole weights, and each rank has a part of them. Leave it out and start the same script "
    "with torchrun, with DistributedDataParallel or without: gradients and optimizer state are there only for the "
    "channels that train. Where the weights alone do not fit on a device, store them quantised (docs/composition.md)"
)


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one rank's part of a larger one (DTensor), without importing what makes such."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse weights that lie in parts on several devices.

    Raises:
        ModelError: The message says by what, and what to do instead.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
            what = f"module {name!r} of" if name else "this"
            by = "fully_shard (FSDP2)" if "FSDPModule" in kinds else "FullyShardedDataParallel"
            raise ModelError(f"{what} {type(model).__name__} is sharded by {by}: {_INSTEAD}")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ModelError(
                f"{name} of this {type(model).__name__} is a DTensor (tensor parallelism, {_placements(parameter)}): "
                f"{_INSTEAD}"
            )


def refuse_part(name: str, tensor: Tensor | None) -> None:
    """Refuse that a weight has become a part of itself after the model was prepared.

    Raises:
        ModelError: It has.
    """
    if tensor is not None and is_sharded(tensor):
        raise ModelError(
            f"the weight of {name} has become a DTensor after the model had been prepared (fully_shard, or tensor "
            f"parallelism, {_placements(tensor)}): {_INSTEAD}"
        )


def _placements(tensor: Tensor) -> str:
    return ", ".join(map(str, getattr(tensor, "placements", ())))
