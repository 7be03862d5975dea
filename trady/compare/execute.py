"""One cell, from its folder to its outcome, in the process of a worker."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from trady.compare.cell_folder import CellFolder, Outcome, Status
from trady.compare.cells import Job
from trady.errors import BudgetError, CheckpointError, LockedError
from trady.policies import Scheme, SparseUpdate
from trady.ranking.priors import read_ranking
from trady.records.version import __version__
from trady.training.data.datasets import DataSplit, Normalization
from trady.training.data.load import check_examples, load_data
from trady.training.models.here import importable_here
from trady.training.models.load import image_format, load_model
from trady.training.rates import usual_rate
from trady.training.result import Result
from trady.training.run import finetune

Keep = Literal["results", "weights"]

#: How long a cell waits for a process that is stopping and still locks its folder.
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Workplace:
    """What every worker receives once.

    Attributes:
        out: Where the cells' folders are.
        keep: Whether a finished cell keeps its weights.
        threads: Of torch, in each worker.
        imports: Modules to import first.
        search_path: Where Python looks for modules.
        folder: The working folder; a model's name may be a folder in it.
    """

    out: Path
    keep: Keep
    threads: int
    imports: tuple[str, ...] = ()
    search_path: tuple[str, ...] = ()
    folder: Path = Path()

    def enter(self) -> None:
        """Make this process a worker."""
        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        sys.path.extend(entry for entry in self.search_path if entry not in sys.path)
        torch.set_num_threads(self.threads)
        os.environ["TRADY_PRIORS"] = os.devnull  # shipped priors only: another machine has others of its own
        for name in self.imports:
            with importable_here():
                importlib.import_module(name)

    def cell_folder(self, job: Job) -> CellFolder:
        """Return the folder of a cell."""
        return CellFolder(self.out / "cells" / job.cell.folder, job.cell)


def run_cell(job: Job, place: Workplace) -> Outcome:
    """Train or resume a cell; an error becomes its outcome and is written to its folder."""
    folder = place.cell_folder(job)
    with folder.alone(PATIENCE_SECONDS) as alone:
        if not alone:
            return Outcome(Status.BUSY, f"another process works in {folder.path}")
        if folder.status() is Status.DONE:
            return Outcome(Status.DONE)
        folder.begin(machine(), keep=place.keep)
        try:
            seconds = _train(job, folder, keep_best=place.keep == "weights").seconds
        except LockedError as error:
            return Outcome(Status.BUSY, str(error))
        except BudgetError as error:
            return folder.write_error(Status.INFEASIBLE, error)
        except Exception as error:  # whatever a model, a data set or a policy raises
            return folder.write_error(Status.FAILED, error)
        if place.keep == "results":
            folder.drop_weights()
        return Outcome(Status.DONE, seconds=seconds)


def machine() -> dict[str, object]:
    """Return what a result may depend on, besides its cell."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trady": __version__,
    }


def _train(job: Job, folder: CellFolder, *, keep_best: bool) -> Result:
    try:
        return _finetune(job, folder, resume=True, keep_best=keep_best)
    except CheckpointError:
        # The checkpoint is of another version of the model, of the data or of trady, so it cannot be resumed.
        return _finetune(job, folder, resume=False, keep_best=keep_best)


def _finetune(job: Job, folder: CellFolder, *, resume: bool, keep_best: bool) -> Result:
    cell = job.cell
    settings = dict(cell.settings)
    image_size, limits = settings.pop("image_size", None), _limits(settings)
    normalization, usual_size = _image_format(job.model)
    data = _data(job.dataset, image_size or usual_size, limits, normalization, cell.seed)
    check_examples(data, job.dataset)
    for name in ("channel_clip", "max_grad_norm"):
        if settings.get(name) is False:
            settings[name] = None
    # One rate for all policies, full fine-tuning included: they are to be compared.
    settings.setdefault("lr", usual_rate(settings.get("optimizer", "sgd"), settings.get("momentum", 0.0)))
    return finetune(
        load_model(job.model, len(data.classes), seed=cell.seed).model,
        data.train,
        data.evaluation,
        budget=cell.amount,
        policy=SparseUpdate(Scheme.load(job.scheme)) if job.scheme is not None else cell.policy,
        seed=cell.seed,
        ranking=None if job.ranking is None else read_ranking(job.ranking),
        out=folder.path,
        resume=resume,
        overwrite=not resume,
        keep_best=keep_best,
        progress=False,
        **settings,
    )


def _limits(settings: dict[str, object]) -> tuple[int | None, int | None]:
    limits = [settings.pop(name, None) for name in ("train_limit", "evaluation_limit")]
    train, evaluation = (limit if isinstance(limit, int) else None for limit in limits)
    return train, evaluation


@lru_cache(maxsize=8)
def _image_format(model: str) -> tuple[Normalization, int]:
    return image_format(model)


@lru_cache(maxsize=4)
def _data(
    source: str, image_size: int, limits: tuple[int | None, int | None], normalization: Normalization, seed: int
) -> DataSplit:
    """Read a data set once a worker; neighbouring cells mostly share it."""
    return load_data(source, image_size=image_size, limit=limits, normalization=normalization, seed=seed)
