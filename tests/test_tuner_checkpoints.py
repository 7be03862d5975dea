"""What a restart and a delta bring back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import Functional, Grouped, Residual, Tokens, normal, same, seeded, snapshot
from tests.tuned import OPTIMIZERS, data, prepared, train
from trady.errors import CheckpointError

# -- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["trady", "dynamic-random", "static-random"])
@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], OPTIMIZERS["AdamW"]], ids=["momentum", "AdamW"])
@pytest.mark.parametrize("when", [1, 3, 5])
def test_a_restart_goes_on_bit_for_bit(policy: str, make: Callable[..., torch.optim.Optimizer], when: int) -> None:
    def run(stop: int | None) -> tuple[list[float], dict[str, Tensor]]:
        model = seeded(Residual)
        tuner = prepared(model, policy=policy)
        optimizer = tuner.attach(make(tuner.parameters()))
        losses: list[float] = []
        for step in range(9):
            epoch, within = divmod(step, 4)
            if within == 0:
                tuner.resample(epoch)
            if step == stop:
                file = io.BytesIO()
                torch.save((tuner.state_dict(), optimizer.state_dict()), file)
                file.seek(0)
                state, moments = torch.load(file, weights_only=False)
                state = {"tensors": state["tensors"], "meta": json.loads(json.dumps(state["meta"]))}
                tuner.finish()
                model = seeded(Residual)
                tuner = prepared(model, policy=policy)
                optimizer = tuner.attach(make(tuner.parameters()))
                tuner.load_state_dict(state)
                optimizer.load_state_dict(moments)
            x, y = data()[step % 8]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, snapshot(tuner.finish())

    (expected, weights), (losses, restarted) = run(None), run(when)
    assert losses == expected
    assert same(weights, restarted)


def test_a_state_of_another_run_is_refused_and_nothing_changes() -> None:
    tuner = prepared()
    train(tuner, tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1)))
    state = tuner.state_dict()
    tuner.finish()

    def meta(**changes: Any) -> dict[str, Any]:
        return {**state, "meta": {**state["meta"], **changes}}

    target = prepared()
    before, selection = snapshot(target.model), target.selection
    lacking = {k: v for k, v in state["meta"].items() if k != "selection"}
    for wrong, words in (
        ({}, "no state"),
        ({"meta": {}}, "no state"),
        (meta(version=99), "version 99"),
        (meta(seed=5), "seed 5"),
        (meta(policy="trady"), "policy 'trady'"),
        (meta(structure="0" * 16), "structure"),
        ({**state, "meta": lacking}, "selection"),
        (meta(pool=["nothing"]), "damaged"),
        (meta(epoch="x"), "damaged"),
        ({**state, "tensors": {"nothing::whole": torch.zeros(1)}}, "nothing"),
        (meta(selection={"nothing": [1]}), "damaged"),
        (meta(selection={"stem.0": [99]}), "damaged"),
    ):
        with pytest.raises(CheckpointError, match=words):
            target.load_state_dict(wrong)
        assert same(snapshot(target.model), before)
        assert target.selection == selection
    train(target, target.attach(torch.optim.SGD(target.parameters(), lr=0.1)))
    target.finish()


# -- deltas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (Residual, normal(2, 3, 9, 9)),
        (Grouped, normal(2, 3, 17, 17)),
        (Functional, normal(2, 3, 9, 9)),
        (Tokens, torch.zeros(2, 6, dtype=torch.int64)),
    ],
    ids=["residual", "grouped", "functional", "tokens"],
)
def test_base_and_delta_are_the_finished_model_bit_for_bit(
    build: Callable[[], nn.Module], example: Tensor, tmp_path: Any
) -> None:
    from safetensors.torch import load_file, save_file

    model = seeded(build)
    tuner = trady.prepare(model, example, budget="elements:500", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    for epoch in range(3):
        tuner.resample(epoch)
        model(example).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = tuner.delta()
    finished = snapshot(tuner.finish())
    save_file(delta, tmp_path / "delta.safetensors")
    base = seeded(build)
    assert trady.apply_delta(base, load_file(tmp_path / "delta.safetensors")) is base
    assert same(snapshot(base), finished)
    assert sum(t.numel() for n, t in delta.items() if n.endswith("::values")) < sum(
        p.numel() for p in model.parameters()
    )


def test_a_delta_of_another_model_is_refused_and_the_model_left_as_it_was() -> None:
    tuner = prepared()
    train(tuner, tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1)))
    delta = tuner.delta()
    tuner.finish()
    first = next(iter(delta)).rpartition("::")[0]
    for model, wrong in (
        (seeded(Grouped), delta),
        (seeded(lambda: Residual(width=4)), delta),
        (seeded(lambda: Residual(classes=3)), delta),
        (seeded(Residual), {**delta, "more::whole": torch.zeros(1)}),
        (seeded(Residual), {**delta, "head.bias::half": torch.zeros(5)}),
        (seeded(Residual), {n: t for n, t in delta.items() if n != f"{first}::values"}),
        (seeded(Residual), {**delta, f"{first}::channels": delta[f"{first}::channels"] + 1000}),
        (seeded(Residual), {**delta, f"{first}::channels": -1 - delta[f"{first}::channels"]}),
        (seeded(Residual), {**delta, f"{first}::groups": torch.tensor([3])}),
    ):
        before = snapshot(model)
        with pytest.raises(CheckpointError):
            trady.apply_delta(model, wrong)
        assert same(snapshot(model), before)
