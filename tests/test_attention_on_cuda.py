"""Attention on CUDA is simulated as the kernel that PyTorch takes there: what it keeps, and what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend

from trady.simulation import fake_run

SAMPLES, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 48, 80, 64
MATRIX = SAMPLES * HEADS * QUERIES * KEYS


def attend(
    monkeypatch: pytest.MonkeyPatch, choice: SDPBackend, dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor], list[int]]:
    monkeypatch.setattr(fake_run, "_fused_choice", lambda *_: choice)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    query, key, value = inputs = [
        torch.empty(SAMPLES, HEADS, length, WIDTH, dtype=dtype, device="meta", requires_grad=True)
        for length in (QUERIES, KEYS, KEYS)
    ]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = fake_run._attention(torch.device("cuda"), query, key, value, mask)
        gradients = torch.autograd.grad(out.sum(), inputs)
    return out, list(gradients), kept


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
    ],
)
def test_fused_kernels_keep_no_matrix(choice: SDPBackend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    out, gradients, kept = attend(monkeypatch, choice, dtype)
    assert out.shape == (SAMPLES, HEADS, QUERIES, WIDTH)
    assert [g.shape[2] for g in gradients] == [QUERIES, KEYS, KEYS]
    assert MATRIX not in kept
    assert kept.count(SAMPLES * HEADS * QUERIES * WIDTH) == 2, "query and output"
    assert kept.count(SAMPLES * HEADS * KEYS * WIDTH) == 2, "key and value"


def test_the_plain_formula_keeps_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, kept = attend(monkeypatch, SDPBackend.MATH, torch.float32)
    assert MATRIX in kept


def test_a_mask_goes_to_the_kernel_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.empty(1, 1, QUERIES, KEYS, dtype=torch.bool, device="meta")
    out, _, kept = attend(monkeypatch, SDPBackend.EFFICIENT_ATTENTION, torch.float32, mask)
    assert out.dtype == torch.float32
    assert kept.count(QUERIES * KEYS) + kept.count(MATRIX) == 1, "the mask alone, expanded"


def test_on_the_cpu_the_choice_is_pytorchs_own() -> None:
    shapes = [torch.empty(SAMPLES, HEADS, length, WIDTH, device="meta") for length in (QUERIES, KEYS, KEYS)]
    options = {"scale": None, "enable_gqa": False}
    chosen = fake_run._fused_choice(torch.device("cpu"), (*shapes, None), 0.0, False, options)
    assert chosen == SDPBackend.FLASH_ATTENTION
