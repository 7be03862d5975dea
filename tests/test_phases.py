"""What a plan says of evaluation, saving and finishing is what they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.alive import kept_by
from tests.loops import Text, ids, wide
from tests.models import Residual, normal, seeded
from trady.memory.live import LiveBytes
from trady.records.files import write_tensors


def peak_of(do: Callable[[], Any], there: list[Tensor]) -> int:
    """The most bytes alive, of what was there before and of everything that has come since."""
    with LiveBytes() as live:
        live.register(there)
        do()
    return live.peak


@pytest.mark.parametrize(
    ("build", "x", "policy", "options"),
    [
        (wide, normal(8, 3, 12, 12), "dynamic-random", {}),
        (wide, normal(8, 3, 12, 12), "head", {}),
        (lambda: seeded(Residual), normal(8, 3, 17, 17), "static-random", {"micro_batch": 4}),
        (Text, ids(32, 16), "dynamic-random", {"recompute": "all"}),
        (Text, ids(32, 16), "velocity", {}),
    ],
)
def test_phases_take_what_the_plan_says(
    build: Callable[[], nn.Module], x: Tensor, policy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, inputs, labels = build(), x.clone(), torch.arange(len(x)) % 3
    tuner = trady.prepare(model, inputs, budget="32 MiB", policy=policy, **options)
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    if tuner.observation_due:
        tuner.observe([(inputs, labels)], F.cross_entropy)

    def step() -> None:
        for part, targets, share in tuner.micro_batches(inputs, labels):
            (F.cross_entropy(model(part), targets) * share).backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate() -> None:
        for part, _ in tuner.micro_batches(inputs):
            with torch.no_grad(), tuner.untouched():
                model.eval()(part)
        model.train()

    def there() -> list[Tensor]:
        return [*model.parameters(), *model.buffers(), inputs, labels, *kept_by(tuner, optimizer)]

    step()
    model.zero_grad()
    phases = tuner.plan.predicted_phases
    assert phases["step"] == tuner.plan.predicted_peak_bytes
    took = {
        "step": peak_of(step, there()),
        "evaluation": peak_of(evaluate, there()),
        "saving": peak_of(
            lambda: write_tensors(tmp_path / "state", tuner.state_dict(lazily=True)["tensors"], {}), there()
        ),
        "finishing": peak_of(tuner.finish, there()),
    }
    assert list(phases) == list(took)
    for phase, nbytes in took.items():
        assert nbytes <= phases[phase] + labels.nbytes, phase
        assert nbytes >= 0.93 * phases[phase], phase


def test_phases_are_in_the_file_of_a_plan_and_in_what_is_shown(tmp_path: Path) -> None:
    plan = trady.plan(Text(), ids(8, 16), budget="1 MiB")
    assert list(plan.predicted_phases) == ["step", "evaluation", "saving", "finishing"]
    assert plan.predicted_phases["step"] == plan.predicted_peak_bytes
    plan.save(tmp_path / "plan.json")
    assert trady.Plan.load(tmp_path / "plan.json").predicted_phases == plan.predicted_phases
    assert "Predicted peak of each phase" in str(plan)
    assert "finishing" in str(plan)
    assert not trady.plan(Text(), ids(8, 16), budget="elements:300").predicted_phases
