"""The shape of Llama-3.2-3B, asked about from its configuration alone, beside figures measured by others on a GPU."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

import trady
from benchmarks.options import write_json
from benchmarks.planning import resident_peak_bytes
from trady.estimates.report import FitReport
from trady.report.units import format_bytes
from trady.training.models.from_config import DTYPES, skeleton, token_batch

#: Llama-3.2-3B (https://huggingface.co/meta-llama/Llama-3.2-3B).
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}

BATCH, LENGTH, DTYPE, RANK = 4, 768, "bfloat16", 32

GIB = 2**30

#: What peft publishes for this model in bfloat16, AdamW, batches of 4 with up to 768 tokens, on an L40S: the most
#: memory that PyTorch's allocator had reserved, and the same in 99 of 100 steps (huggingface/peft,
#: method_comparison/MetaMathQA/results of 2025-06, ``cuda_memory_max`` and ``cuda_memory_reserved_99th``). Its page
#: shows 36.2 and 20.8 GiB.
PUBLISHED = {
    "full": {"page_gib": 36.2, "max_bytes": 37241225216, "99th_bytes": 33573390254, "trainable": 3212749824},
    "lora": {"page_gib": 20.8, "max_bytes": 22273851392, "99th_bytes": 17710763212, "trainable": 9175040},
}

#: Tokens that peft counts, over the samples.
MEAN_LENGTH = 4198051 // 20000

MOST_SECONDS, MOST_BYTES = 60.0, 4 * GIB

METHODS = ("full", "checkpoint", "lora", "lora-checkpoint", "qlora", "qlora-checkpoint")


def run(console: Console, target: str | None) -> int:
    """Ask, print, and return 1 if it took too long or too much memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIG), encoding="utf-8")

        def ask(length: int, methods: tuple[str, ...]) -> FitReport:
            return trady.fit(
                str(path),
                methods=methods,
                batch_size=BATCH,
                length=length,
                dtype=DTYPE,
                rank=RANK,
                targets="peft",
                device="cuda",
            )

        started, processor = time.perf_counter(), time.process_time()
        report = ask(LENGTH, METHODS)
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor
        resident = resident_peak_bytes()
        mean = ask(MEAN_LENGTH, ("full", "lora"))
        padded = ask_padded(str(path))
    console.print(report)
    for method, published in PUBLISHED.items():
        told = {f"{LENGTH} tokens": report, "with a mask for padding": padded, f"{MEAN_LENGTH} tokens": mean}
        peaks = ", ".join(f"{what} {format_bytes(each[method].peak_bytes)}" for what, each in told.items())
        reserved = f"{format_bytes(published['max_bytes'])} ({published['page_gib']} GiB on its page)"
        usual = format_bytes(published["99th_bytes"])
        console.print(f"{report[method].title}: {peaks}; peft reserved {reserved}, {usual} in 99 of 100 steps")
    console.print(
        f"{processor_seconds:.1f} s of processor time (at most {MOST_SECONDS:.0f}), {seconds:.1f} s on the clock; peak "
        f"of the process {format_bytes(resident)} (at most {format_bytes(MOST_BYTES)})"
    )
    same = all(report[method].trainable_parameters == told["trainable"] for method, told in PUBLISHED.items())
    console.print(f"trainable parameters as peft counts them: {'yes' if same else 'NO'}")
    figures = {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "resident_peak_bytes": resident,
        "published": PUBLISHED,
        "report": report.to_json() | {"model": "Llama-3.2-3B"},
        "padded": [asdict(row) for row in padded.rows],
        "of_mean_length": {"length": MEAN_LENGTH, "rows": [asdict(row) for row in mean.rows]},
        "config": CONFIG,
    }
    write_json(target, figures)
    return int(processor_seconds > MOST_SECONDS or resident > MOST_BYTES or not same)


def ask_padded(config: str) -> FitReport:
    """Ask about a batch as peft's loop has it: with a mask, since its sequences are not of one length."""
    found = skeleton(config, 1, tokens=True, length=LENGTH, dtype=DTYPES[DTYPE])
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, -1] = 0
    batch = {**token_batch(found, BATCH, LENGTH, 0), "attention_mask": mask}
    return trady.fit(found.model, batch, methods=("full", "lora"), rank=RANK, targets="peft", device="cuda")
