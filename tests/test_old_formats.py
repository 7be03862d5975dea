"""What the trady of e38e0df wrote is read today, says what it said, and is gone on with to the same end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trady
from tests.fixtures import old_formats as old
from trady.errors import RankingError, TradyError
from trady.policies.schemes import Scheme
from trady.search.contributions import Analysis, analyse
from trady.study.folder import StudyFolder, Unit
from trady.study.records import read_records
from trady.training.checkpoint import load_checkpoint
from trady.training.state import load_optimizer_state

FILES = Path(__file__).parent / "fixtures" / "e38e0df"
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text())

#: Sums are in the same order, and so bits are the same, under the same PyTorch on the same kind of processor only.
SAME_ARITHMETIC = torch.__version__ == EXPECTED["torch"] and torch.backends.cpu.get_cpu_capability() == EXPECTED["cpu"]
TOLERANCE = 0.0 if SAME_ARITHMETIC else 1e-3

#: What is of the process that runs, not of the run.
OF_THE_PROCESS = {"seconds", "samples_per_second", "observing_seconds", "process_bytes", "process_peak_bytes"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads would add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_plan_says_what_it_said() -> None:
    plan = trady.Plan.load(FILES / "plan.json")
    expected = EXPECTED["plan"]
    assert plan.predicted_peak_bytes == expected["predicted_peak_bytes"]
    assert list(plan.table.names) == expected["layers"]
    assert plan.selection.digest == expected["selection"]
    assert plan.cost.elements == expected["elements"] == plan.table.elements(plan.selection)
    assert json.loads(json.dumps(plan.to_json())) == json.loads((FILES / "plan.json").read_text())


OTHER_SCORE = "version 1, this trady reads version 2 .*equation 8 of arXiv 2510.19675"


def test_a_ranking_of_the_score_of_then_is_refused_with_what_to_do() -> None:
    with pytest.raises(RankingError, match=rf"ranking\.json: .*{OTHER_SCORE}.*measure it again with trady rank"):
        trady.LayerRanking.load(FILES / "ranking.json")


def test_a_prior_of_the_score_of_then_is_refused_and_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADY_PRIORS", str(tmp_path))
    structure = json.loads((FILES / "ranking.json").read_text())["structure"]
    shutil.copy(FILES / "ranking.json", tmp_path / f"{structure}.json")
    with pytest.raises(RankingError, match=rf"{structure}\.json: .*{OTHER_SCORE}.*measure it again with trady rank"):
        trady.prepare(old.tiny_net(), old.images(8)[0], budget="elements:1500")


def test_a_run_that_learnt_by_the_score_of_then_is_not_gone_on_with(tmp_path: Path) -> None:
    shutil.copytree(FILES / "run-online", tmp_path / "run")
    with pytest.raises(TradyError, match=f"{OTHER_SCORE}.*use the trady that wrote it"):
        trady.finetune(
            old.tiny_net(),
            old.data(40),
            old.data(24, 500),
            out=tmp_path / "run",
            resume=True,
            progress=False,
            **{**old.RUN, "policy": "trady", "ranking": "online"},
        )
    assert (tmp_path / "run" / "checkpoint" / "tensors.safetensors").is_file()


def test_the_ledger_has_the_bytes_that_were_measured() -> None:
    ledger = trady.Ledger.load(FILES / "ledger.json")
    assert (ledger.peak_bytes, ledger.saved_bytes) == (
        EXPECTED["ledger"]["peak_bytes"],
        EXPECTED["ledger"]["saved_bytes"],
    )
    assert ledger.to_json() == json.loads((FILES / "ledger.json").read_text())


def test_the_scheme_trains_the_same_channels() -> None:
    scheme = Scheme.load(FILES / "scheme.json")
    assert scheme == Scheme((0, 1), (0.5, 0.25), 2)
    assert scheme.counts(trady.Plan.load(FILES / "plan.json").table) == {"first": 2, "second": 2}


def test_a_search_trains_nothing_again_that_it_measured(tmp_path: Path) -> None:
    file = shutil.copy(FILES / "analysis.json", tmp_path)
    table, runs = trady.Plan.load(FILES / "plan.json").table, []
    found = analyse(
        old.tiny_net(),
        old.data(24),
        old.data(12, 500),
        table,
        1500,
        Analysis(ratios=(0.5,)),
        file=Path(file),
        told=lambda key, *_: runs.append(key),
    )
    assert runs == []
    assert found.accuracies == json.loads((FILES / "analysis.json").read_text())["accuracies"]
    assert {"head", "0@0.5", "1@0.5"} == set(found.accuracies)


def test_the_study_has_its_norms_noise_and_accuracy() -> None:
    records = read_records(StudyFolder(FILES / "study"))
    unit = Unit("tiny", 0, 0)
    assert records.settings == old.STUDY
    assert records.units == (unit,)
    assert {name: norms.shape for name, norms in records.norms[unit].items()} == {"first": (5, 3), "second": (5, 8)}
    assert all(np.isfinite(norms).all() and norms.any() for norms in records.norms[unit].values())
    assert [noise.layer for noise in records.noise[unit]] == ["first", "second"]
    written = json.loads((FILES / "study" / "runs" / "tiny-seed0" / "result.json").read_text())
    assert records.accuracy[unit] == written["accuracy"]


def test_an_interrupted_run_ends_bit_for_bit_as_the_old_one_did(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(FILES / "run", out)
    expected = EXPECTED["run"]
    result = old.finetune(out, resume=True)
    for epoch, before in zip(result.history, expected["history"], strict=True):
        for key, value in epoch.to_json().items():
            if key == "evaluation_loss":  # of the plain model by now, where the armed one sums in another order
                assert value == pytest.approx(before[key], rel=1e-6)
            elif isinstance(value, float) and key not in OF_THE_PROCESS:
                assert value == pytest.approx(before[key], rel=TOLERANCE, abs=0), key
            elif key in ("averaged_bytes", "averaging_calls"):  # of several processes
                assert value == 0
            elif key == "peak_bytes":  # indices of channels are counted by now
                assert before[key] <= value <= before[key] + 64
            elif key not in OF_THE_PROCESS:
                assert value == before[key], key
    close(load_file(out / "delta.safetensors"), load_file(FILES / "delta.safetensors"))
    if SAME_ARITHMETIC:
        assert old.digest(result.model.state_dict()) == expected["model"]


def test_a_delta_makes_the_model_that_was_trained() -> None:
    delta = load_file(FILES / "delta.safetensors")
    model = trady.apply_delta(old.tiny_net(), delta)
    assert old.digest(model.state_dict()) == EXPECTED["run"]["model"]


def test_a_session_with_evidence_and_adamw_goes_on_bit_for_bit() -> None:
    found, expected = load_checkpoint(FILES / "tuner"), EXPECTED["tuner"]
    trainer = found.states["trainer"]
    tuner, _ = old.armed()
    tuner.load_state_dict({"tensors": dict(trainer.tensors), "meta": dict(trainer.meta)})
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    load_optimizer_state(optimizer, found.states["optimizer"])
    assert old.state_of_tuner(tuner) == expected["before"]
    losses = old.train_epoch(tuner, optimizer, 2)
    assert losses == pytest.approx(expected["losses"], rel=TOLERANCE, abs=0)
    if SAME_ARITHMETIC:
        assert old.state_of_tuner(tuner) == expected["after"]


def close(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=TOLERANCE, atol=TOLERANCE)
