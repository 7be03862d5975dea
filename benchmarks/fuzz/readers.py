"""Every reader of trady: what it reads, and how it is called."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trady
from benchmarks.fuzz import samples
from trady.compare.cell_folder import CellFolder
from trady.compare.cells import Job, make_jobs
from trady.compare.read import read_matrix
from trady.compare.results import done_digests
from trady.compare.rows import make_row
from trady.ops import native
from trady.policies.schemes import Scheme
from trady.records.reading import read_bytes
from trady.search.contributions import Analysis, Contributions, find_scheme
from trady.search.contributions import _read as read_contributions
from trady.search.evolution import Evolution
from trady.study.folder import StudyFolder
from trady.study.records import read_records
from trady.training.checkpoint import DESCRIPTION, TENSORS, load_checkpoint, signed
from trady.training.data.fashion_mnist import read_idx
from trady.training.data.load import load_data
from trady.training.randomness import own_randomness, set_random_state
from trady.training.run_folder import RunFolder
from trady.training.state import load_optimizer_state
from trady.training.within_epoch import WITHIN, EpochSums


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: As ``--reader`` takes it.
        make: Writes files that can be read into a folder.
        read: Reads them, and uses what it has read as far as that takes no training.
        files: Those that are damaged: patterns below the folder.
        mend: Puts right what only protects a file against damage by chance, so that what lies behind it is reached;
            for every other file.
    """

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    mend: Callable[[Path], Any] | None = None


@functools.cache
def _table() -> trady.ChannelTable:
    return trady.plan(samples.small_net(), samples.batches(1)[0][0], budget="elements:900").table


def _plan(folder: Path) -> None:
    plan = trady.Plan.load(folder / "plan.json")
    str(plan)
    json.dumps(plan.to_json())


def _ranking(folder: Path) -> None:
    ranking = trady.LayerRanking.load(folder / "ranking.json")
    ranking.top()
    json.dumps(ranking.to_json())
    ranking.at(_table())


def _ledger(folder: Path) -> None:
    ledger = trady.Ledger.load(folder / "ledger.json")
    str(ledger)
    json.dumps(ledger.to_json())


def _scheme(folder: Path) -> None:
    scheme = Scheme.load(folder / "scheme.json")
    scheme.elements(_table())
    json.dumps(scheme.to_json())


def _analysis(folder: Path) -> None:
    analysis = Analysis(ratios=(0.5,))
    settings = {"ratios": [0.5], "epochs": 1, "batch_size": 32, "lr": 0.1, "seed": 0, "model": "0" * 16}
    found = read_contributions(folder / "analysis.json", settings)
    found = Contributions({"head": 0.0, **found.accuracies}, found.settings)
    find_scheme(_table(), 1500, found, analysis, Evolution(population=4, generations=1))


def _trained(folder: Path) -> None:
    loaded = trady.load(folder / "run", model=samples.small_net())
    loaded.predict(np.zeros((8, 8, 3), dtype=np.uint8), top=2)


def _delta(folder: Path) -> None:
    trady.apply_delta(samples.small_net(), folder / "delta.safetensors")


@functools.cache
def _session(policy: str) -> tuple[trady.Tuner, torch.optim.Optimizer, dict[str, Any], dict[str, Any]]:
    tuner, optimizer = samples.session(policy)
    return tuner, optimizer, copy.deepcopy(tuner.state_dict()), copy.deepcopy(optimizer.state_dict())


def _checkpoint(folder: Path, policy: str) -> None:
    found = load_checkpoint(folder / "checkpoint")
    tuner, optimizer, state_of_tuner, state_of_optimizer = _session(policy)
    tuner.load_state_dict(state_of_tuner)
    optimizer.load_state_dict(copy.deepcopy(state_of_optimizer))
    trainer = found.states.get("trainer")
    if trainer is not None:
        tuner.load_state_dict({"tensors": dict(trainer.tensors), "meta": dict(trainer.meta)})
    if (within := found.states.get(WITHIN)) is not None:
        _, random = EpochSums.from_state(within)
        with own_randomness():
            set_random_state(random)
            np.random.random(1000)  # noqa: NPY002 - the generator that was set
    if (state := found.states.get("optimizer")) is not None:
        load_optimizer_state(optimizer, state)
        inputs, labels = samples.batches(1)[0]
        torch.nn.functional.cross_entropy(tuner.model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def _sign_checkpoint(folder: Path) -> None:
    place = folder / "checkpoint" / DESCRIPTION
    description = json.loads(read_bytes(place))
    digest = hashlib.sha256(read_bytes(folder / "checkpoint" / TENSORS)).hexdigest()
    description["tensors"]["sha256"] = digest
    place.write_text(json.dumps(signed(description)))


def _study(folder: Path) -> None:
    read_records(StudyFolder(folder / "study"))


@functools.cache
def _job(number: int) -> Job:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "matrix.toml").write_text(samples.MATRIX)
        Scheme((0, 1), (0.5, 0.25), 2).save(Path(place) / "scheme.json")
        return make_jobs(read_matrix(Path(place) / "matrix.toml", check_sources=False))[number]


