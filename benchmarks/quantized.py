"""Quantised weights with float channels: MiniLM-L6 in float32, int8 and 4 bits, trained on the same channels.

Memory and gradients are of a step on 32×128 random tokens. ``weights`` are all of the model; ``saved`` is what is kept
between forward and backward, by PyTorch with all plain weights but the embeddings trained, and by TraDy, which trains
channels of the quantised layers too. The error is that of the channels' gradients against the dense gradients of the
dequantised model. Then a short training on SST-2 with AdamW, channels drawn again four times an epoch.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import trady
from benchmarks import options
from benchmarks.tasks import needs
from benchmarks.text import Sentences, minilm, pretrained_minilm, read_sentences
from trady.estimates.quantized_base import quantize_base
from trady.ops.selected import channel_major
from trady.quantized.formats import inner_tensors, stored_in
from trady.training.run import finetune

MIB = 2**20
BUDGET, BATCH, DRAWS = "elements:100000", 32, 4


@dataclass(frozen=True)
class Row:
    """What one way to store the weights takes and reaches.

    Attributes:
        stored: How the linear layers of the encoder are stored.
        weights_bytes: All weights, scales of the quantisation included.
        saved_by_pytorch_bytes: Kept between forward and backward by PyTorch's own graph.
        saved_bytes: The same by TraDy.
        peak_bytes: Peak of TraDy's step, weights included.
        gradient_error: Largest relative error of a layer's channels.
        loss: On the evaluation sentences after training.
        accuracy: The same.
        float_bytes: What the float channels of the quantised layers take after training.
    """

    stored: str
    weights_bytes: int
    saved_by_pytorch_bytes: int
    saved_bytes: int
    peak_bytes: int
    gradient_error: float
    loss: float
    accuracy: float
    float_bytes: int


def in_bytes(model: nn.Module) -> nn.Module:
    """Int8 by torchao: one scale for each row."""
    quantization = needs("torchao.quantization", "quantized")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), _of_the_encoder)
    return model


def in_four_bits(model: nn.Module) -> nn.Module:
    """Int4 by torchao, in groups of 32; on a CPU it keeps each in a byte."""
    quantization = needs("torchao.quantization", "quantized")
    group = quantization.PerGroup(32)
    config = quantization.IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=group)
    quantization.quantize_(model, config, _of_the_encoder)
    return model


def in_nf4(model: nn.Module) -> nn.Module:
    """NF4 by bitsandbytes, as QLoRA (arXiv 2305.14314) stores a base."""
    quantize_base(model, 4, _of_the_encoder)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda model: model,
    "int8": in_bytes,
    "int4": in_four_bits,
    "nf4": in_nf4,
}


def _of_the_encoder(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "encoder" in name


def weight_bytes(model: nn.Module) -> int:
    """What all weights take, with the scales that are no parameters."""
    quantized = [tensor for module in model.modules() if (found := stored_in(module)) for tensor in found.tensors()]
    tensors = [*(t for p in model.parameters() for t in inner_tensors(p)), *model.buffers(), *quantized]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def gradient_error(model: nn.Module, tuner: trady.Tuner, dense: nn.Module, run: Callable[[nn.Module], Tensor]) -> float:
    """The largest relative error of a layer's selected channels."""
    dense.requires_grad_(True)
    run(dense).backward()
    run(model).backward()
    compact, errors = dict(tuner.named_parameters()), []
    for name, channels in tuner.selection.items():
        layer = tuner.plan.table[name]
        whole, got = dense.get_parameter(layer.parameter).grad, compact[f"{layer.parameter}.channels"].grad
        assert whole is not None
        assert got is not None
        wanted = channel_major(whole, layer.kind, layer.groups).flatten(0, 1)[torch.from_numpy(channels.copy())]
        errors.append(float((got - wanted).norm() / wanted.norm()))
    return max(errors)


