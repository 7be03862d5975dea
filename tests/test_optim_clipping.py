"""Optimizers of trady.optim clip channel by channel, as gradients arrive."""

from __future__ import annotations

import math

import pytest
import torch

import trady
from tests.models import gradient_of, same, snapshot
from tests.optimizer_pairs import images, inside, loss_of, outer, prepared, train
from trady.errors import StateError, TrainingError
from trady.optim.clipping import ratio_for


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_clipping_by_channel_equals_the_outer_one(kind: str) -> None:
    ends = []
    for make in (outer(kind), inside(kind, channel_clip=0.01)):
        tuner = prepared()
        optimizer = tuner.attach(make(tuner.parameters()))
        norms: list[float] = []
        clip = lambda tuner=tuner, norms=norms: norms.append(tuner.clip_gradients(0.01, 0.05))  # noqa: E731
        losses = train(tuner, optimizer, clip=clip)
        ends.append((losses, norms, snapshot(tuner.finish())))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6)
    assert same(ends[0][2], ends[1][2])
    unclipped = prepared()
    train(unclipped, unclipped.attach(outer(kind)(unclipped.parameters())))
    assert not same(ends[0][2], snapshot(unclipped.finish()))


def test_clipping_in_the_loop_and_in_the_optimizer_must_agree() -> None:
    tuner = prepared()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.1))
    loss_of(tuner.model, images(0)).backward()
    with pytest.raises(StateError, match=r"channel_clip=0\.1"):
        tuner.clip_gradients()
    assert tuner.clip_gradients(ratio=None, max_norm=1e-3) > 1e-3
    head = [gradient_of(p) for name, p in tuner.named_parameters() if not name.endswith(".channels")]
    assert float(torch.nn.utils.get_total_norm(head)) == pytest.approx(1e-3, rel=1e-3)
    optimizer.step()
    tuner.finish()


def gradients_and_moves(tuner: trady.Tuner, optimizer: torch.optim.Optimizer, scale: float) -> tuple[float, float]:
    """Norm of all gradients of a step, and of what a step with rate 1 changed."""
    parameters = list(tuner.parameters())
    before = [p.detach().clone() for p in parameters]
    (scale * loss_of(tuner.model, images(0))).backward()
    norm = tuner.clip_gradients(None, None)
    optimizer.step()
    optimizer.zero_grad()
    moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    return norm, float(torch.nn.utils.get_total_norm(moved))


def test_a_norm_below_the_limit_changes_nothing() -> None:
    ends = []
    for limit in (None, 1e6):
        tuner = prepared()
        optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.05, max_norm=limit))
        train(tuner, optimizer)
        ends.append(snapshot(tuner.finish()))
    assert same(*ends)


def test_steps_of_equal_norm_are_clipped_to_the_limit() -> None:
    """From the second step on the running norm knows the norm of all gradients."""
    tuner = prepared()
    # So small a limit that the weights, and with them the gradient, hardly change.
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=1.0, max_norm=1e-4))
    moves = [gradients_and_moves(tuner, optimizer, 1.0)[1] for _ in range(4)]
    assert moves[0] > 1.01e-4
    assert moves[1:] == pytest.approx([1e-4] * 3, rel=1e-2)
    tuner.finish()


def test_a_sudden_large_gradient_is_clipped_by_what_has_arrived_of_it() -> None:
    tuner = prepared()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=1.0, max_norm=1e-4))
    gradients_and_moves(tuner, optimizer, 1.0)
    norm, moved = gradients_and_moves(tuner, optimizer, 1e6)
    assert norm > 1e4
    tensors = sum(len(p) > 0 for p in tuner.parameters())
    assert moved <= 1e-4 * math.sqrt(tensors)
    tuner.finish()


def test_the_running_norm_follows_the_norms_of_the_steps() -> None:
    tuner = prepared()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=1e-9, max_norm=0.1))
    norms = [gradients_and_moves(tuner, optimizer, scale)[0] for scale in (1.0, 3.0, 0.5)]
    expected = norms[0]
    for norm in norms[1:]:
        expected = 0.9 * expected + 0.1 * norm
    assert optimizer.param_groups[0]["running_norm"] == pytest.approx(expected, rel=1e-6)
    tuner.finish()


def test_auto_clips_harder_where_more_than_a_quarter_of_the_weights_trains() -> None:
    assert ratio_for(0.01) == ratio_for(0.25) == 0.1
    assert ratio_for(0.5) == pytest.approx(0.025)
    assert ratio_for(1.0) == pytest.approx(0.1 / 16)
    clipped = {}
    for policy, budget in (("trady", "elements:300"), ("full", None)):
        for ratio in ("auto", 0.1, 0.1 / 16):
            tuner = prepared(policy=policy, budget=budget)
            (1e6 * loss_of(tuner.model, images(0))).backward()
            tuner.clip_gradients(ratio, None)
            compact = [p for name, p in tuner.named_parameters() if name.endswith(".channels")]
            layers = [p for p in compact if p.grad is not None and len(p)]
            norms = [(float(gradient_of(p).norm()), float(p.detach().norm())) for p in layers]
            clipped[policy, ratio] = max(gradient / weight for gradient, weight in norms)
            tuner.finish()
    assert clipped["trady", "auto"] == clipped["trady", 0.1]
    assert clipped["full", "auto"] == pytest.approx(clipped["full", 0.1 / 16], rel=1e-6)
    assert clipped["full", "auto"] < clipped["full", 0.1] / 8


def test_a_model_that_is_nothing_but_a_head_is_clipped_by_its_norm() -> None:
    tuner = trady.prepare(torch.nn.Linear(4, 3), torch.randn(8, 4), policy="head")
    tuner.model(torch.ones(8, 4)).sum().backward()
    assert tuner.clip_gradients() > 2
    head = [gradient_of(p) for p in tuner.parameters()]
    assert float(torch.nn.utils.get_total_norm(head)) == pytest.approx(2, rel=1e-3)
    tuner.finish()


def test_a_word_that_is_no_limit_is_refused() -> None:
    tuner = prepared()
    loss_of(tuner.model, images(0)).backward()
    with pytest.raises(TrainingError, match="'most'; give a number, 'auto' or None"):
        tuner.clip_gradients("most")
    tuner.finish()
