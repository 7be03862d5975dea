"""The examples run, as a reader would start them, and trady adds at most three lines to each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"trl_sft": "trl", "sentence_embeddings": "sentence_transformers", "lightning_callback": "lightning",
         "skorch_net": "skorch", "seq2seq": "transformers", "transformers_trainer": "transformers"}  # fmt: skip


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    if script.stem in NEEDS:
        pytest.importorskip(NEEDS[script.stem])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def added(script: Path) -> list[str]:
    lines = script.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.endswith("# added") and "import" not in line]


def test_trady_adds_at_most_three_lines() -> None:
    assert len(EXAMPLES) == 9
    assert all(1 <= len(added(script)) <= 3 for script in EXAMPLES)


def test_every_example_is_in_their_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{script.name}`" in table for script in EXAMPLES)
