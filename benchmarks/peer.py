"""One method among its peers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """One method's step: what it takes, how long it lasts and what it trains.

    Attributes:
        method: A key of ``METHODS``.
        title: Its name for people.
        saved_bytes: Kept between forward and backward.
        peak_bytes: Peak without weights and batch; of several draws the worst.
        inference_peak_bytes: That of an inference pass of the untouched model.
        step_seconds: Median over the rounds.
        floor_seconds: The same of the floor: forward and input gradients.
        trainable_parameters: Elements that an update changes.
        gradient_error: See :class:`benchmarks.memory.Row`.
        note: What a reader should know.
    """

    method: str
    title: str
    saved_bytes: int
    peak_bytes: int
    inference_peak_bytes: int
    step_seconds: float
    floor_seconds: float
    trainable_parameters: int
    gradient_error: float | None
    note: str
