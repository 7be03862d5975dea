"""A batch: its arguments, samples, tensors, chunks, and its copy without memory."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trady.errors import ModelError
from trady.model.eager import unwrap_compiled
from trady.model.structure import components, is_sparse, tensors_in, with_tensors


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is called with, measured once.

    Attributes:
        inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments).
    """

    inputs: Any

    @classmethod
    def of(cls, given: Any, model: nn.Module | None = None) -> Batch:
        """Make a batch of what a loader gives.

        A tuple or list is the positional arguments, a mapping the keyword arguments; anything with ``keys``
        (``BatchEncoding``) is a mapping. Where ``model`` takes one argument and none by these names, or of this number,
        the tuple, list or mapping is that argument.
        """
        if isinstance(given, cls):
            return given
        keyed = hasattr(given, "keys")
        if (keyed or isinstance(given, (tuple, list))) and model is not None and _is_one_argument(given, model):
            return cls((given,))
        return cls(dict(given) if keyed else given)

    @cached_property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model."""
        if isinstance(self.inputs, dict):
            return (), self.inputs
        return (tuple(self.inputs), {}) if isinstance(self.inputs, (tuple, list)) else ((self.inputs,), {})

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in it, also in objects of an own class."""
        return tuple(tensors_in(self.inputs))

    @cached_property
    def may_be_cut(self) -> bool:
        """Whether some of its samples alone are a batch too: a graph's nodes or lists of indices are not."""
        return all(
            self._holds_samples(t) or (t.is_floating_point() and not is_sparse(t)) for t in self.tensors if t.dim()
        )

    @cached_property
    def samples(self) -> int:
        """The number of samples: the first dimension of the first tensor that has one.

        Raises:
            ModelError: There is no such tensor, or it is empty.

        """
        sizes = [t.shape[0] for t in self.tensors if t.dim()]
        if not sizes or sizes[0] == 0:
            raise ModelError(f"the example batch holds no samples ({self.shapes}); pass one batch of training data")
        return int(sizes[0])

    @property
    def shapes(self) -> str:
        """Shapes and types, for messages."""
        return str(tree_map(_shape, self.inputs)).replace("'", "")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for t in self.tensors for part in components(t))

    @cached_property
    def elements(self) -> int:
        """Elements of its tensors; of a sparse one, those that are stored."""
        return sum(part.numel() for t in self.tensors for part in components(t))

    @cached_property
    def meta(self) -> Batch:
        """The batch without its memory; ids, masks and sparse tensors keep their values, since models look at them."""
        return self._mapped(lambda t: t if is_sparse(t) or not t.is_floating_point() else without_memory(t))

    @cached_property
    def doubled(self) -> Batch:
        """The batch with every sample in it twice; floating-point values without memory."""
        return self._mapped(lambda t: torch.cat([_bare(t)] * 2) if self._holds_samples(t) else t)

    @cached_property
    def packed(self) -> PackedBatch:
        """The batch without tensors that have memory: ids and masks are packed into bytes."""
        values: dict[int, _Packed] = {}

        def pack(tensor: Tensor) -> Tensor:
            if is_sparse(tensor) or not tensor.numel():
                return tensor
            bare = without_memory(tensor)
            if not (tensor.is_meta or tensor.is_floating_point() or tensor.is_complex()):
                values[id(bare)] = _Packed.of(tensor)
            return bare

        return PackedBatch(with_tensors(self.inputs, pack), values)

    def to(self, dtype: torch.dtype) -> Batch:
        """Convert floating-point tensors."""
        return self._mapped(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def chunk(self, start: int, samples: int) -> Batch:
        """Take some samples: a view of every tensor that holds them."""
        return self._mapped(lambda t: t[start : start + samples] if self._holds_samples(t) else t)

    def chunks(self, samples: int | None) -> Iterator[tuple[Batch, float]]:
        """Cut the batch; yield each chunk with its share of the samples.

        Args:
            samples: Up to this many a chunk; ``None`` is the full batch, as it is.

        """
        if samples is None or samples >= self.samples:
            yield self, 1.0
            return
        for start in range(0, self.samples, samples):
            count = min(samples, self.samples - start)
            yield self.chunk(start, count), count / self.samples

    def _holds_samples(self, tensor: Tensor) -> bool:
        return bool(tensor.dim()) and tensor.shape[0] == self.samples and not is_sparse(tensor)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(with_tensors(self.inputs, change))

    def dtype_in(self, model: nn.Module) -> torch.dtype:
        """The floating type that activations of ``model`` will have: its own, or that of the weights for token ids."""
        return next((t.dtype for t in (*self.tensors, *model.parameters()) if t.is_floating_point()), torch.float32)

    def device_in(self, model: nn.Module) -> torch.device | None:
        """Where ``model`` runs, or else where the batch is; ``None`` if neither has memory."""
        return next((t.device for t in (*model.parameters(), *self.tensors) if not t.is_meta), None)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch to keep for later: a plan should not hold memory that training has to do without.

    Attributes:
        inputs: The batch without memory.
        values: By the identity of a tensor in it, the whole numbers that it stands for.
    """

    inputs: Any
    values: Mapping[int, _Packed]

    def unpack(self) -> Batch:
        """Return the batch: floating-point values without memory, ids and masks as they were."""
        return Batch(with_tensors(self.inputs, lambda t: self.values[id(t)].unpack() if id(t) in self.values else t))


@dataclass(frozen=True)
class _Packed:
    """A tensor of whole numbers."""

    content: bytes
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Packed:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return cls(zlib.compress(content, 1), tensor.shape, tensor.dtype, tensor.device)

    def unpack(self) -> Tensor:
        raw = torch.frombuffer(bytearray(zlib.decompress(self.content)), dtype=torch.uint8)
        return raw.view(self.dtype).reshape(self.shape).to(self.device)


def _is_one_argument(given: Any, model: nn.Module) -> bool:
    """Whether a model takes what a loader gives as a whole, and cannot take what is in it."""
    try:
        signature = inspect.signature(unwrap_compiled(model).forward)
        signature.bind(given)
    except (TypeError, ValueError):  # it takes more than one, or does not say
        return False
    try:
        if hasattr(given, "keys"):
            signature.bind(**{name: given[name] for name in given.keys()})  # noqa: SIM118 - maybe no mapping
        else:
            signature.bind(*given)
    except (TypeError, KeyError):
        return True
    return False


def batch_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """Return what a module is called with as a batch: positional arguments beside keywords go by their names."""
    if not kwargs:
        return Batch(args)
    named = _by_name(module, args)
    return Batch((args, kwargs)) if named is None else Batch({**named, **kwargs})


def _by_name(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any] | None:
    """Positional arguments under the names of a module's parameters; ``None`` where these do not say."""
    if not args:
        return {}
    try:
        parameters = list(inspect.signature(unwrap_compiled(module).forward).parameters.values())[: len(args)]
    except (TypeError, ValueError):
        return None
    if len(parameters) < len(args) or any(each.kind is not each.POSITIONAL_OR_KEYWORD for each in parameters):
        return None
    return {each.name: value for each, value in zip(parameters, args, strict=True)}


def way_of_calling(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tell calls of a model apart: which arguments it gets, dimensions of tensors, flags; not sizes or values."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dim()
        return value if isinstance(value, (bool, str)) else type(value)

    given = [(name, kind(value)) for name, value in kwargs.items() if value is not None]
    return (*map(kind, args), *sorted(given, key=lambda pair: pair[0]))


def _shape(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        inside = ", ".join(map(_shape, tensors_in(leaf)))
        return f"{type(leaf).__name__}({inside})" if inside else type(leaf).__name__
    return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"


def _bare(tensor: Tensor) -> Tensor:
    """A tensor without memory; ids and masks stay what they are, since models look at them."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return without_memory(tensor)


def without_memory(tensor: Tensor) -> Tensor:
    """Make a tensor of the same shape, strides and type that takes no memory; of a sparse one, a dense one."""
    if tensor.layout is not torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
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


#: ``loss(outputs, targets)``; the model's own loss is taken where there is none.
Loss = Callable[[Any, Any], Tensor]


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Run a batch forward.

    Raises:
        ModelError: There is no loss to be had.

    """
    inputs, targets = split(batch)
    args, kwargs = Batch.of(inputs, model).arguments
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
