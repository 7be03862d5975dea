"""Planning for a Llama of 7 billion parameters: seconds, memory of the process, the plan."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.options import add_json, console_for, main, write_json
from trady.planning.plan import view
from trady.planning.request import Request
from trady.report.units import format_bytes

#: Llama-2-7B.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
}
MOST_SECONDS, MOST_BYTES = 60.0, 4 * 2**30


def run() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--budget", default="18 GiB", help="of a training step (default: 18 GiB)")
    parser.add_argument("--tokens", default="4x1024", help="the batch (default: 4x1024)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: bfloat16)")
    add_json(parser)
    options = parser.parse_args()
    console = console_for(options.json)

    from trady.training.models.from_config import read_dtype, read_tokens, skeleton, token_batch

    sequences, length = read_tokens(options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIG), encoding="utf-8")
        started = time.perf_counter()
        found = skeleton(str(path), 1, tokens=True, length=length, dtype=read_dtype(options.dtype))
    decision = Request(budget=options.budget).decide(found.model, token_batch(found, sequences, length, 0))
    plan = decision.plan(decision.start)
    seconds = time.perf_counter() - started
    peak = resident_peak_bytes()
    parameters = sum(p.numel() for p in found.model.parameters())
    console.print(view(plan, rows=0))
    console.print(
        f"{parameters / 1e9:.2f} billion parameters, {options.tokens} tokens, {options.dtype}: planned in "
        f"{seconds:.1f} s (at most {MOST_SECONDS:.0f}), peak of the process {format_bytes(peak)} "
        f"(at most {format_bytes(MOST_BYTES)})"
    )
    figures = {"parameters": parameters, "seconds": seconds, "resident_peak_bytes": peak, "plan": plan.to_json()}
    write_json(options.json, figures)
    return int(seconds > MOST_SECONDS or peak > MOST_BYTES)


def resident_peak_bytes() -> int:
    """The most memory that the process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(run)
