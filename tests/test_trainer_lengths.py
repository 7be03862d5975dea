"""The largest batch that a trainer will see is known before the first step: no later one is a surprise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trady
from benchmarks.trainers.builds import BUILDS, _arguments, _dataset, llama, texts, tokenizer
from benchmarks.trainers.checks import quiet
from tests.tight_budget import least_of
from trady.integrations.lengths import largest_choices, lengths_of
from trady.tuner.guard import Guard

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

#: What the trainers' own losses take beside the model, which no plan counts, as a share of these small budgets.
BESIDE = 1.01


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with quiet():
        yield


def ascending(least: int, most: int, count: int = 16) -> list[str]:
    """Texts that become longer."""
    return sorted(texts(least, most, count=count), key=len)


def grpo(out: Path, options: dict[str, Any], kind: str = "GRPO") -> Any:
    """Prompts and completions become longer."""
    import trl

    data = _dataset({"prompt": [" ".join(text.split()) for text in ascending(2, 9)]})
    settings = {"num_generations": 2, "max_completion_length": 8, "gradient_checkpointing": False}
    made = getattr(trl, f"{kind}Trainer")(
        model=llama(), args=_arguments(getattr(trl, f"{kind}Config"), out, {**settings, **options}),
        processing_class=tokenizer(), reward_funcs=lambda completions, **_: [float(len(each)) for each in completions],
        train_dataset=data,
    )  # fmt: skip
    made.shuffle_dataset = False
    made.generation_config.max_new_tokens = 1

    class Longer(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            made.generation_config.max_new_tokens = 8

    made.add_callback(Longer())
    return made


def rloo(out: Path, options: dict[str, Any]) -> Any:
    return grpo(out, {"beta": 0.0, **options}, "RLOO")


def packed(out: Path, options: dict[str, Any]) -> Any:
    import trl

    settings = {"max_length": 24, "packing": True, "gradient_checkpointing": False}
    return trl.SFTTrainer(
        model=llama(), args=_arguments(trl.SFTConfig, out, {**settings, **options}), processing_class=tokenizer(),
        train_dataset=_dataset({"text": texts(3, 15, count=40)}),
    )  # fmt: skip


def cut(out: Path, options: dict[str, Any]) -> Any:
    """Most samples are cut to one length, so that the longest ones have no padding between them."""
    import trl

    settings = {"max_length": 8, "gradient_checkpointing": False}
    return trl.SFTTrainer(
        model=llama(), args=_arguments(trl.SFTConfig, out, {**settings, **options}), processing_class=tokenizer(),
        train_dataset=_dataset({"text": ascending(3, 15)}),
    )  # fmt: skip


def dpo(out: Path, options: dict[str, Any]) -> Any:
    """The longest pair is neither that of the longest part, nor that of the longest sum of all three."""
    import trl

    words = [(1, 1, 1), (10, 10, 10), (11, 12, 1), (1, 13, 10)] * 2 + [(2, 2, 2)] * 8
    parts = [[" ".join(["w1"] * count) for count in column] for column in zip(*words, strict=True)]
    data = _dataset({"prompt": [f"{text} " for text in parts[0]], "chosen": parts[1], "rejected": parts[2]})
    settings = {"max_length": 64, "gradient_checkpointing": False, "per_device_train_batch_size": 1}
    return trl.DPOTrainer(
        model=llama(), ref_model=llama(), args=_arguments(trl.DPOConfig, out, {**options, **settings}),
        processing_class=tokenizer(), train_dataset=data,
    )  # fmt: skip


TRAINERS = {
    **BUILDS, "GRPOTrainer": grpo, "RLOOTrainer": rloo, "DPOTrainer": dpo, "SFTTrainer, packing": packed,
    "SFTTrainer, cut": cut,
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_no_later_batch_is_larger_than_the_one_that_was_planned_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "Trainer" not in name.split(",")[0].removesuffix("Trainer") and name not in ("Trainer", "Seq2SeqTrainer"):
        pytest.importorskip("trl")
    if name == "SentenceTransformerTrainer":
        pytest.importorskip("sentence_transformers")
    surprises = []
    monkeypatch.setattr(Guard, "_exceeded", lambda self, seen, *_: surprises.append(seen.conditions))
    refused = TRAINERS[name](tmp_path / "refused", {"max_steps": 1})
    trady.tune(refused, budget="peak:1 B")
    limit = int(1.05 * least_of(refused.train))
    made = TRAINERS[name](tmp_path / "made", {"max_steps": 4})
    session = trady.tune(made, budget=f"peak:{limit} B")
    peaks, step = [], made.training_step

    def measured(model: nn.Module, *args: Any) -> Any:
        if session.tuner is None:
            return step(model, *args)
        out: list[Any] = []
        ledger = session.tuner.ledger(lambda: out.append(step(model, *args)), inference=False)
        peaks.append(ledger.peak_bytes)
        return out[0]

    made.training_step = measured
    made.train()
    assert len(peaks) == 3
    assert not surprises
    assert max(peaks) <= limit * BESIDE
    assert session.plan is not None
    assert session.plan.selection.count


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=4, max_size=12),
    st.integers(1, 4),
)
def test_one_of_the_choices_is_as_large_as_any_batch(rows: list[list[int]], size: int) -> None:
    """For collators that pad pairs of columns to the longest, and for those that put all samples in one row."""
    lengths = np.array(rows)

    def padded(batch: Any) -> int:
        return len(batch) * int(max(lengths[batch][:, [0, 1]].sum(1).max(), lengths[batch][:, [0, 2]].sum(1).max()))

    def in_one_row(batch: Any) -> int:
        return int(lengths[batch][:, 0].sum())

    def in_two(batch: Any) -> tuple[int, ...]:
        return tuple(int(longest) for longest in lengths[batch][:, :2].max(0))

    choices = largest_choices(lengths, size)
    assert all(len(set(choice)) == min(size, len(rows)) for choice in choices)
    every = [list(batch) for batch in itertools.combinations(range(len(rows)), size)]
    for collated in (padded, in_one_row):
        assert max(map(collated, choices)) == max(map(collated, every))
    if size > 3:
        assert max(in_two(choice) for choice in choices if choice == choices[0]) == tuple(lengths[:, :2].max(0))


def test_lengths_are_those_of_the_columns_whatever_the_data_is() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"ids": [1, 2], "text": "a", "label": 0},
        {"ids": [], "text": "längs", "label": 1},
        {"ids": [1], "text": "", "label": 1},
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    expected = [[2, 1], [0, 5], [1, 0]]
    table = datasets.Dataset.from_dict(columns)
    for data in (rows, table, table.select([0, 1, 2]), table.with_format("torch", columns=["label"])):
        lengths, text = lengths_of(data, 100)
        if len(lengths):
            assert lengths.tolist() == expected
            assert text
    assert lengths_of(table.select([2, 0]), 100)[0].tolist() == [[1, 0], [2, 1]]
    assert lengths_of([torch.ones(3), torch.ones(3)], 100)[0].size == 0
    assert lengths_of([{"length": 7, "ids": [1]}], 100)[0].tolist() == [[7]]
