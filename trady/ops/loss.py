"""Cross-entropy that keeps the scores and nothing else, computed a few rows at a time.

PyTorch's own keeps a second tensor of the scores' size between forward and backward (the log-softmax), makes a
third one on the way (the gradient of the log-softmax) and a fourth for the gradient. Here the probabilities are
recomputed in the backward pass, directly into the gradient, which can take the memory of the scores themselves.
"""

# N rows (samples or tokens), K classes: logits_NK, target_N, losses_N.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.ops.context import autocast_dtype, device_type
from trady.ops.layout import CHUNK_BYTES, chunks, count_write
from trady.ops.native import library, on_a_processor, unwritten
from trady.ops.once import once_differentiable

#: Smaller scores are left to PyTorch: there is little to save, and a call costs more than its arithmetic.
_MINIMUM_BYTES = 2 << 20

#: On an accelerator temporaries may be larger: a short kernel costs more to start than to run.
_CHUNK_BYTES_ELSEWHERE = 64 << 20

_REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean", overwrite: bool = False
) -> Tensor:
    """Cross-entropy of class indices that needs one tensor of the scores' size where PyTorch needs three or four.

    ``loss = logsumexp(logits) - logits[target]`` a row, and ``dL/dlogits = softmax(logits) - onehot(target)``: all that
    the backward pass reads are the scores, which are there already. Temporaries take at most about 4 MiB. A language
    model's scores (tokens times vocabulary) are often the largest tensor of a training step.

    Args:
        logits: Scores [N, classes], in any floating-point dtype; computed in float32 or wider. For scores
            [batch, tokens, classes] pass ``logits.flatten(0, 1)``, a view.
        target: int64 [N], the class of each row.
        ignore_index: Rows with this target have no loss and no gradient.
        reduction: ``"mean"`` over the rows that count (NaN if none does, as in PyTorch), ``"sum"`` or ``"none"``.
        overwrite: Write the gradient into the memory of ``logits``: nobody may read them once the backward pass
            has begun. Of a leaf, and of scores that are not contiguous, the memory is left alone. A second backward
            pass through the same graph is an error then.

    Returns:
        A scalar, [N] for ``"none"``: in the type that ``torch.nn.functional.cross_entropy`` returns.

    Raises:
        ValueError: Other shapes, or another reduction.

    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [N, classes] and target [N], not {list(logits.shape)} and {list(target.shape)}: flatten "
            "further dimensions, as in cross_entropy(logits.flatten(0, 1), target.flatten())"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, not {reduction!r}")
    return row_losses(logits, target, ignore_index, reduction, overwrite=overwrite)


def row_losses(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    *,
    overwrite: bool = False,
    graph_only: bool = False,
) -> Tensor:
    """:func:`cross_entropy` without its checks; ``graph_only`` where nobody reads the value."""
    overwrite = overwrite and logits.is_contiguous() and not _is_leaf(logits)
    out: Tensor = _CrossEntropy.apply(logits, target, ignore_index, reduction, overwrite, graph_only)
    return out


def pays(logits: Tensor, target: Tensor) -> bool:
    """Whether :func:`row_losses` fits these tensors, saves memory and is as fast as PyTorch's own."""
    shaped = logits.dim() == 2 and target.shape == logits.shape[:1] and target.dtype == torch.int64
    large = logits.numel() * logits.element_size() >= _MINIMUM_BYTES
    # For narrow dtypes PyTorch's own is faster on a CPU, except where autocast makes it copy them to float32.
    fast = device_type(logits) == "cuda" or _result(logits) == _wide(logits.dtype)
    return shaped and large and fast and logits.is_floating_point() and type(logits) is Tensor


