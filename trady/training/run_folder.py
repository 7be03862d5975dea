"""The folder of a run: its files, and how they survive a kill at any instant.

Nothing that a finished run has left is removed before something better exists: a run that takes its place sets it
aside, and it comes back unless the new one gets as far as a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trady.errors import CheckpointError, StateError
from trady.records.files import (
    append_line,
    flush,
    remove_temporaries,
    remove_tree,
    write_json,
    write_lines,
    write_tensors,
)
from trady.records.lock import locked
from trady.records.reading import check_regular
from trady.training.checkpoint import find_checkpoint, remove_checkpoint, remove_leftovers
from trady.training.metrics import METRICS, EpochMetrics

#: The entry in a file of the best weights that says which epoch they are of.
_EPOCH = "trady.epoch"

#: The file that describes the model (:mod:`trady.training.description`).
DESCRIPTION = "run.json"

#: The file with all options of the command line.
OPTIONS = "run.toml"

#: The files beside it that transformers reads: of the model and of how its images are prepared.
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

#: All of those, with the ones that tokenizers write.
OF_TRANSFORMERS = (
    CONFIG,
    PROCESSOR,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, under one folder."""

    path: Path

    @property
    def plan(self) -> Path:
        """What was decided before the first step."""
        return self.path / "plan.json"

    @property
    def description(self) -> Path:
        """What the model is, what it takes and where it comes from."""
        return self.path / DESCRIPTION

    @property
    def described(self) -> tuple[Path, ...]:
        """The files that say what the model is, trady's last; none where others may have written the rest."""
        names = (*OF_TRANSFORMERS, OPTIONS, DESCRIPTION) if self.description.exists() else ()
        return tuple(self.path / name for name in names)

    @property
    def options(self) -> Path:
        """All options of the command line, as ``--config`` reads them; not there for a run that Python started."""
        return self.path / OPTIONS

    @property
    def decoded(self) -> Path:
        """Decoded images, until the run is finished (:mod:`trady.training.data.kept_images`)."""
        return self.path / "decoded-images"

    @property
    def metrics(self) -> Path:
        """One line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The last complete checkpoint."""
        return self.path / "checkpoint"

    @property
    def model(self) -> Path:
        """All weights of the finished model."""
        return self.path / "model.safetensors"

    @property
    def delta(self) -> Path:
        """The changed channels only."""
        return self.path / "delta.safetensors"

    @property
    def best(self) -> Path:
        """All weights after the epoch of the highest accuracy."""
        return self.path / "best.safetensors"

    @property
    def best_delta(self) -> Path:
        """The same as changed channels only, of a model that is stored quantised."""
        return self.path / "best-delta.safetensors"

    @property
    def result(self) -> Path:
        """The result; written last."""
        return self.path / "result.json"

    @property
    def replaced(self) -> Path:
        """What was here before, while the run that takes its place is not finished."""
        return self.path / "replaced-run"

    @property
    def _moving(self) -> Path:
        """The same while it is moved there, or back."""
        return self.path / ".replacing"

    @property
    def weights(self) -> tuple[Path, ...]:
        """Every file of weights that a run may leave."""
        return self.model, self.delta, self.best, self.best_delta

    def tied(self, path: Path) -> dict[str, str]:
        """Return, for tied weights that a file of this folder has under one name only, their other names and that one.

        Raises:
            OSError: The file cannot be read.
            SafetensorError: It is damaged.
        """
        check_regular(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return {name: kept for name, kept in metadata.items() if name not in ("format", _EPOCH)}

    def weights_of(self, which: str) -> Path | None:
        """Return the file of the ``last`` or the ``best`` weights: all of them or, where it is that, what changed."""
        files = (self.best, self.best_delta) if which == "best" else (self.model, self.delta)
        return next((path for path in files if path.exists()), None)

    def drop_weights(self) -> None:
        """Remove weights, what describes them, and checkpoints; the plan, the metrics and the result stay."""
        for path in (*self.weights, *self.described):
            path.unlink(missing_ok=True)
        remove_checkpoint(self.checkpoint)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out, and clear up what one that was killed has left.

        Raises:
            LockedError: Another process works here.
        """
        with locked(self.path):
            flush(self.path.parent)
            self._clear_up()
            try:
                yield
            finally:
                self._clear_up()

    def check(self, *, resume: bool, overwrite: bool) -> bool:
        """Return whether there is a checkpoint to go on from; change nothing.

        Raises:
            StateError: There is a run already, and neither ``resume`` nor ``overwrite`` is given.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StateError(f"{self.path} is a file; name a folder for the run")
        if resume and overwrite:
            raise StateError("resume and overwrite exclude each other; give one of them")
        present = find_checkpoint(self.checkpoint) is not None
        ended = [path.name for path in (self.result, *self.weights) if path.exists()]
        if resume and ended and not present:
            raise StateError(
                f"{self.path} has {', '.join(ended)} but no checkpoint to go on from, so there is nothing to resume: "
                "keep it as it is, train again by --overwrite (overwrite=True), or name another folder"
            )
        if (present or ended) and not (resume or overwrite):
            raise StateError(
                f"{self.path} holds a run already; go on with it by --resume (resume=True), "
                "replace it by --overwrite (overwrite=True), or name another folder"
            )
        return present and resume

    def begin(self, *, keep: bool) -> None:
        """Set aside what an earlier run left here, unless that run is resumed."""
        if not keep:
            self._set_aside()
        remove_leftovers(self.checkpoint)

    def where_it_stands(self) -> str:
        """Return what to tell a user whose run was interrupted."""
        if self.result.exists():
            return f"stopped, after the run was finished: its results are in {self.path}"
        if find_checkpoint(self.checkpoint) is None:
            back = "; the run that it was to replace is as it was" if self.replaced.exists() else ""
            return f"stopped before the first checkpoint; there is nothing to resume in {self.path}{back}"
        return f"stopped; the last checkpoint is kept in {self.checkpoint}: go on with --resume"

    def _clear_up(self) -> None:
        """Remove what a kill has left of writing, and bring back what was set aside for a run that came to nothing."""
        remove_temporaries(self.path, alone=True)
        if self.replaced.is_dir() and not self._moving.exists() and not self._has_run:
            self._remove_announced()
            self.replaced.rename(self._moving)
        if self._moving.is_dir():
            for path in self._moving.iterdir():
                path.replace(self.path / path.name)
            self._moving.rmdir()
            flush(self.path)

    def _set_aside(self) -> None:
        if self._has_run:
            # Of two earlier runs, the finished one is the one to keep.
            keep_former = (self.replaced / self.result.name).exists() and not self.result.exists()
            self._moving.mkdir()
            checkpoints = find_checkpoint(self.checkpoint)
            described = self.described
            for path in (self.result, *self.weights, checkpoints, self.metrics, *described, self.plan):
                if path is not None and path.exists():
                    path.rename(self._moving / path.name)
            if keep_former:
                remove_tree(self._moving)
            else:
                remove_tree(self.replaced)
                self._moving.rename(self.replaced)
            flush(self.path)
        remove_checkpoint(self.checkpoint)
        self._remove_announced()

    def _remove_announced(self) -> None:
        """Remove what a run writes before anything took time to make."""
        for path in (self.plan, self.metrics, *self.described):
            path.unlink(missing_ok=True)

    @property
    def _has_run(self) -> bool:
        """Whether there is anything here that took time to make."""
        present = find_checkpoint(self.checkpoint) is not None
        return present or any(path.exists() for path in (self.result, *self.weights))

    def append(self, metrics: EpochMetrics) -> None:
        """Append an epoch to the metrics, and flush it to disk."""
        append_line(self.metrics, json.dumps(metrics.to_json(), allow_nan=False))

    def history(self, last_epoch: int) -> list[EpochMetrics]:
        """Return the metrics of the epochs up to ``last_epoch``."""
        # A kill may have cut a line short; it is always the last.
        lines = METRICS.read_lines(EpochMetrics, self.metrics, until_damage=True) if self.metrics.exists() else []
        history = [epoch for epoch in lines if epoch.epoch <= last_epoch]
        if len(history) != last_epoch + 1 or any(epoch.epoch != at for at, epoch in enumerate(history)):
            raise CheckpointError(
                f"{self.metrics} does not have the epochs 0 to {last_epoch} that {self.checkpoint} says are "
                "done; start the run again with --overwrite"
            )
        return history

    def rewrite(self, history: Sequence[EpochMetrics]) -> None:
        """Cut the metrics to the epochs of ``history``."""
        write_lines(self.metrics, (json.dumps(epoch.to_json()) for epoch in history))

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write ``plan.json``."""
        write_json(self.plan, plan)

    def write_model(self, weights: Mapping[str, torch.Tensor] | None, delta: Mapping[str, torch.Tensor] | None) -> None:
        """Write ``model.safetensors``, unless weights are quantised, and ``delta.safetensors`` if there is one."""
        if weights is not None:
            _write_weights(self.model, weights, {})
        if delta is not None:
            write_tensors(self.delta, delta, {"format": "trady-delta"})

    def write_best(
        self, epoch: int, weights: Mapping[str, torch.Tensor] | None, delta: Mapping[str, torch.Tensor] | None
    ) -> None:
        """Write ``best.safetensors`` or, where weights are quantised, ``best-delta.safetensors``."""
        if weights is not None:
            _write_weights(self.best, weights, {_EPOCH: str(epoch)})
        elif delta is not None:
            write_tensors(self.best_delta, delta, {"format": "trady-delta", _EPOCH: str(epoch)})

    def best_epoch(self) -> int | None:
        """Return the epoch that the best weights are of; ``None`` where there are none."""
        for path in (self.best, self.best_delta):
            try:
                check_regular(path)
                with safe_open(path, "pt") as file:
                    return int((file.metadata() or {})[_EPOCH])
            except (OSError, SafetensorError, KeyError, ValueError):
                continue
        return None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``; what was here before the run has its better now, and goes."""
        write_json(self.result, result)
        remove_tree(self.replaced)
        remove_tree(self.decoded)


def where_it_stands(folder: RunFolder | None, signal: str) -> str:
    """Return what to say when a run is stopped; ``signal`` is empty for Ctrl-C."""
    what = "stopped, and nothing is kept: there is no run folder" if folder is None else folder.where_it_stands()
    return f"{signal}: {what}" if signal else what


def _write_weights(path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    aliases = _aliases(weights)
    kept = {name: tensor for name, tensor in weights.items() if name not in aliases}
    write_tensors(path, kept, {"format": "pt", **metadata, **aliases})


def _aliases(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return, for tied weights that are stored under another name, that name."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        if not tensor.numel():
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases
