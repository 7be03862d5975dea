"""Llama 3.2 shapes with random weights in bf16: what methods take and give, and what fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import nn

import trady
from benchmarks import text
from benchmarks.gpu.times import replayed
from benchmarks.gpu.where import Figures, Where, adamw, allocator_peak, forget, timed
from benchmarks.methods import Step, TunedStep, plain, trady_step
from benchmarks.skipped import SkippedError
from benchmarks.tasks import MissingPackageError, Task, needs, own_loss
from benchmarks.workloads import WORKLOADS
from trady.planning.budget import parse_budget

#: Width, width of the feed-forward layers, layers, heads, heads of keys and values.
SHAPES = {"1b": (2048, 8192, 16, 32, 8), "3b": (3072, 8192, 28, 24, 8), "small": (64, 96, 2, 4, 2)}

VOCABULARY = 128256

#: Sequences and tokens.
BATCHES = {"4x768": (4, 768), "1x4096": (1, 4096)}

METHODS: dict[str, Callable[..., AbstractContextManager[Step]]] = {
    **{name: partial(plain, name=name, rank=32) for name in ("full", "checkpoint", "lora", "lora-checkpoint")},
    "trady": trady_step,
    "trady, all recomputed": partial(trady_step, recompute="all"),
    "trady, nothing recomputed": partial(trady_step, recompute="none"),
    "trady, peak of 3 times the weights": trady_step,
}

#: Methods whose limits are looked for.
LIMITED = ("full", "checkpoint", "lora-checkpoint", "trady")


@dataclass(frozen=True)
class Shape:
    """A model's shape and its batch."""

    size: str
    sequences: int
    tokens: int

    def make(self, device: torch.device) -> Task:
        """Build it on the device, with random weights in bf16."""
        hf = needs("transformers", "transformers")
        width, between, layers, heads, key_heads = SHAPES[self.size]
        config = hf.LlamaConfig(
            hidden_size=width,
            intermediate_size=between,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=VOCABULARY if self.size != "small" else 512,
            max_position_embeddings=max(self.tokens, 4096),
            tie_word_embeddings=True,
            use_cache=False,
            dtype=torch.bfloat16,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model: nn.Module = hf.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        ids = text.tokens(self.sequences, self.tokens, config.vocab_size).to(device)
        return Task(model, {"input_ids": ids, "labels": ids}, own_loss)


def steps(item: str, where: Where, write: Callable[[Figures], None]) -> None:
    """Run every method in turn, one model at a time; report peaks, seconds and tokens a second."""
    size, _, batch = item.partition("-")
    shape = Shape("small", 2, 16) if where.small else Shape(size, *BATCHES[batch])
    found: Figures = {}
    for method in METHODS:
        if where.seconds_left < 0:
            found[method] = {"left_out": "time was up"}
            continue
        forget(where.device)
        try:
            found[method] = _figures(method, shape, where)
        except (SkippedError, MissingPackageError) as reason:
            found[method] = {"left_out": str(reason)}
        except (torch.cuda.OutOfMemoryError, trady.BudgetError) as error:
            found[method] = {"error": str(error)[:300]}
        write(found)


def _figures(method: str, shape: Shape, where: Where) -> Figures:
    with _step(method, shape, where.device) as step:
        step.run()  # the optimizer makes its state
        peak = allocator_peak(step.run, where.device)
        if peak is None:
            peak = step.ledger().peak_bytes
        rounds = 2 if where.small else 5
        times = timed({"": step.run}, rounds, where.device)[""]
        predicted = step.tuner.plan.predicted_peak_bytes if isinstance(step, TunedStep) else None
        captured = replayed(step, where.device) if isinstance(step, TunedStep) and where.on_cuda else {}
        if captured:
            captured["reserved"] = torch.cuda.memory_reserved(where.device)
    speed = shape.sequences * shape.tokens / times["step"]
    return {
        "captured": captured,
        "peak": peak,
        "predicted": predicted,
        **times,
        "tokens_a_second": speed,
        "trainable": step.trainable_parameters,
        "note": step.note,
    }


@contextmanager
def _step(method: str, shape: Shape, device: torch.device) -> Iterator[Step]:
    optimizer = adamw if device.type == "cuda" else partial(torch.optim.AdamW, lr=1e-6)
    workload, task = WORKLOADS["llama-tiny"], shape.make(device)
    if "peak" in method:
        weights = sum(parameter.nbytes for parameter in task.model.parameters())
        workload = replace(workload, policy="trady", budget=f"peak:{3 * weights} B")
    with METHODS[method](workload, task, optimizer=optimizer) as step:
        yield step


def limits(item: str, where: Where, write: Callable[[Figures], None]) -> None:
    """Look for the largest batch of 768 tokens, and the longest of 1 sequence, whose step stays in a limit.

    Peaks grow nearly linearly with both, so two of them tell where to look; what is reported has run.
    """
    size, _, method = item.partition("-")
    method = {"trady": "trady, all recomputed"}.get(method, method)
    limit = parse_budget("2 MiB" if where.small else size.replace("GiB", " GiB")).amount
    model, length, unit = ("small", 16, 16) if where.small else ("1b", 768, 256)
    found: Figures = {"limit": limit}
    if where.on_cuda:  # what looks beyond the limit must not take the memory of the processes beside it
        total = torch.cuda.get_device_properties(where.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.02 * limit / total), where.device.index or 0)

    @cache
    def peak(batch: int, tokens: int) -> float:
        forget(where.device)
        try:
            with _step(method, Shape(model, batch, tokens), where.device) as step:
                step.run()
                taken = allocator_peak(step.run, where.device)
                return taken if taken is not None else step.ledger().peak_bytes
        except (torch.cuda.OutOfMemoryError, trady.BudgetError):
            return float("inf")

    for name, peak_of in (
        ("batch", lambda n: peak(n, length)),
        ("length", lambda n: peak(1, unit * n)),
    ):
        best = largest(peak_of, limit, where)
        found[name] = best * (unit if name == "length" else 1)
        found[f"{name}_peak"] = peak_of(best) if best else None
        write(found)


def largest(peak_of: Callable[[int], float], limit: int, where: Where) -> int:
    """Return the largest number from 1 to 4096 whose peak is in the limit; 0 if there is none.

    Args:
        peak_of: From the number to bytes; grows.
        limit: Bytes.
        where: When its time is up, what is known by then is returned.

    """
    known = {n: peak_of(n) for n in (1, 4)}
    good = max((n for n, peak in known.items() if peak <= limit), default=0)
    bad = min((n for n, peak in known.items() if peak > limit), default=4097)
    by_slope = True
    while bad - good > 1 and where.seconds_left > 0:
        finite = sorted(n for n, peak in known.items() if peak < float("inf"))
        low, high = finite[-2:] if len(finite) > 1 else (0, 0)
        slope = (known[high] - known[low]) / (high - low) if high > low else 0
        guess = (good + bad) // 2
        if by_slope and slope > 0:  # every other time, since peaks need not be linear
            guess = int(low + (limit - known[low]) / slope)
            guess += (guess <= good) - (guess >= bad)
        by_slope = not by_slope
        guess = min(max(guess, good + 1), bad - 1)
        known[guess] = peak_of(guess)
        good, bad = (guess, bad) if known[guess] <= limit else (good, guess)
    return good
