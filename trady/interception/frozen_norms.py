"""Scale and shift of batch normalisations whose statistics are fixed."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from trady.interception.layer import as_whole_numbers
from trady.model.untouched import unseen
from trady.ops.frozen_norm import FrozenNorm


class FrozenNorms:
    """Scale and shift of every frozen normalisation, computed again only when its statistics have changed.

    A plan names a normalisation's buffers as they were when it was traced; ``model.to(...)`` replaces
    buffers, so they are looked up by their place in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = {
            id(tensor): (module, name) for module in model.modules() for name, tensor in module._buffers.items()
        }
        #: Of all that scales and shifts were computed from, when they were; ``None`` where that is not known.
        self._digest: tuple[int, int] | None = None
        self._known: dict[int, tuple[tuple[Any, ...], FrozenNorm, tuple[Tensor, Tensor]]] = {}

    def scale_and_shift(self, norm: FrozenNorm) -> tuple[Tensor, Tensor]:
        """Return scale and shift, one of each a channel."""
        mean, variance = self._now(norm.mean), self._now(norm.variance)
        sources = (mean, variance, norm.weight, norm.bias)
        state = tuple((id(t), t._version, t.device, t.dtype) if t is not None else None for t in sources)
        known = self._known.get(id(norm.mean))
        if known is None or known[0] != state:
            now = replace(norm, mean=mean, variance=variance)
            known = self._known[id(norm.mean)] = (state, now, now.scale_and_shift())
            self._digest = None
        return known[2]

    def follow(self) -> None:
        """Compute all again in place where versions do not tell of a write: through ``.data``.

        On the CPU that is seen; elsewhere nobody waits for an answer. Graphs may share the memory; where nothing was
        written, these are the values that it has.
        """
        if not self._known:
            return
        sources = [t for _, n, _ in self._known.values() for t in (n.mean, n.variance, n.weight, n.bias)]
        digest = _digest([tensor for tensor in sources if tensor is not None])
        if digest is not None and digest == self._digest:
            return
        self._digest = digest
        plain = [(norm, made) for _, norm, made in self._known.values() if norm.weight is None or norm.bias is None]
        whole = [(norm, made) for _, norm, made in self._known.values() if norm.weight is not None is not norm.bias]
        kept = [*(scale for _, (scale, _) in whole), *(shift for _, (_, shift) in whole)]
        with unseen(), torch.inference_mode(False), torch.no_grad(), _unsafe_preserve_version_counter(tuple(kept)):
            if whole:
                torch._foreach_copy_(kept, _all_scales_and_shifts([norm for norm, _ in whole]))
            for norm, made in plain:
                with _unsafe_preserve_version_counter(made):
                    torch._foreach_copy_(made, norm.scale_and_shift())

    def forget(self) -> None:
        """Let go of all of them."""
        self._known.clear()
        self._digest = None

    def _now(self, buffer: Tensor) -> Tensor:
        place = self._places.get(id(buffer))
        if place is None:
            return buffer
        now = place[0]._buffers.get(place[1])
        return buffer if now is None else now


def _digest(tensors: list[Tensor]) -> tuple[int, int] | None:
    """How many tensors there are and a checksum of their bits; ``None`` where a processor cannot read them at once."""
    with unseen(), torch.inference_mode(False), torch.no_grad():
        if not all([tensor.is_cpu for tensor in tensors]):  # noqa: C419 - faster
            return None
        return len(tensors), zlib.crc32(as_whole_numbers(torch.cat(tensors)).numpy().data)


def _all_scales_and_shifts(norms: list[FrozenNorm]) -> list[Tensor]:
    """:meth:`FrozenNorm.scale_and_shift` of many, with few kernels: all scales, then all shifts."""
    weights = [norm.weight for norm in norms if norm.weight is not None]
    biases = [norm.bias for norm in norms if norm.bias is not None]
    scales = list(torch._foreach_add([norm.variance for norm in norms], [norm.epsilon for norm in norms]))
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, weights)
    shifts = list(torch._foreach_neg([norm.mean for norm in norms]))
    torch._foreach_mul_(shifts, scales)
    torch._foreach_add_(shifts, biases)
    return [*scales, *shifts]
