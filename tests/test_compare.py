from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pyarrow")

import psutil
import pyarrow.parquet as pq

from tests.comparisons import FULL_RATE, MATRIX, SHORT, Quiet, figures, run, run_here, write_matrix
from trady.compare.read import read_matrix
from trady.compare.results import read_rows
from trady.compare.run import Table
from trady.errors import MatrixError


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("unbroken")
    # In a process of its own: what other tests did to torch in this one may change the last digits.
    return run(write_matrix(folder), folder / "out")


def start(matrix: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trady", "compare", str(matrix), "--out", str(out), "--threads", "1", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def lines_of(out: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in out.glob("cells/*/metrics.jsonl"))


def test_a_matrix_gives_a_row_a_cell_and_head_and_full_are_run_once_for_all_budgets(unbroken: Table) -> None:
    assert unbroken.complete
    cells = [(row.policy, row.budget, row.seed) for row in unbroken.rows]
    assert sorted(cells, key=str) == sorted(
        [
            (policy, budget, seed)
            for seed in (0, 1)
            for policy, budget in (("head", None), ("full", None), ("trady", "ample"), ("static-random", "ample"))
        ],
        key=str,
    )
    assert [row.seed for row in unbroken.rows] == sorted(row.seed for row in unbroken.rows)
    for row in unbroken.rows:
        assert row.done
        assert row.accuracy is not None
        assert row.step_seconds is not None
        assert row.settings["epochs"] == row.epochs == 4
        assert row.settings.get("lr") == (0.05 if row.policy == "full" else None)
    trained = {row.policy: row.trainable_parameters or 0 for row in unbroken.rows}
    assert trained["head"] < trained["trady"] < trained["full"]


def test_the_table_is_the_same_as_parquet_and_as_json_lines(unbroken: Table) -> None:
    table = pq.read_table(unbroken.out / "results.parquet").to_pylist()
    assert [(row["policy"], row["accuracy"], row["peak_bytes"]) for row in table] == [
        (row.policy, row.accuracy, row.peak_bytes) for row in unbroken.rows
    ]
    assert read_rows(unbroken.out / "results.jsonl") == list(unbroken.rows)


def test_finished_cells_keep_what_the_table_needs_and_no_weights(unbroken: Table) -> None:
    for folder in (unbroken.out / "cells").iterdir():
        assert {path.name for path in folder.iterdir()} == {"cell.json", "metrics.jsonl", "plan.json", "result.json"}


def test_a_cell_that_ran_is_not_run_again_even_when_only_its_row_is_left(unbroken: Table, tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text((unbroken.out / "results.jsonl").read_text())
    again = run(matrix, out)
    assert again.rows == unbroken.rows
    assert not (out / "cells").exists()


def test_changed_settings_are_other_cells(unbroken: Table, tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path, MATRIX + FULL_RATE.replace("0.05", "0.01"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text((unbroken.out / "results.jsonl").read_text())
    table = run(matrix, out, summary_only=True)
    assert {row.policy for row in table.rows if not row.done} == {"full"}
    assert {row.status for row in table.rows if not row.done} == {"missing"}


def test_a_smaller_matrix_loses_no_cell_of_a_larger_one(unbroken: Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text((unbroken.out / "results.jsonl").read_text())
    smaller = run(write_matrix(tmp_path, MATRIX.replace("seeds = [0, 1]", "seeds = [1]")), out, summary_only=True)
    assert 0 < len(smaller.rows) < len(unbroken.rows)
    assert read_rows(out / "results.jsonl") == list(smaller.rows)
    larger = run(write_matrix(tmp_path), out, summary_only=True)
    assert larger.rows == unbroken.rows
    assert read_rows(out / "other_cells.jsonl") == []


def test_killed_three_times_a_matrix_ends_with_the_table_of_the_unbroken_one(unbroken: Table, tmp_path: Path) -> None:
    matrix, out = write_matrix(tmp_path), tmp_path / "out"
    chance = random.Random(time.time_ns())
    kills = 0
    for victim in ("parent", "everyone", "worker then parent"):
        before = lines_of(out)
        process = start(matrix, out, "--workers", "1")
        while process.poll() is None and lines_of(out) < before + chance.randint(1, 5):
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if victim == "everyone":
            os.killpg(process.pid, signal.SIGKILL)
        if victim == "worker then parent":
            [worker] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            worker.kill()
            said = process.stderr.readline() if process.stderr else ""
            while said and "resuming" not in said:
                assert process.stderr is not None
                said = process.stderr.readline()
            assert "ended by SIGKILL" in said
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, "workers outlived their parent"
    assert kills == 3
    table = run(matrix, out)
    assert figures(table.rows) == figures(unbroken.rows)


def test_time_that_is_up_leaves_the_rest_for_the_next_call(unbroken: Table, tmp_path: Path) -> None:
    matrix, out = write_matrix(tmp_path), tmp_path / "out"
    table = run(matrix, out, max_minutes=0.0)
    assert not table.complete
    assert not any(row.done for row in table.rows)
    assert [row.digest for row in table.rows] == [row.digest for row in unbroken.rows]


def test_cells_that_fail_or_cannot_be_met_do_not_stop_the_rest(tmp_path: Path) -> None:
    text = SHORT.replace('ample = "elements:600"', 'scant = "elements:3"').replace('["head"]', '["trady", "head"]')
    text = text.replace("[models]", '[models]\nbroken = "tests.comparisons:broken"')
    matrix, out = write_matrix(tmp_path, text), tmp_path / "out"
    table = run_here(matrix, out)
    assert table.complete
    found = {(row.model, row.policy): row for row in table.rows}
    assert {key: row.status for key, row in found.items()} == {
        ("broken", "head"): "failed",
        ("broken", "trady"): "failed",
        ("small", "head"): "done",
        ("small", "trady"): "infeasible",
    }
    assert "no such weights" in str(found["broken", "head"].message)
    assert "minimum, which is" in str(found["small", "trady"].message)
    errors = [json.loads(path.read_text()) for path in out.glob("cells/broken-*/error.json")]
    assert len(errors) == 2
    assert all("in broken" in error["traceback"] for error in errors)
    again = Quiet()
    assert figures(run_here(matrix, out, display=again).rows) == figures(table.rows)
    assert again.said == ["4 cells, 4 settled, 0 to run"]


def test_a_cell_whose_worker_dies_is_resumed_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = "".join(f'{name} = "tests.comparisons:{name}"\n' for name in ("deadly", "deadly_once"))
    monkeypatch.setenv("DEADLY_ONCE", str(tmp_path / "mark"))
    shown = Quiet()
    matrix = write_matrix(tmp_path, SHORT.replace("[models]", f"[models]\n{models}"))
    table = run(matrix, tmp_path / "out", display=shown)
    assert {row.model: row.status for row in table.rows} == {"deadly": "failed", "deadly_once": "done", "small": "done"}
    assert "SIGKILL" in str(table.rows[0].message)
    assert sum("resuming" in said for said in shown.said) == 2


def test_failed_cells_are_run_again_when_asked(tmp_path: Path) -> None:
    matrix, out = write_matrix(tmp_path, SHORT), tmp_path / "out"
    (tmp_path / "dots.npz").write_bytes(b"no archive")
    assert [row.status for row in run_here(matrix, out).rows] == ["failed"]
    write_matrix(tmp_path, SHORT)
    assert [row.status for row in run_here(matrix, out).rows] == ["failed"]
    assert [row.status for row in run_here(matrix, out, retry_failed=True).rows] == ["done"]
    assert not list(out.glob("cells/*/error.json"))


BAD = """
model = "small"
policies = ["tradi", "head"]
seeds = [0, 0]
imports = ["no_such_module"]

[models]
small = "tests.small_task:small_nett"
lite = "eficientnet-lite0"

[datasets]
dots = "dotz.npz"
more = "${NOT_SET_ANYWHERE}/x.npz"

[budgets]
ample = "600 elephants"

[budgets.scant]
smal = "elements:3"

[training]
epocs = 4
lr = -1.0
image_size = "12"

[[override]]
policy = "ful"
dataset = "dot"
"""


def test_a_file_with_mistakes_is_refused_whole_with_all_of_them(tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path, BAD)
    with pytest.raises(MatrixError) as refused:
        run(matrix, tmp_path / "out", datasets={"dits": "x.npz"})
    text = str(refused.value)
    for mistake in (
        "model: unknown key; did you mean 'models'?",
        "policies[1]: no policy 'tradi'; did you mean 'trady'?",
        "seeds: 0 is there twice",
        "imports: 'no_such_module' cannot be imported",
        "models.small: no function 'small_nett'",
        "models.lite: no model 'eficientnet-lite0'; did you mean 'efficientnet-lite0'?",
        "datasets.dots: ",
        "datasets.more: NOT_SET_ANYWHERE is not set in the environment",
        "budgets.ample.small: ",
        "budgets.scant.smal: no model 'smal' in this file; did you mean 'small'?",
        "budgets.scant: no amount for small, lite",
        "training.epocs: unknown key; did you mean 'epochs'?",
        "training.lr: ",
        "training.image_size: ",
        "override[1].policy[1]: no policy 'ful' in this file; ",
        "override[1].dataset[1]: no dataset 'dot' in this file; did you mean 'dots'?",
        "--dataset: no data set 'dits'",
    ):
        assert mistake in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("policies = [", "is not TOML"),
        (MATRIX.replace("[budgets]", "").replace('ample = "elements:600"', ""), "need one"),
        (MATRIX.replace('policies = ["trady", "static-random", "head", "full"]', ""), "policies: is missing"),
    ],
)
def test_what_cannot_be_a_matrix_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match=problem):
        read_matrix(write_matrix(tmp_path, text))


