"""Runs a model on fake tensors as if they were real: the same answers to questions, the same choice of kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from trady.calls.autocast import cast
from trady.calls.decompositions import META_KERNELS
from trady.calls.mode import CallMode
from trady.calls.names import in_place
from trady.calls.questions import answer_about_device
from trady.memory.live import LiveBytes
from trady.model.batch import tensors_among, without_memory
from trady.ops.context import internal_query, simulated_autocast_dtype, simulated_device_type
from trady.trace.answers import Answer, Replay

#: Losses whose mean or sum PyTorch's CPU kernels leave in memory as large as their input.
_AS_LARGE_AS_THEIR_INPUT = frozenset([F.mse_loss, F.smooth_l1_loss, F.soft_margin_loss, F.binary_cross_entropy])


class FakeRun(CallMode):
    """Runs a model of fake tensors on a batch whose ids and masks have values.

    A real tensor that meets a fake one loses its values, for good where it is written to. Asked for their device, all
    tensors name the real one, so that models create further tensors there.

    Args:
        device: The real device.
        live: Counts the tensors of the pass, each once: with values or without.
        watching: Makes the context for calls on real tensors alone, which may write to the user's.
        answers: To the calls that need values, in the order of the traced pass.

    """

    # Calls are simulated as they come; the mode above that recognises layers has remembered the transposes itself.
    remembers_transposes = False

    def __init__(
        self,
        device: torch.device,
        live: LiveBytes | None = None,
        watching: Callable[[], AbstractContextManager[None]] = nullcontext,
        answers: tuple[Answer, ...] = (),
    ) -> None:
        super().__init__()
        self._device, self._live, self._watching = device, live, watching
        self._before: list[Token[str]] = []
        self._twins: dict[int, weakref.ref[Tensor]] = {}
        self._cut: tuple[int, int] | None = None
        self._written = WeakIdKeyDictionary()
        self._replay = Replay(answers)

    def __enter__(self) -> FakeRun:
        self._before.append(simulated_device_type.set("cpu" if self._device.type == "meta" else self._device.type))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        simulated_device_type.reset(self._before.pop())

    def asked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a model's question about the device for the real one."""
        answer = None if internal_query.get() else answer_about_device(func, self._device)
        return func(*args, **kwargs) if answer is None else answer

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do a call as the real device would, as far as memory goes."""
        args, kwargs = self.prepare(func, args, kwargs)
        bare = any(t.is_meta for t in tensors_among((*args, *kwargs.values())))
        if not bare:
            with self._watching():
                return func(*args, **kwargs)
        if (dtype := simulated_autocast_dtype.get()) is not None:
            args, kwargs = cast(func, args, kwargs, dtype, simulated_device_type.get())
        if func is F.scaled_dot_product_attention:
            return _attention(self._device, *args, **kwargs)
        arguments = (*args, *kwargs.values())
        if (answer := self._replay.to(func, arguments)) is not None:
            return answer.repeated(arguments)
        kernel = META_KERNELS.get(func, func)
        try:
            out = kernel(*args, **kwargs)
        except Exception:
            if (answer := self._replay.earlier(func, arguments)) is None:
                raise
            return answer.repeated(arguments)
        if func in _AS_LARGE_AS_THEIR_INPUT and simulated_device_type.get() == "cpu" and not out.dim():
            out.trady_keeps = torch.empty_like(args[0] if args else kwargs["input"])
        return out

    def prepare(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the values from all arguments if some of them have none.

        What is written to has none from now on; ids and masks keep theirs, since models look at them.
        """
        if self._written:
            args, kwargs = tree_map(self._now, (args, kwargs))
        meta = [t.is_meta for t in tensors_among((*args, *kwargs.values()))]
        on_device = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        if not any(meta) or (all(meta) and not on_device):
            return args, kwargs
        target = args[0] if in_place(func) and args and isinstance(args[0], Tensor) else None
        if target is not None and not target.is_meta and (target.is_floating_point() or target.is_complex()):
            whole = target if target._base is None else target._base
            if self._live is not None:
                self._live.drop(whole)
            self._written[whole] = without_memory(whole)
            args = (self._now(target), *args[1:])
        args, kwargs = tree_map(self._without_values, (args, kwargs))
        return args, kwargs

    def begin(self) -> None:
        """Begin a forward pass: the answers begin again."""
        self._replay = Replay(self._replay.all)

    @contextmanager
    def cut(self, samples: int, part: int) -> Iterator[None]:
        """Context in which tensors of ``samples`` samples are cut to the first ``part`` of them."""
        self._cut = (samples, part)
        try:
            yield
        finally:
            self._cut = None

    def _without_values(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        if self._live is None:
            return without_memory(value)
        known = self._twins.get(id(value))
        twin = None if known is None else known()
        if twin is None or twin.trady_stands_for is not value:  # type: ignore[attr-defined]
            with self._live.unseen():
                twin = without_memory(value if self._cut is None else _part(value, *self._cut))
            self._live.register(value)
            self._live.leave_out(twin)
            twin.trady_stands_for = value  # type: ignore[attr-defined]  # whoever keeps the one keeps the other
            self._twins[id(value)] = weakref.ref(twin)
        return twin

    def _now(self, value: Any) -> Any:
        """What stands for a tensor into which something without values has been written."""
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        whole = value._base
        if whole is None:
            return self._written.get(value, value)
        stands = self._written.get(whole)
        return value if stands is None else stands.as_strided(value.shape, value.stride(), value.storage_offset())


def _part(tensor: Tensor, samples: int, part: int) -> Tensor:
    return tensor[:part] if tensor.dim() and tensor.shape[0] == samples else tensor


def _attention(
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as the real device would: its fused kernel keeps no attention matrix, the plain formula does."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    # On the CPU the fused kernel gives a mask no gradient: one that trains (Swin's positions) takes the plain formula.
    if device.type == "cpu" and attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    choice = _fused_choice(device, (query, key, value, attn_mask), dropout_p, is_causal, options)
    if choice != SDPBackend.MATH and attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # the kernel's own copy
    if device.type == "cpu" and choice == SDPBackend.FLASH_ATTENTION:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor
        out, logsumexp, *_ = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        if out.grad_fn is not None and query.dtype == torch.float64 != logsumexp.dtype:
            # In PyTorch 2.11 the fake kernel saves half the bytes that the real one saves for the backward pass.
            saved: Any = out.grad_fn.metadata
            saved["trady"] = torch.empty_like(logsumexp)
        return out
    if device.type == "cuda" and (found := _on_cuda(choice, query, key, value, attn_mask, dropout_p, is_causal, scale)):
        return found[0]
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def _fused_choice(
    device: torch.device, tensors: tuple[Tensor | None, ...], dropout_p: float, is_causal: bool, options: dict[str, Any]
) -> SDPBackend:
    """The kernel that PyTorch takes for tensors of these shapes on a device."""
    with _disable_current_modes(), torch.no_grad():
        real = [None if t is None else _thin(t, device) for t in tensors]
        choice: int = torch._fused_sdp_choice(*real, dropout_p, is_causal, **options)  # type: ignore[call-arg, arg-type]
    return SDPBackend(choice)


def _on_cuda(
    choice: SDPBackend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...] | None:
    """Attend by one of CUDA's fused kernels; ``None`` where it is the plain formula."""
    aten = torch.ops.aten
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if choice == SDPBackend.FLASH_ATTENTION and query.shape[-1] % 8 == 0:
        return tuple(aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale))
    if choice not in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        return None
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    if choice == SDPBackend.EFFICIENT_ATTENTION:
        fused = aten._scaled_dot_product_efficient_attention
        return tuple(fused(query, key, value, attn_mask, trains, dropout_p, is_causal, scale=scale))
    fused = aten._scaled_dot_product_cudnn_attention
    return tuple(fused(query, key, value, attn_mask, trains, dropout_p, is_causal, scale=scale))


def _thin(tensor: Tensor, device: torch.device) -> Tensor:
    """A real tensor of this shape that takes the memory of its last dimension only."""
    size = tensor.shape[-1] if tensor.dim() else 1
    return torch.zeros(size, dtype=tensor.dtype, device=device).expand(tensor.shape)
