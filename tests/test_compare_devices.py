"""Which CUDA device a worker of a comparison sees: told by its environment, so that no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pyarrow")

import torch

from tests.device_workers import told, workplace
from trady.compare import devices
from trady.compare.devices import cells_at_a_time, check_share, least_used, seen_by_children, visible_devices
from trady.compare.local import LocalEngine
from trady.errors import MatrixError


def test_local_workers_share_the_devices_out_before_torch_has_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.VARIABLE, "6,4")
    engine = LocalEngine(3, workplace(tmp_path), ("6", "4"))
    try:
        for _ in range(3):
            engine._hire()
        assert os.environ[devices.VARIABLE] == "6,4"
        assert told(tmp_path, 3) == ["4 False", "6 False", "6 False"]
        engine._workers[1].process.kill()
        engine._workers[1].process.join()
        del engine._workers[1]
        assert engine._hire().device == "4", "the device of the worker that died"
    finally:
        engine.close()


def test_without_devices_a_worker_sees_what_its_parent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    before = os.environ.get(devices.SAFE_PATH)
    assert least_used((), []) is None
    with seen_by_children(None):
        assert devices.VARIABLE not in os.environ
        assert os.environ[devices.SAFE_PATH] == "1", "a file random.py in the current folder is none of Python's"
    with seen_by_children("1"):
        assert os.environ[devices.VARIABLE] == "1"
    assert os.environ.get(devices.SAFE_PATH) == before
    assert devices.VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [(None, 3, ("0", "1", "2")), ("2, GPU-8932f937", 2, ("2", "GPU-8932f937")), ("", 0, ()), ("1,7", 1, ("1",))],
)
def test_devices_have_the_names_that_this_process_was_given(
    named: str | None, count: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if named is None:
        monkeypatch.delenv(devices.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(devices.VARIABLE, named)
    assert visible_devices() == expected


def test_no_more_cells_at_a_time_than_fit() -> None:
    assert cells_at_a_time(2, 0.5, None, 16) == 4
    assert cells_at_a_time(2, 0.5, None, 3) == 3
    assert cells_at_a_time(1, 1 / 3, None, 16) == 3
    assert cells_at_a_time(2, 0.7, None, 16) == 2  # a cell does not lie on two
    assert cells_at_a_time(2, 1, 2, 16) == 2
    with pytest.raises(MatrixError, match="there is no GPU: leave it out"):
        cells_at_a_time(0, 0.5, None, 16)
    with pytest.raises(MatrixError, match=r"5 workers of 0\.5 GPUs do not fit on 2; at most 4 do"):
        cells_at_a_time(2, 0.5, 5, 16)
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(MatrixError, match="more than 0 and at most 1"):
            check_share(share)


def test_a_worker_of_ray_sees_the_device_that_it_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    workplace(tmp_path)
    script = (
        "import ray, sys\n"
        "from pathlib import Path\n"
        "from tests.device_workers import told, workplace\n"
        "from trady.compare.on_ray import RayEngine\n"
        "ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)\n"
        "folder = Path(sys.argv[1])\n"
        "engine = RayEngine(None, workplace(folder), gpus_per_cell=0.5)\n"
        "assert engine.free() == 4\n"
        "actors = [engine._make(engine._place) for _ in range(3)]\n"
        "print(told(folder, 3))\n"
        "ray.shutdown()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() in ("['0 False', '0 False', '1 False']", "['0 False', '1 False', '1 False']")
