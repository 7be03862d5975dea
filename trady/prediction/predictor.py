"""What a loaded run can do: prepare its inputs as in training, and say which class they are of."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from trady.errors import DataError, ModelError
from trady.model.batch import Batch
from trady.training.batch import batch_errors, forward, logits
from trady.training.data.identity import readable_names
from trady.training.description import RunDescription
from trady.training.precision import autocast

#: Examples of a forward pass where the run does not say how many it was evaluated in.
_AT_ONCE = 32


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        source: The path of the input, or its number where it has none.
        label: The class of the highest score; ``None`` where the input could not be read.
        score: Its share in the softmax of all scores, 0 to 1; ``None`` likewise.
        top: As many (label, score) as were asked for, the highest first.
        error: Why the input could not be read.
        inputs: A text's own columns, where the input is a text.
    """

    source: str
    label: str | None
    score: float | None
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    inputs: Mapping[str, str] | None = None

    @property
    def columns(self) -> Mapping[str, str]:
        """What the input is called, by column: its path, or the text's own columns."""
        given = {"path": self.source} if self.inputs is None else self.inputs
        return dict(zip(given, readable_names(list(given.values())), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        found: dict[str, Any] = {**self.columns, "label": self.label, "score": self.score}
        if len(self.top) > 1:
            found["top"] = [{"label": label, "score": score} for label, score in self.top]
        return found if self.error is None else {**found, "error": self.error}


@dataclass
class Predictor(ABC):
    """The model of a run, ready for use; :func:`trady.load` makes one.

    Attributes:
        run: The run folder.
        description: What ``run.json`` says.
        weights: Which weights these are: ``last`` or ``best``.
        epoch: The epoch that they are of, from 0.
        model: The module, in evaluation mode.
        device: Where it is.
    """

    run: Path
    description: RunDescription = field(repr=False)
    weights: str
    epoch: int
    model: nn.Module = field(repr=False)
    device: torch.device

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs; empty where the training data had none."""
        return self.description.classes

    @property
    def batch_size(self) -> int:
        """Examples of a forward pass, as the run was evaluated, which its budget has room for."""
        return self.description.batch_size or _AT_ONCE

    @abstractmethod
    def preprocess(self, source: Any) -> Any:
        """Return one input as the model takes it, without the axis of the batch, prepared as the run evaluates.

        Raises:
            DataError: It cannot be read.
        """

    @abstractmethod
    def _many(self, inputs: Any) -> Iterable[Any]:
        """Return the single inputs among what was given: one, or several."""

    def scores(self, batch: Any) -> Tensor:
        """Return the class scores ``[N, classes]``, float32, of inputs ``[N, ...]`` that are prepared, before softmax.

        Inputs are a tensor, or a dict of tensors.

        Raises:
            DataError: The model cannot take such a batch.
            ModelError: It has another number of outputs than there are classes.
        """
        batch = send_to_device(batch, self.device)
        count = Batch.of(batch, self.model).samples
        labels = torch.empty(count, dtype=torch.int64)
        precision = self.description.precision
        with torch.no_grad(), batch_errors(batch, labels), autocast(self.device, precision):
            found = logits(forward(self.model, batch)).float().cpu()
        if found.dim() != 2 or (self.classes and found.shape[-1] != len(self.classes)):
            raise ModelError(
                f"the model gives scores {list(found.shape)} for {count} inputs, and {self.run} has "
                f"{len(self.classes)} classes: expected [{count}, {len(self.classes)}]"
            )
        return found

    def predict(self, inputs: Any, *, batch_size: int | None = None, top: int = 1) -> list[Prediction]:
        """Say which class each input is of.

        Args:
            inputs: One input or several, as :meth:`preprocess` takes them.
            batch_size: Inputs of a forward pass; as the run was evaluated by default.
            top: How many classes each prediction names.

        Returns:
            One prediction an input, in their order. One that cannot be read has an ``error`` and no label.

        Raises:
            DataError: ``batch_size`` or ``top`` is below 1.
            ResourceError: Memory or disk ran out.
        """
        return list(self.predictions(inputs, batch_size=batch_size, top=top))

    def predictions(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        top: int = 1,
        names: Sequence[str] | None = None,
    ) -> Iterator[Prediction]:
        """Yield what :meth:`predict` returns, batch after batch, so that no more than a batch is in memory.

        Args:
            inputs: As in :meth:`predict`.
            batch_size: As in :meth:`predict`.
            top: As in :meth:`predict`.
            names: What the predictions call the inputs, in place of paths and numbers.
        """
        size = self.batch_size if batch_size is None else batch_size
        for name, value in (("batch_size", size), ("top", top)):
            if value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1")
        self.model.eval()
        waiting: list[Prediction | None] = []
        ready: list[tuple[str, Tensor]] = []
        # A batch is full of what could be read: what could not waits for its neighbours.
        for number, source in enumerate(self._many(inputs)):
            name = names[number] if names is not None else _name(source, number)
            try:
                ready.append((name, self.preprocess(source)))
                waiting.append(None)
            except DataError as error:
                waiting.append(Prediction(name, None, None, error=_reason(error, name)))
            if len(ready) == size:
                yield from self._told(waiting, ready, top)
                waiting, ready = [], []
        yield from self._told(waiting, ready, top)

    def _told(
        self, waiting: list[Prediction | None], ready: list[tuple[str, Tensor]], top: int
    ) -> Iterator[Prediction]:
        told: Iterator[Prediction] = iter(())
        if ready:
            scores = self.scores(torch.stack([tensor for _, tensor in ready]))
            shares = scores.softmax(-1)
            # By score, equal ones in the order of the classes: the first is what argmax says.
            order = scores.argsort(dim=-1, descending=True, stable=True)[:, :top]
            told = iter([self._of(name, shares[row], order[row]) for row, (name, _) in enumerate(ready)])
        for prediction in waiting:
            yield next(told) if prediction is None else prediction

    def _of(self, name: str, shares: Tensor, order: Tensor) -> Prediction:
        labels = self.classes or tuple(map(str, range(len(shares))))
        top = tuple((labels[index], float(shares[index])) for index in order.tolist())
        return Prediction(name, *top[0], top)


def _name(source: Any, number: int) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else str(number)


def _reason(error: DataError, name: str) -> str:
    """What is wrong, without the name that stands beside it."""
    return str(error).removeprefix(f"{name} ").removeprefix("cannot be read as an image: ")