def _is_leaf(logits: Tensor) -> bool:
    """Whether a caller keeps these values, so that a gradient may not take their memory."""
    return logits.is_leaf or (logits._base is not None and logits._base.is_leaf)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        overwrite: bool,
        graph_only: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.ignore_index, ctx.overwrite, ctx.count = ignore_index, overwrite, None
        if graph_only:
            out = torch.zeros(len(logits), dtype=_wide(logits.dtype), device=logits.device)
        else:
            out = _losses(logits, target, ignore_index)
        if reduction != "none":
            out = out.sum()
        if reduction == "mean":
            ctx.count = (target != ignore_index).sum()
            out = out / ctx.count
        return out.to(_result(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = ctx.saved_tensors
        scores = logits.detach()
        factor = gradient if ctx.count is None else gradient / ctx.count
        out = scores if ctx.overwrite else unwritten(torch.empty_like(scores, memory_format=torch.contiguous_format))
        _write_gradient(scores, target, ctx.ignore_index, factor, out)
        return out, None, None, None, None, None


def _losses(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The loss of every row."""
    wide = _wide(logits.dtype)
    losses = torch.empty(len(logits), dtype=wide, device=logits.device)
    kernels = _kernels(logits, target)
    if kernels is not None and _all_classes(target, ignore_index, logits.shape[1]):
        if not logits.is_meta:
            kernels.trady_row_losses(
                logits.data_ptr(), target.data_ptr(), losses.data_ptr(), *logits.shape, ignore_index
            )
        return losses
    for rows in _rows(logits):
        scores = torch.log_softmax(logits[rows], 1, dtype=wide)
        losses[rows] = F.nll_loss(scores, target[rows], ignore_index=ignore_index, reduction="none")
    return losses


def _write_gradient(logits: Tensor, target: Tensor, ignore_index: int, factor: Tensor, out: Tensor) -> None:
    """Write ``factor * (softmax(logits) - onehot(target))`` to ``out``, which may be ``logits``."""
    wide = _wide(logits.dtype)
    factor = factor.to(wide).expand(target.shape)
    kernels = _kernels(logits, target)
    if kernels is not None and _all_classes(target, ignore_index, logits.shape[1]):
        weights = factor.contiguous()
        if not logits.is_meta:
            pointers = (t.data_ptr() for t in (logits, target, weights, out))
            kernels.trady_row_loss_gradient(*pointers, *logits.shape, ignore_index)
        count_write(out)
        return
    counted = target != ignore_index
    factor = torch.where(counted, factor, 0).unsqueeze(1)
    place = torch.where(counted, target, 0).unsqueeze(1)
    less = torch.full((), -1.0, dtype=wide, device=logits.device).expand(place.shape)
    for rows in _rows(logits):
        chunk = torch.softmax(logits[rows], 1, dtype=wide)
        chunk.scatter_add_(1, place[rows], less[rows])
        out[rows] = chunk.mul_(factor[rows])


def _kernels(logits: Tensor, target: Tensor) -> Any:
    """The C kernels, if they take these tensors."""
    fits = logits.dtype == torch.float32 and target.dtype == torch.int64 and logits.numel() > 0
    dense = logits.is_contiguous() and target.is_contiguous()
    return library() if fits and dense and on_a_processor(logits, target) else None


def _all_classes(target: Tensor, ignore_index: int, classes: int) -> bool:
    """Whether every target is a class or ignored; for others, PyTorch raises its own error."""
    return target.is_meta or not bool((((target < 0) | (target >= classes)) & (target != ignore_index)).any())


def _result(logits: Tensor) -> torch.dtype:
    """The dtype of PyTorch's own loss: autocast computes it in float32, whatever the scores are."""
    return logits.dtype if autocast_dtype(logits) is None else _wide(logits.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(logits: Tensor) -> list[slice]:
    row_bytes = logits.shape[1] * _wide(logits.dtype).itemsize
    if device_type(logits) != "cpu":
        row_bytes = -(-row_bytes * CHUNK_BYTES // _CHUNK_BYTES_ELSEWHERE)
    return list(chunks(len(logits), row_bytes))
