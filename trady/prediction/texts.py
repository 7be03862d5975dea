"""Texts as a run takes them: by its tokenizer, in the batches in which the run was evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trady.errors import DataError
from trady.prediction.predictor import Prediction, Predictor
from trady.training.texts.dataset import LABELS, TextDataset
from trady.training.texts.description import TextsDescription
from trady.training.texts.labels import Labels, is_missing
from trady.training.texts.objectives import mean_of_parts
from trady.training.texts.reading import labelled_dataset, objective_for
from trady.training.texts.tokens import encode, load_tokenizer


class OfTexts(Predictor):
    """A run on texts."""

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the run."""
        return load_tokenizer(str(self.run))

    @property
    def texts(self) -> TextsDescription:
        """How the run takes its texts."""
        assert self.description.texts is not None
        return self.description.texts


class TextPredictor(OfTexts):
    """A run on texts that have labels.

    A text is a string; a pair is two, as a tuple or list.
    """

    def preprocess(self, source: Any) -> dict[str, Tensor]:
        """Return a text as the model takes it, ``[tokens]`` each; of a text that is taken in parts, the first.

        Raises:
            DataError: It is no text, or has none.
        """
        batch = self._data([self.columns_of(source)]).batch([0])
        return {name: tensor[0] for name, tensor in batch.items() if name != LABELS}

    def columns_of(self, source: Any) -> tuple[str, ...]:
        """Return a text, or the two of a pair.

        Raises:
            DataError: It is something else, or a text is empty.
        """
        found = (source,) if isinstance(source, str) else tuple(source) if isinstance(source, (list, tuple)) else ()
        names = self.texts.text_columns
        if len(found) != len(names) or not all(isinstance(text, str) for text in found):
            wanted = "a text" if len(names) == 1 else f"a pair ({', '.join(names)})"
            raise DataError(f"{source!r:.60} is not {wanted}, as {self.run} takes it")
        if any(is_missing(text) for text in found):
            raise DataError("the text is empty")
        return found

    def text_scores(self, sources: Sequence[Any], batch_size: int | None = None) -> tuple[Tensor, list[str | None]]:
        """Return the scores of texts ``[N, outputs]``, float32, and for each why it has none.

        They are computed in batches of like length, the longest first, as in an evaluation.

        Raises:
            DataError: ``batch_size`` is below 1.
        """
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise DataError(f"batch_size is {size}; it must be at least 1")
        texts: list[tuple[str, ...]] = []
        places: list[int] = []
        errors: list[str | None] = []
        for at, source in enumerate(sources):
            try:
                texts.append(self.columns_of(source))
                places.append(at)
                errors.append(None)
            except DataError as error:
                errors.append(str(error))
        outputs = len(self.classes) or 1
        found = torch.full((len(sources), outputs), torch.nan)
        if texts:
            found[places] = self._scores_of(self._data(texts), size)
        return found, errors

    def _scores_of(self, data: TextDataset, size: int) -> Tensor:
        order = np.argsort(-data.lengths, kind="stable")
        scores: Tensor | None = None
        self.model.eval()
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = data.batch(chosen.tolist())
            batch.pop(LABELS)
            part = self.scores(batch)
            scores = torch.empty(len(order), part.shape[1]) if scores is None else scores
            scores[torch.from_numpy(chosen)] = part
        assert scores is not None
        cut = len(np.unique(data.rows)) < len(data)
        return mean_of_parts(scores, data.rows if cut else None)

    def _data(self, texts: Sequence[tuple[str, ...]]) -> TextDataset:
        columns = [list(column) for column in zip(*texts, strict=True)]
        encoded = encode(self.tokenizer, columns, self.texts.longest, self.texts.overflow)
        labels = Labels(self.texts.task, np.zeros(len(texts), np.float32), self.classes)
        return labelled_dataset(encoded, labels, self.tokenizer, self.texts)

    def predictions(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        top: int = 1,
        names: Sequence[str] | None = None,
    ) -> Iterator[Prediction]:
        """Yield what :meth:`predict` returns."""
        if top < 1:
            raise DataError(f"top is {top}; it must be at least 1")
        sources = list(self._many(inputs))
        scores, errors = self.text_scores(sources, batch_size)
        yield from self.told(sources, scores, errors, top)

    def told(
        self, sources: Sequence[Any], scores: Tensor, errors: Sequence[str | None], top: int
    ) -> Iterator[Prediction]:
        """Yield what scores say of texts."""
        for number, (source, row, error) in enumerate(zip(sources, scores, errors, strict=True)):
            given = (source,) if isinstance(source, str) else tuple(map(str, source)) if source else ("",)
            inputs = dict(zip(self.texts.text_columns, given, strict=False))
            name = " | ".join(given)
            if error is not None:
                yield Prediction(name or str(number), None, None, error=error, inputs=inputs)
            else:
                yield replace(self._said(name, row, top), inputs=inputs)

    def _said(self, name: str, row: Tensor, top: int) -> Prediction:
        if self.texts.task == "regression":
            value = float(row[0])
            label = f"{value:.4g}"
            return Prediction(name, label, value, ((label, value),))
        if self.texts.task == "multi-label":
            shares = row.sigmoid()
            order = shares.argsort(descending=True, stable=True).tolist()
            said = [at for at in order if float(row[at]) > 0]
            shown = order[: max(top, len(said))] if top > 1 else said
            named = tuple((self.classes[at], float(shares[at])) for at in shown)
            label = ", ".join(self.classes[at] for at in sorted(said))
            return Prediction(name, label, named[0][1] if said else None, named)
        return self._of(name, row.softmax(-1), row.argsort(descending=True, stable=True)[:top])

    def name_of(self, label: Any) -> str:
        """Return what a label is called: of a class number, a number, or a row of 0 and 1."""
        if self.texts.task == "regression":
            return f"{float(label):.4g}"
        if self.texts.task == "multi-label":
            return ", ".join(name for name, there in zip(self.classes, label, strict=True) if there)
        return self.classes[int(label)]

    def measured(self, scores: Tensor, labels: npt.NDArray[Any]) -> tuple[float | None, Mapping[str, float]]:
        """Return the accuracy, if there is one, and the other measures of the run's task, against what is right."""
        right = torch.from_numpy(np.asarray(labels))
        right = right[:, None] if right.dim() == 1 else right
        objective = objective_for(self.texts.task, len(self.classes))
        return objective.measure(torch.cat([scores, right.float()], 1))

    def _many(self, inputs: Any) -> Iterable[Any]:
        if isinstance(inputs, str):
            return [inputs]
        pair = len(self.texts.text_columns) == 2
        if pair and isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(text, str) for text in inputs):
            return [inputs]
        found: Iterable[Any] = inputs
        return found