def test_the_same_cells_have_the_same_digests_wherever_the_data_lies(tmp_path: Path) -> None:
    here = run(write_matrix(tmp_path / "a"), tmp_path / "out", summary_only=True)
    elsewhere = run(
        write_matrix(tmp_path / "b"), tmp_path / "out", summary_only=True, datasets={"dots": str(tmp_path / "a")}
    )
    assert [row.digest for row in here.rows] == [row.digest for row in elsewhere.rows]


def test_an_override_may_give_its_cells_another_amount(tmp_path: Path) -> None:
    text = MATRIX + '[[override]]\npolicy = "trady"\namount = "elements:650"\n'
    table = run(write_matrix(tmp_path, text), tmp_path / "out", summary_only=True)
    amounts = {row.policy: row.amount for row in table.rows}
    assert amounts == {"trady": "elements:650", "static-random": "elements:600", "head": None, "full": None}
    assert {row.budget for row in table.rows if row.policy == "trady"} == {"ample"}


SPARSE = SHORT.replace('["head"]', '["sparse-update"]')


def test_sparse_update_without_a_scheme_is_refused_with_every_place_that_lacks_one(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match=r"no scheme for model small, budget ample; nothing was run"):
        run_here(write_matrix(tmp_path, SPARSE), tmp_path / "out")
    text = SPARSE.replace("[training]", '[training]\nscheme = "nowhere.json"')
    with pytest.raises(MatrixError, match=r"training\.scheme: cannot read the scheme .*nowhere\.json"):
        run_here(write_matrix(tmp_path, text), tmp_path / "out")