def _cells(folder: Path) -> None:
    for number, name in enumerate(("done", "failed")):
        cell = CellFolder(folder / name, _job(number).cell)
        cell.status()
        json.dumps(make_row(cell).to_json(), allow_nan=False)


def _rows(folder: Path) -> None:
    done_digests(folder)


def _matrix(folder: Path) -> None:
    make_jobs(read_matrix(folder / "matrix.toml", check_sources=False, environment={"HOME": "/"}))


def _run(folder: Path) -> None:
    RunFolder(folder / "done").history(1)


def _data(name: str, folder: Path) -> None:
    found = load_data(folder / name, image_size=8, split="train", on_unreadable="skip")
    found.train[0]


def _pictures(folder: Path) -> None:
    load_data(folder / "photos", image_size=8)


def _configuration(folder: Path) -> None:
    from trady.training.models.from_config import skeleton

    skeleton(str(folder / "model"), 3, tokens=False, length=None, dtype=None)


def _kernels(folder: Path) -> None:
    (folder / "cache").chmod(0o700)
    if (found := native._kept(folder / "cache", "0" * 16)) is not None:
        digest = hashlib.sha256(found.read_bytes()).hexdigest()
        assert found.name == f"kernels-{'0' * 16}-{found.stat().st_size}-{digest}.so"


def _make_kernels(folder: Path) -> None:
    content = b"\x7fELF" + bytes(500)
    (folder / "cache").mkdir()
    name = f"kernels-{'0' * 16}-{len(content)}-{hashlib.sha256(content).hexdigest()}.so"
    (folder / "cache" / name).write_bytes(content)


READERS = (
    Reader("plan", samples.records, _plan, ("plan.json",)),
    Reader("ranking", samples.records, _ranking, ("ranking.json",)),
    Reader("ledger", samples.records, _ledger, ("ledger.json",)),
    Reader("scheme", samples.records, _scheme, ("scheme.json",)),
    Reader("analysis", samples.records, _analysis, ("analysis.json",)),
    Reader("trained", samples.trained, _trained, ("run/run.json",)),
    Reader("delta", samples.records, _delta, ("delta.safetensors",)),
    Reader(
        "checkpoint",
        partial(samples.checkpoint, policy="trady"),
        partial(_checkpoint, policy="trady"),
        ("checkpoint/*",),
        _sign_checkpoint,
    ),
    Reader(
        "evidence",
        partial(samples.checkpoint, policy="velocity"),
        partial(_checkpoint, policy="velocity"),
        ("checkpoint/*",),
        _sign_checkpoint,
    ),
    Reader("run", samples.comparison, _run, ("done/metrics.jsonl",)),
    Reader("cells", samples.comparison, _cells, ("done/*.json", "done/*.jsonl", "failed/*.json")),
    Reader("rows", samples.comparison, _rows, ("results.jsonl",)),
    Reader("matrix", samples.comparison, _matrix, ("matrix.toml", "matrix.toml", "scheme.json")),
    Reader("study", samples.study, _study, ("study/*.json", "study/norms/*", "study/noise/*", "study/runs/*/*.jsonl")),
    Reader("npz", samples.arrays, partial(_data, "data.npz"), ("data.npz",)),
    Reader("pictures", samples.pictures, _pictures, ("photos/*/*",)),
    Reader("idx", samples.idx, lambda folder: read_idx(folder / "images.gz"), ("images.gz",)),
    Reader("configuration", samples.configuration, _configuration, ("model/*.json",)),
    Reader("kernels", _make_kernels, _kernels, ("cache/*.so",)),
)
