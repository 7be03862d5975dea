"""What a checkpoint says of the example that a run was planned for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trady
from tests.models import Residual, normal, seeded
from trady.errors import CheckpointError
from trady.integrations.example_record import step_from_state, step_to_state
from trady.integrations.recording import Step, recorded
from trady.model.batch import Batch
from trady.training.state import State

INPUTS: Any = {
    "ids": torch.arange(6).view(2, 3),
    "nested": [torch.ones(2, 4), (True, None, "word", 2.5)],
    "flag": False,
}


def test_it_comes_back_with_its_whole_numbers_and_shapes() -> None:
    state = step_to_state(Step("bert", Batch(INPUTS), 2, has_head=False))
    assert state is not None
    step = step_from_state(state, torch.device("cpu"))
    assert (step.module, step.calls, step.has_head) == ("bert", 2, False)
    assert torch.equal(step.example.inputs["ids"], INPUTS["ids"])
    assert step.example.inputs["nested"][0].shape == (2, 4)
    assert step.example.inputs["nested"][1] == (True, None, "word", 2.5)
    assert step.example.shapes == Batch(INPUTS).shapes


def test_an_object_of_a_class_of_its_own_is_not_written() -> None:
    assert step_to_state(Step("", Batch({"cache": object()}))) is None


@pytest.mark.parametrize(
    "meta",
    [{}, {"module": "", "calls": 1, "has_head": True, "inputs": {"strange": 1}},
     {"module": "", "calls": "many", "has_head": True, "inputs": {"value": 1}},
     {"module": "", "calls": 1, "has_head": True, "inputs": {"tensor": "7"}},
     {"module": "", "calls": 1, "has_head": True, "inputs": {"shape": [2], "dtype": "nothing"}},
     {"module": "", "calls": 1, "has_head": True, "inputs": []}],
)  # fmt: skip
def test_a_damaged_one_is_refused(meta: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="example batch of the checkpoint is damaged"):
        step_from_state(State({}, meta), torch.device("cpu"))


def test_passes_under_no_grad_are_no_part_of_a_step_and_those_in_it_run_without_gradients() -> None:
    model = seeded(Residual)
    x = normal(4, 3, 9, 9)
    with recorded(model) as passes:
        out = model(x)
        with torch.no_grad():
            model(x)
    assert len(passes) == 1
    assert passes[0].module == ""
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_backbone_of_a_model_can_be_prepared_with_the_optimizer_of_all_of_it() -> None:
    """What the detectors of torchvision are told to do."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
            self.boxes = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.boxes(self.backbone(x))
            return found[found > 0].sum() if float(found.detach().max()) > 0 else found.sum()

    model = seeded(Detector)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuner = trady.prepare(model.backbone, normal(2, 3, 9, 9), budget="elements:300", head=None, ranking="structural")
    tuner.attach(optimizer)
    model(normal(2, 3, 9, 9)).backward()
    optimizer.step()
    tuner.finish()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"boxes.weight", "boxes.bias"} <= changed
    assert any(name.startswith("backbone") for name in changed)