def test_a_scheme_is_trained_and_is_part_of_the_cell(tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path, SPARSE.replace("[training]", '[training]\nscheme = "scheme.json"'))
    digests = []
    for ratio in (0.25, 0.125):
        (tmp_path / "scheme.json").write_text(json.dumps({"layer_indices": [1], "channel_ratios": [ratio]}))
        [found] = run_here(matrix, tmp_path / "out").rows
        assert (found.status, found.message) == ("done", None)
        digests.append(found.digest)
    assert len(set(digests)) == 2


def test_a_given_ranking_is_part_of_a_cell_whose_policy_uses_one(unbroken: Table, tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path, MATRIX.replace("[training]", '[training]\nranking = "structural"') + FULL_RATE)
    table = run(matrix, tmp_path / "out", summary_only=True)
    changed = {old.policy for old, new in zip(unbroken.rows, table.rows, strict=True) if old.digest != new.digest}
    assert changed == {"trady"}


def test_ray_gives_the_same_numbers(unbroken: Table, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    matrix, out = write_matrix(tmp_path), tmp_path / "out"
    script = (
        "import sys, ray\n"
        "from pathlib import Path\n"
        "from tests.comparisons import run\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "assert run(Path(sys.argv[1]), Path(sys.argv[2]), engine='ray').complete\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(matrix), str(out)], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert figures(read_rows(out / "results.jsonl")) == figures(unbroken.rows)
