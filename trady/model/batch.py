"""A batch: its arguments, samples, tensors, parts, and its copy without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.errors import ModelError


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a batch into positional and keyword arguments of the model."""
    if isinstance(example, Mapping) or hasattr(example, "keys"):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def batch_size(example: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor.

    Raises:
        ModelError: The batch holds no tensor, or an empty one.

    """
    sizes = [
        t.shape[0]
        for t in tree_iter(dict(example) if hasattr(example, "keys") else example)
        if isinstance(t, Tensor) and t.dim()
    ]
    if not sizes or sizes[0] == 0:
        raise ModelError(f"the example batch holds no samples ({describe(example)}); pass one batch of training data")
    return int(sizes[0])


def describe(example: Any) -> str:
    """Name the shapes in a batch, for messages."""
    shapes = tree_map(
        lambda t: (
            f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" if isinstance(t, Tensor) else type(t).__name__
        ),
        dict(example) if hasattr(example, "keys") else example,
    )
    return str(shapes).replace("'", "")


def real_device(model: nn.Module, example: Any) -> torch.device | None:
    """Where the model runs, or else its batch; ``None`` if neither has memory."""
    tensors = [*model.parameters(), *(t for t in tree_iter(as_arguments(example)) if isinstance(t, Tensor))]
    return next((t.device for t in tensors if not t.is_meta), None)


def twice(example: Any) -> Any:
    """Return the batch with every sample in it twice; floating-point values without memory."""
    batch = batch_size(example)

    def double(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != batch:
            return leaf
        return torch.cat([_bare(leaf)] * 2)

    return tree_map(double, dict(example) if hasattr(example, "keys") else example)


def _bare(tensor: Tensor) -> Tensor:
    """A tensor without memory; ids and masks stay what they are, since models look at them."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return without_memory(tensor)


def without_memory(tensor: Tensor) -> Tensor:
    """Make a tensor of the same shape, strides and type that takes no memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def tensors_among(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a torch function, also in lists of them."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_among(value)


def numbers_among(arguments: Iterable[Any]) -> Iterator[int]:
    """The whole numbers among the arguments of a torch function, also in lists and slices."""
    for value in arguments:
        if isinstance(value, int) and not isinstance(value, bool):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from numbers_among(value)
        elif isinstance(value, slice):
            yield from numbers_among((value.start, value.stop, value.step))


def activation_dtype(model: nn.Module, example: Any) -> torch.dtype:
    """The floating type that activations will have: the example's, or that of the weights for token ids."""
    tensors = [*tensors_of(example), *model.parameters()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def tensors_of(example: Any) -> list[Tensor]:
    """List the tensors in a batch."""
    tree = dict(example) if hasattr(example, "keys") else example
    return [t for t in tree_iter(tree) if isinstance(t, Tensor)]


def meta_batch(example: Any) -> Any:
    """Copy a batch without its memory; ids and masks keep their values."""
    tree = dict(example) if hasattr(example, "keys") else example
    return tree_map(lambda t: without_memory(t) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def part_of(batch: Any, start: int, samples: int) -> Any:
    """Take some samples of a batch: a view of every tensor that holds them."""
    whole = batch_size(batch)

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != whole:
            return leaf
        return leaf[start : start + samples]

    return tree_map(part, dict(batch) if hasattr(batch, "keys") else batch)


def parts_of(batch: Any, samples: int | None) -> Iterator[tuple[Any, float]]:
    """Cut a batch; yield each part with its share of the samples.

    Args:
        batch: The inputs of the model, labels among them or not.
        samples: At most so many a part; ``None`` is the whole batch, as it is.

    """
    whole = 0 if samples is None else batch_size(batch)
    if samples is None or samples >= whole:
        yield batch, 1.0
        return
    for start in range(0, whole, samples):
        count = min(samples, whole - start)
        yield part_of(batch, start, count), count / whole


def waiting_bytes(batch: Any, part: Any) -> int:
    """Bytes of a batch that are there beside the part that the model works on."""
    return sum(t.nbytes for t in tensors_of(batch)) - sum(t.nbytes for t in tensors_of(part))


#: ``loss(outputs, targets)``; the model's own loss is taken where there is none.
Loss = Callable[[Any, Any], Tensor]


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Run a batch forward.

    Raises:
        ModelError: There is no loss to be had.

    """
    inputs, targets = split(batch)
    args, kwargs = as_arguments(inputs)
    output = model(*args, **kwargs)
    if loss is not None:
        return loss(output, targets)
    own = getattr(output, "loss", None)
    if not isinstance(own, Tensor):
        raise ModelError("the model returns no loss of its own; pass loss=, such as torch.nn.functional.cross_entropy")
    return own


def split(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch; a mapping is all input."""
    if hasattr(batch, "keys"):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ModelError(
        f"a batch to measure on is a pair (inputs, targets) or a mapping with labels; this one is a "
        f"{type(batch).__name__}"
    )
