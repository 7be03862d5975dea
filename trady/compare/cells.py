"""The cells of a matrix: the settings of each, and its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from trady.compare.matrix import WITHOUT_BUDGET, Matrix
from trady.compare.read import ReadMatrix
from trady.errors import MatrixError
from trady.policies import Scheme, SparseUpdate, get_policy
from trady.ranking.priors import read_ranking
from trady.ranking.ranking import FORMAT as RANKING
from trady.training.settings import ranking_digest


@dataclass(frozen=True)
class Cell:
    """One run of a matrix.

    Attributes:
        model: The model's name in the file.
        dataset: The data set's name in the file.
        budget: The budget's name in the file; ``None`` for a policy that takes none.
        amount: The budget as text, e.g. ``elements:27946``.
        policy: Name of the policy.
        seed: Seed of everything random.
        settings: Those that the file gives; all others are the defaults of ``trady finetune``.
        sources: The model and the data set as the file has them; a digest of the ranking and
            the scheme itself, if they are given.
    """

    model: str
    dataset: str
    budget: str | None
    amount: str | None
    policy: str
    seed: int
    settings: Mapping[str, Any]
    sources: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that identify everything above; the same on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]

    @property
    def title(self) -> str:
        """The cell in words, e.g. ``mbv2 cifar10 49kB trady seed 0``."""
        return " ".join([*self._names(), f"seed {self.seed}"])

    @property
    def folder(self) -> str:
        """The name of its folder, e.g. ``mbv2-cifar10-49kB-trady-s0-1f0c9a2b3d``."""
        words = [re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:24] for name in self._names()]
        return "-".join([*words, f"s{self.seed}", self.digest])

    def _names(self) -> list[str]:
        return [name for name in (self.model, self.dataset, self.budget, self.policy) if name is not None]


@dataclass(frozen=True)
class Job:
    """A cell, and what is needed to run it on this machine.

    Attributes:
        cell: The cell.
        model: The model as ``load_model`` takes it.
        dataset: The data set as ``load_data`` takes it.
        ranking: The ranking's file, or ``online`` or ``structural``; ``None`` is the shipped prior, or online.
        scheme: The file of a sparse update's scheme.
    """

    cell: Cell
    model: str
    dataset: str
    ranking: str | None
    scheme: str | None


def make_jobs(read: ReadMatrix) -> list[Job]:
    """Return all cells, in the order in which they are run.

    Seeds are outermost, then models and data sets, then budgets and policies. So a matrix that was stopped has all
    policies for the models and data sets that it has reached, and everything for the first seeds.
    """
    matrix = read.matrix
    jobs = []
    for seed, model, dataset in product(matrix.seeds, matrix.models, matrix.datasets):
        budgets: tuple[str | None, ...] = (None, *matrix.budgets)
        for budget, policy in product(budgets, matrix.policies):
            if (budget is None) == (policy in WITHOUT_BUDGET):
                jobs.append(_job(read, model, dataset, budget, policy, seed))
    _check_schemes(jobs)
    return jobs


def _check_schemes(jobs: Sequence[Job]) -> None:
    bare = [job.cell for job in jobs if job.cell.policy == SparseUpdate.name and job.scheme is None]
    where = dict.fromkeys(f"model {cell.model}, budget {cell.budget}" for cell in bare)
    if where:
        raise MatrixError(
            f"{SparseUpdate.name} has no scheme for {'; '.join(where)}; nothing was run. Add an [[override]] with "
            'policy = "sparse-update", the model, the budget and scheme = "file.json" (trady search writes one)'
        )


def _job(read: ReadMatrix, model: str, dataset: str, budget: str | None, policy: str, seed: int) -> Job:
    matrix, around = read.matrix, read.around
    settings = _settings(matrix, model, dataset, budget, policy)
    given, scheme = settings.pop("ranking", None), settings.pop("scheme", None)
    ranking = around.ranking(given) if given is not None and get_policy(policy).uses_ranking else None
    scheme = around.path(scheme) if scheme is not None and policy == SparseUpdate.name else None
    sources = {"model": matrix.models[model], "dataset": read.datasets[dataset]}
    if ranking is not None:
        sources["ranking"] = ranking_digest(read_ranking(ranking))
    elif get_policy(policy).uses_ranking:
        sources["ranking"] = f"{RANKING.name} version {RANKING.version}"  # results of another score are not these
    if scheme is not None:
        sources["scheme"] = json.dumps(Scheme.load(scheme).to_json(), sort_keys=True)
    cell = Cell(
        model=model,
        dataset=dataset,
        budget=budget,
        amount=None if budget is None else _amount(matrix, model, dataset, budget, policy),
        policy=policy,
        seed=seed,
        settings=settings,
        sources=sources,
    )
    return Job(cell, around.expand(matrix.models[model]), around.dataset(matrix.datasets[dataset]), ranking, scheme)


def _amount(matrix: Matrix, model: str, dataset: str, budget: str, policy: str) -> str:
    given = (o.amount for o in reversed(matrix.override) if o.matches(model, dataset, budget, policy))
    return next((amount for amount in given if amount is not None), matrix.budgets[budget][model])


def _settings(matrix: Matrix, model: str, dataset: str, budget: str | None, policy: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"epochs": matrix.training.epochs, **matrix.training.given()}
    for override in matrix.override:
        if override.matches(model, dataset, budget, policy):
            settings.update(override.given())
    return settings
