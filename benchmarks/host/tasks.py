"""What host time is measured on: networks so narrow that kernels take next to nothing, and smaller batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks import text, vision
from benchmarks.methods import Step, plain_step
from benchmarks.skipped import SkippedError
from benchmarks.tasks import CrossEntropy, Task, needs, seeded
from benchmarks.workloads import CNN, TRANSFORMER, Workload, share_workload
from trady.estimates.heads import train_with_fixed_statistics

#: Of the channels of every layer, at least one trains.
_SHARE = Fraction(2, 100)

#: The last k blocks train, k being this share of all: 5 of the 17 of MobileNetV2-w0.35.
_LAST = 0.3


def narrow_llama(layers: int = 16) -> Task:
    """Llama, 64 wide, on 4×16 tokens."""
    return text.llama(4, 16, layers=layers, width=64, intermediate=128, vocabulary=128)


def narrow_bert(layers: int = 12) -> Task:
    """BERT, 64 wide, with a classifier, on 4×16 tokens."""
    hf = needs("transformers", "transformers")
    config = hf.BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_cache=False,
    )
    _, labels = vision.noise(4, 1, 2)
    model = seeded(lambda: hf.BertForSequenceClassification(config))
    return Task(model, {"input_ids": text.tokens(4, 16, 128)}, CrossEntropy(labels))


def narrow_resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> Task:
    """ResNet-50 with a 16th of the channels, on 2×3×32×32."""
    hf = needs("transformers", "transformers")
    widths = [16, 32, 64, 128][: len(depths)]
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=widths, depths=list(depths), num_labels=10)
    images, labels = vision.noise(2, 32, 10)
    return Task(seeded(lambda: hf.ResNetForImageClassification(config)), images, CrossEntropy(labels))


#: By name, the narrow models. Their steps are host time.
NARROW: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        share_workload("llama", "Llama, 16 layers, 64 wide, 4×16 tokens", narrow_llama, _SHARE, TRANSFORMER),
        share_workload("bert", "BERT, 12 layers, 64 wide, 4×16 tokens", narrow_bert, _SHARE, TRANSFORMER),
        share_workload(
            "resnet",
            "ResNet-50, a 16th as wide, 2×3×32×32",
            narrow_resnet,
            _SHARE,
            CNN,
            ("ResNetBottleNeckLayer",),
        ),
    )
}


def with_samples(workload: Workload, samples: int) -> Workload:
    """Return a workload whose batch has only this many samples."""

    def first(tensor: Any) -> Any:
        return tensor[:samples].clone() if isinstance(tensor, Tensor) else tensor

    def make(models: Path) -> Task:
        task = workload.make(models)
        if not isinstance(task.batch, dict):
            batch = first(task.batch)
        elif task.batch.get("labels") is task.batch["input_ids"]:  # a tensor that is there twice stays one
            batch = dict.fromkeys(("input_ids", "labels"), first(task.batch["labels"]))
        else:
            batch = {name: first(value) for name, value in task.batch.items()}
        loss = CrossEntropy(first(task.loss.labels)) if isinstance(task.loss, CrossEntropy) else task.loss
        return Task(task.model, batch, loss)

    return replace(workload, make=make)


@contextmanager
def last_blocks(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Plain PyTorch; the last blocks and all that is registered behind them train (statistics fixed)."""
    blocks = _blocks(workload, task.model)
    first = next(blocks[-max(1, round(_LAST * len(blocks)))].parameters())
    task.model.requires_grad_(False)
    train_with_fixed_statistics(task.model)
    parameters = list(task.model.parameters())
    for parameter in parameters[next(i for i, p in enumerate(parameters) if p is first) :]:
        parameter.requires_grad_(True)
    yield plain_step(task)


def _blocks(workload: Workload, model: nn.Module) -> list[nn.Module]:
    named = [module for module in model.modules() if type(module).__name__ in workload.blocks]
    lists = (list(module) for module in model.modules() if isinstance(module, nn.ModuleList))
    found = named or max(lists, key=len, default=[])
    if not found:
        raise SkippedError("the model has no blocks")
    return found