def saved_by_pytorch(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> int:
    """What PyTorch keeps where every plain weight but the embeddings trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(type(parameter) is nn.Parameter and "embeddings" not in name)
    return trady.measure(lambda: run(model).backward(), model, inference=False).saved_bytes


def train(
    model: nn.Module, sentences: Sentences, evaluation: Sentences, epochs: int, seed: int
) -> tuple[float, float, int]:
    """Train, and return loss, accuracy and the bytes of float channels."""
    quantized = any(stored_in(module) for module in model.modules())
    result = finetune(
        model,
        sentences,
        evaluation,
        budget=BUDGET,
        epochs=epochs,
        batch_size=BATCH,
        optimizer="adamw",
        lr=3e-3,
        seed=seed,
        draws_per_epoch=min(DRAWS, -(-len(sentences) // BATCH)),
        out=None,
    )
    floats = sum(b.nbytes for name, b in result.model.named_buffers() if "float_" in name)
    assert bool(floats) == quantized
    return result.history[-1].evaluation_loss, result.accuracy, floats


def measure(name: str, data: tuple[Sentences, Sentences], epochs: int, seed: int) -> Row:
    """Measure one way to store the weights."""
    task, store = minilm(), WAYS[name]

    def run(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(**task.batch).logits, torch.arange(32) % 2)

    model = store(copy.deepcopy(task.model)).train()
    weights, pytorch = weight_bytes(model), saved_by_pytorch(copy.deepcopy(model), run)
    dense = trady.dequantize(copy.deepcopy(model))
    tuner = trady.prepare(model, task.batch, budget=BUDGET, seed=seed)
    ledger = tuner.ledger(lambda: run(model).backward(), inference=False)
    for parameter in tuner.parameters():
        parameter.grad = None
    error = gradient_error(model, tuner, dense, run)
    tuner.finish()
    trained = train(store(pretrained_minilm({})), *data, epochs, seed)
    return Row(name, weights, pytorch, ledger.saved_bytes, ledger.peak_bytes, error, *trained)


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The rows for people."""
    table = Table(title=title, title_justify="left")
    columns = "stored", "weights", "saved, PyTorch", "saved, TraDy", "peak", "gradient error", "loss", "accuracy"
    for column in (*columns, "float channels"):
        table.add_column(column, justify="left" if column == "stored" else "right")
    for row in rows:
        sizes = (row.weights_bytes, row.saved_by_pytorch_bytes, row.saved_bytes, row.peak_bytes)
        table.add_row(
            row.stored,
            *(f"{size / MIB:.1f} MiB" for size in sizes),
            f"{row.gradient_error:.1e}",
            f"{row.loss:.4f}",
            f"{row.accuracy:.1%}",
            f"{row.float_bytes / MIB:.2f} MiB",
        )
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized", description=__doc__)
    options.add_models(parser)
    options.add_json(parser)
    parser.add_argument("--stored", nargs="+", choices=list(WAYS), default=list(WAYS), help="which ways (default: all)")
    parser.add_argument("--data", type=Path, help="folder of train.tsv and test.tsv (default: data/sst2 beside models)")
    parser.add_argument("--sentences", type=int, default=640, help="train on the first n (default: 640)")
    parser.add_argument("--evaluation", type=int, default=400, help="evaluate on the first n (default: 400)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    folder = chosen.data or options.models_folder(chosen.models).parent / "data" / "sst2"
    data = (
        read_sentences(folder / "train.tsv", 48, chosen.sentences),
        read_sentences(folder / "test.tsv", 48, chosen.evaluation),
    )
    console: Console = options.console_for(chosen.json)
    rows = [measure(name, data, chosen.epochs, chosen.seed) for name in chosen.stored]
    console.print(table_of(rows, f"MiniLM-L6, {BUDGET}, {chosen.epochs} epochs of {len(data[0])} sentences of SST-2"))
    figures: dict[str, Any] = {"budget": BUDGET, "arguments": {**vars(chosen), "data": None}}
    options.write_json(chosen.json, {**figures, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    options.main(run)
