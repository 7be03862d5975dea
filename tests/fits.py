"""What the tests of ``trady fit`` ask about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trady
from benchmarks.fit.__main__ import stepping
from benchmarks.tasks import Task
from tests.models import Residual
from trady.estimates.fit import OPTIMIZERS
from trady.estimates.methods import Settings, read_method
from trady.training.models.load import LoadedModel

#: A configuration of transformers.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 64,
}


def installed(method: str) -> None:
    """Skip a test of a method whose package is not there."""
    if "lora" in method:
        pytest.importorskip("peft")
    if method.startswith("qlora"):
        pytest.importorskip("bitsandbytes")


def ledger_of(task: Task, method: str, optimizer: str = "adamw", **settings: Any) -> trady.Ledger:
    """Run two steps, and account for the second one."""
    read_method(method).apply(task.model, Settings(**settings))
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    step = stepping(task, OPTIMIZERS[optimizer](trained, lr=1e-6))
    step()
    return trady.measure(step, task.model, inference=False)


def llama(dtype: torch.dtype = torch.float32, batch: int = 4, length: int = 24) -> Task:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500, max_position_embeddings=64, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config).to(dtype)
    ids = torch.randint(1, 500, (batch, length), generator=torch.Generator().manual_seed(0))
    return Task(model, {"input_ids": ids, "labels": ids}, lambda output: output.loss)


def heavy(classes: int) -> nn.Module:
    """40 GiB of weights, which a machine that tests run on has no room for."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 100_000), nn.Linear(100_000, 100_000))


def careful(classes: int) -> LoadedModel:
    """A function that looks at what it has made, which takes values."""
    model = Residual(classes=classes)
    assert float(model.head.weight.detach().abs().sum()) > 0
    return LoadedModel(model, image_size=16)
