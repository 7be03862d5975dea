"""What a run on texts says of tables, of texts that were typed, and of those on standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from trady.prediction.outcome import Outcome
    from trady.prediction.text_inputs import TextInputs
    from trady.prediction.texts import TextPredictor
    from trady.training.description import RunDescription, Which


def predicted_texts(
    run: str,
    sources: list[str],
    weights: Which,
    top: int,
    batch_size: int | None,
    max_new_tokens: int,
    temperature: float,
    description: RunDescription,
) -> Outcome:
    """Predict every text that was given.

    Raises:
        DataError: A source is not there, or holds no texts.
    """
    import trady
    from trady.prediction.generation import Generation, TextGenerator
    from trady.prediction.outcome import Outcome
    from trady.prediction.text_inputs import STDIN, find_texts
    from trady.prediction.texts import TextPredictor

    stdin = sys.stdin.read() if STDIN in sources else None
    inputs = find_texts(sources, description, stdin)
    predictor = trady.load(Path(run), weights)
    for remark in inputs.remarks:
        typer.echo(remark, err=True)
    if isinstance(predictor, TextGenerator):
        predictor.generation = Generation(max_new_tokens, temperature, description.seed)
        said = tuple(predictor.predictions(inputs.sources))
        return Outcome(predictor, said, (None,) * len(said))
    assert isinstance(predictor, TextPredictor)
    return _with_labels(predictor, inputs, top, batch_size)


def _with_labels(predictor: TextPredictor, inputs: TextInputs, top: int, batch_size: int | None) -> Outcome:
    import numpy as np

    from trady.prediction.outcome import Outcome

    scores, errors = predictor.text_scores(inputs.sources, batch_size)
    predictions = tuple(predictor.told(inputs.sources, scores, errors, top))
    actual = [None if label is None else predictor.name_of(label) for label in inputs.labels]
    compared = [at for at, error in enumerate(errors) if error is None and inputs.labels[at] is not None]
    measures = {}
    if compared:
        right = np.stack([np.asarray(inputs.labels[at]) for at in compared])
        measures = dict(predictor.measured(scores[compared], right)[1])
    return Outcome(predictor, predictions, tuple(actual), measures)
