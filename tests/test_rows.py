"""Gradients that are zero in most rows: of classifiers that read one token, and of padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import trady
from tests.models import gradient_errors, normal, seeded
from trady.ops import rows
from trady.ops.rows import multiply_rows, nonzero_rows

ROWS, OUT, IN = 256, 24, 40


def gradient(counting: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of random numbers where ``counting`` says so, zero elsewhere."""
    mask = torch.zeros(ROWS, 1, dtype=dtype)
    mask[counting] = 1
    return normal(ROWS, OUT, dtype=dtype) * mask


def computed(parts: list[slice]) -> list[int]:
    return sorted(row for part in parts for row in range(*part.indices(ROWS)))


# -- which rows count --------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, ROWS - 1)), st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 60)), max_size=4)
)
@settings(max_examples=200, deadline=None)
def test_no_row_that_counts_is_left_out_and_none_is_computed_twice(
    single: list[int], runs: list[tuple[int, int]]
) -> None:
    counting = sorted({*single, *(row for start, n in runs for row in range(start, min(ROWS, start + n)))})
    parts = nonzero_rows(gradient(counting))
    if parts is None:
        return
    found = computed(parts)
    assert set(counting) <= set(found)
    assert len(found) == len(set(found)) <= 0.75 * ROWS


@pytest.mark.parametrize(
    ("counting", "parts"),
    [
        (slice(0, ROWS, 32), [slice(0, 225, 32)]),
        (slice(5, ROWS, 64), [slice(5, 198, 64)]),
        ([*range(10), *range(128, 150)], [slice(0, 10), slice(128, 150)]),
        ([*range(10), *range(15, 30)], [slice(0, 30)]),
        ([17], [slice(17, 18)]),
        ([], []),
    ],
    ids=["one token of every sample", "another token", "padding", "runs that lie close together", "one row", "nothing"],
)
def test_nonzero_rows_are_runs_or_every_nth(counting: Any, parts: list[slice]) -> None:
    assert nonzero_rows(gradient(counting)) == parts


def test_where_little_is_zero_everything_is_computed() -> None:
    dense = gradient(slice(0, ROWS))
    assert nonzero_rows(dense) is None
    assert nonzero_rows(dense.relu()) is None, "zeros, but no row of them"
    assert nonzero_rows(gradient(slice(0, 200))) is None
    assert nonzero_rows(gradient(slice(0, ROWS, 2))) is not None
    random = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) < 0.4
    assert nonzero_rows(gradient(random)) is None, "hardly any two of them lie apart"


def test_a_row_counts_for_a_single_number_and_for_nan() -> None:
    lonely = torch.zeros(ROWS, OUT)
    lonely[3, OUT - 1], lonely[200, 1] = -1e-38, float("nan")
    assert nonzero_rows(lonely) == [slice(3, 201, 197)]


@pytest.mark.parametrize(
    "other",
    [
        gradient([]).t().contiguous().t(),
        gradient([]).to("meta"),
        nn.Parameter(gradient([])),
        torch.zeros(8, OUT),
        torch.zeros(0, OUT),
        torch.zeros(ROWS),
    ],
    ids=["another layout", "no values", "a subclass", "few", "none", "a vector"],
)
def test_other_gradients_are_computed_as_they_are(other: Tensor) -> None:
    assert nonzero_rows(other) is None
    matrix = torch.ones(other.shape[-1], 3, device=other.device)
    assert multiply_rows(other, matrix).shape == (*other.shape[:-1], 3)


# -- products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counting", [slice(0, ROWS, 32), slice(0, 40), [], [*range(9), *range(100, 130)]])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_is_that_of_all_rows(dtype: torch.dtype, counting: Any, transposed: bool) -> None:
    g = gradient(counting, dtype)
    matrix = normal(IN, OUT, dtype=dtype).t() if transposed else normal(OUT, IN, dtype=dtype)
    found = multiply_rows(g.view(8, 32, OUT), matrix)
    torch.testing.assert_close(found, (g @ matrix).view(8, 32, IN))
    assert found.is_contiguous()


def test_rows_are_read_and_written_in_place() -> None:
    big = torch.zeros(64, 128, 512)
    big[:, 0] = normal(64, 512)
    matrix = normal(512, 512)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        product = multiply_rows(big, matrix)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in seen.events())
    assert allocated < 1.05 * product.numel() * product.element_size()


# -- in networks -------------------------------------------------------------------------------------------------


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Share of the rows that each product leaves out; filled while a network runs."""
    shares: list[float] = []

    def noted(gradient: Tensor) -> list[slice] | None:
        parts = nonzero_rows(gradient)
        if parts is not None:
            count = gradient.numel() // gradient.shape[-1]
            shares.append(1 - sum(len(range(*part.indices(count))) for part in parts) / count)
        return parts

    monkeypatch.setattr(rows, "nonzero_rows", noted)
    return shares


def bert() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return seeded(lambda: hf.BertForSequenceClassification(config)).double()


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("padded", [False, True], ids=["first token read", "padding"])
def test_gradients_of_a_sentence_classifier_are_exact(left_out: list[float], recompute: str, padded: bool) -> None:
    ids = torch.randint(1, 50, (8, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        for sample in range(8):
            mask[sample, 10 + sample :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    errors = gradient_errors(bert(), batch, recompute=recompute)
    assert len(errors) > 15
    assert max(errors.values()) < 1e-10
    layers = 3 if padded else 1
    assert len(left_out) >= 4 * layers, "linear layers behind which only some tokens count"
    assert min(left_out) > 0.5


def test_quantised_layers_leave_the_same_rows_out(left_out: list[float]) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(OUT, IN), nn.GELU(), nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, 3))
    torchao.quantize_(model[2], torchao.Int8WeightOnlyConfig(version=2))
    tuner = trady.prepare(model, normal(ROWS, OUT), budget="elements:9999999", policy="full", head="4")
    chosen = torch.zeros(ROWS, 3)
    chosen[::32] = 1
    (model(normal(ROWS, OUT)) * chosen).sum().backward()
    assert left_out
    gradients = [parameter.grad for parameter in tuner.parameters()]
    tuner.finish()
    assert all(found is not None and found.abs().sum() > 0 for found in gradients)
