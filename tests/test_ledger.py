"""The ledger: a training step's tensor memory, measured."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_registry
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from tests.measured_steps import FLOAT, Step, net, weight_bytes
from tests.models import gradient_of
from trady.errors import TradyError
from trady.memory import Ledger, Saved, measure
from trady.ops.context import current_operation, label_saved


def saved_by_hand(forward: Callable[[], Tensor], weights: Any) -> int:
    """An independent count: storages packed in the forward that are no weights."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    packed = {}

    def pack(tensor: Tensor) -> Any:
        packed[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(nbytes for pointer, nbytes in packed.items() if pointer not in known)


def leftovers() -> Any:
    return (
        _get_current_dispatch_mode_stack(),
        torch.overrides._get_current_function_mode_stack(),
        dict(module_registry._global_forward_pre_hooks),
        dict(module_registry._global_forward_hooks),
        dict(module_registry._global_forward_hooks_with_kwargs),
        dict(module_registry._global_forward_hooks_always_called),
        dict(optimizers._global_optimizer_pre_hooks),
        dict(optimizers._global_optimizer_post_hooks),
        torch._C._autograd._saved_tensors_hooks_disable,
        torch.UntypedStorage.resize_,
    )


def test_a_linear_layer_is_accounted_for_by_hand() -> None:
    n, inputs, outputs = 64, 128, 32
    model = nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(n, inputs)
    seed = torch.ones(n, outputs)
    ledger = measure(lambda: model(x).backward(seed))

    weights, batch, output = inputs * outputs * FLOAT, n * inputs * FLOAT, n * outputs * FLOAT
    assert ledger.weight_bytes == weights
    assert ledger.input_bytes == batch
    assert ledger.gradient_bytes == weights
    assert ledger.saved == (Saved("(model)", "linear", "activations", batch, 1),)
    # In the backward: weights, batch, the gradient handed in and the weight's; the output lives
    # until the call of backward() is over.
    assert ledger.peak_bytes == 2 * weights + batch + 2 * output
    assert ledger.inference_peak_bytes == weights + batch + output
    assert ledger.parts["gradients"] == weights
    assert ledger.parts["temporaries"] == 2 * output
    assert ledger.working_peak_bytes == weights + 2 * output
    assert ledger.inference_working_peak_bytes == output


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.AdamW])
def test_the_parts_sum_to_the_peak(optimizer: Any) -> None:
    model = net()
    steps = optimizer and optimizer(model.parameters(), lr=0.1)
    ledger = measure(Step(model, torch.randn(4, 3, 8, 8), steps))
    assert sum(ledger.parts.values()) == ledger.peak_bytes
    assert ledger.parts["weights"] == ledger.weight_bytes == weight_bytes(model)
    assert ledger.parts["inputs"] == ledger.input_bytes == 4 * 3 * 8 * 8 * FLOAT
    assert ledger.peak_without_weights_bytes == ledger.peak_bytes - ledger.weight_bytes
    assert ledger.remarks == ()


def test_saved_bytes_are_those_of_an_independent_count() -> None:
    model = nn.Sequential(net(), nn.BatchNorm1d(10), nn.GELU(), nn.Dropout(), nn.LayerNorm(10), nn.Softmax(-1))
    x = torch.randn(4, 3, 8, 8)
    expected = saved_by_hand(lambda: model(x), [*model.parameters(), *model.buffers()])
    ledger = measure(lambda: model(x).sum().backward(), inference=False)
    assert ledger.saved_bytes == expected
    assert ledger.saved_bytes_of("activations") == expected
    assert ledger.saved_bytes_of("bits") == 0


def test_savers_are_named_by_layer_and_operation() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 3)))
    x, y = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    ledger = measure(lambda: F.cross_entropy(model(x).tanh(), y).backward())
    named = {(saved.layer, saved.operation) for saved in ledger.saved}
    assert {("0", "linear"), ("1.0", "gelu"), ("1.1", "linear")} <= named
    assert ("(loss)", "cross_entropy") in named
    assert ("(loss)", "tanh") in named


def test_a_storage_saved_twice_belongs_to_its_first_saver() -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.Linear(8, 8))  # saves its output; saves that as its input
    x = torch.randn(4, 8, requires_grad=True)
    ledger = measure(lambda: model(x).sum().backward())
    assert ledger.saved == (Saved("0", "sigmoid", "activations", 4 * 8 * FLOAT, 1),)


class Labelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(label_saved(x > 0, "bits"))
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class LeanReLU(nn.Module):
    def __init__(self, operation: str | None) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        token = current_operation.set(self.operation)
        try:
            return Labelled.apply(x)
        finally:
            current_operation.reset(token)


@pytest.mark.parametrize(("operation", "expected"), [("lean relu", "lean relu"), (None, "Labelled")])
def test_lean_operations_are_listed_as_they_call_themselves(operation: str | None, expected: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), LeanReLU(operation))
    ledger = measure(Step(model, torch.randn(4, 8)))
    assert Saved("1", expected, "bits", 4 * 8, 1) in ledger.saved
    assert ledger.saved_bytes_of("bits") == 32


def test_optimizer_state_is_counted_from_the_start_of_the_step() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = Step(model, torch.randn(64, 3, 8, 8), optimizer)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    first, second = measure(step), measure(step)
    assert first.optimizer_state_bytes == second.optimizer_state_bytes == parameters
    assert first.parts["optimizer state"] == 0  # made by the step itself, after the peak
    assert second.parts["optimizer state"] == parameters
    assert second.peak_bytes == first.peak_bytes + parameters
    assert second.gradient_bytes == parameters


def test_without_momentum_there_is_no_optimizer_state() -> None:
    model = net()
    step = Step(model, torch.randn(4, 3, 8, 8), torch.optim.SGD(model.parameters(), lr=0.1))
    assert measure(step).optimizer_state_bytes == 0


def test_gradients_kept_from_step_to_step_are_counted() -> None:
    model = net()
    step = Step(model, torch.randn(64, 3, 8, 8))
    step()
    ledger = measure(step)
    assert ledger.parts["gradients"] == ledger.gradient_bytes == weight_bytes(model)


def test_updates_inside_the_backward_are_seen_one_gradient_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))

    def update(parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter.sub_(0.1 * gradient_of(parameter))
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    ledger = measure(Step(model, torch.randn(4, 64)))
    assert ledger.gradient_bytes == 64 * 64 * FLOAT


def test_compact_parameters_and_their_gradients_are_their_own_parts() -> None:
    model = nn.Linear(64, 64, bias=False).requires_grad_(False)
    compact = torch.zeros(64, 4, requires_grad=True)
    x = torch.randn(8, 64)

    def step() -> None:
        (model(x) + x[:, :4] @ compact.t()).sum().backward()
        torch.zeros(1 << 16)  # the peak

    ledger = measure(step, model, compact=[compact])
    assert ledger.gradient_bytes == compact.nbytes
    assert ledger.parts["compact parameters"] == ledger.parts["compact gradients"] == compact.nbytes
    assert ledger.parts["gradients"] == 0
    assert ledger.weight_bytes == 64 * 64 * FLOAT


def test_measuring_does_not_change_the_step() -> None:
    torch.manual_seed(0)
    measured, plain = net(), None
    plain = copy.deepcopy(measured)
    x = torch.randn(4, 3, 8, 8)
    for model, run in ((measured, measure), (plain, lambda step: step())):
        run(Step(model, x, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)))
    for one, other in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_raises_passes_its_error_on_and_leaves_no_hooks() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    model = nn.Sequential(nn.Linear(4, 4), Failing(4, 4))
    before = leftovers()
    with pytest.raises(KeyError, match="mine"):
        measure(lambda: model(torch.randn(2, 4)))
    assert leftovers() == before
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_measured_step_leaves_no_hooks() -> None:
    model = net()
    before = leftovers()
    measure(Step(model, torch.randn(2, 3, 8, 8), torch.optim.SGD(model.parameters(), lr=0.1)))
    assert leftovers() == before
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_step_that_never_goes_backward_leaks_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    seen = []

    def step() -> None:
        output = model(torch.randn(4, 8))
        seen.append(weakref.ref(output.untyped_storage()))

    measure(step)
    assert seen[0]() is None


def test_changing_a_saved_tensor_in_place_is_still_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())

    def step() -> None:
        output = model(torch.randn(4, 8))
        with torch.no_grad():
            output.add_(1)
        output.sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        measure(step)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_step_saves_the_inputs_of_its_blocks(reentrant: bool) -> None:
    x = torch.randn(128, 64, requires_grad=True)
    ledger = measure(Step(Checkpointed(reentrant), x))
    full = measure(Step(Checkpointed(None), x))
    block_inputs = 4 * x.nbytes
    assert block_inputs <= ledger.saved_bytes <= block_inputs + x.nbytes + 8 * 1024  # the loss; random states
    assert full.saved_bytes > 3 * ledger.saved_bytes
    assert ledger.working_peak_bytes < full.working_peak_bytes
    assert ledger.inference_peak_bytes == full.inference_peak_bytes
    assert sum(ledger.parts.values()) == ledger.peak_bytes


def test_hooks_disabled_around_the_step_are_remarked_on() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        ledger = measure(lambda: model(x).sum().backward())
    assert ledger.saved == ()
    assert "hooks were disabled" in ledger.remarks[0]
    assert ledger.gradient_bytes == weight_bytes(model)


def test_a_step_that_disables_hooks_itself_is_measured_with_a_remark() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)

    def step() -> None:
        loss = model(x).sum()
        torch.func.grad(lambda scale: model(x * scale).sum())(torch.ones(()))
        loss.backward()

    ledger = measure(step)
    assert any("hooks were disabled" in remark for remark in ledger.remarks)
    assert ledger.gradient_bytes == weight_bytes(model)
    assert ("(model)", "linear") in {(saved.layer, saved.operation) for saved in ledger.saved}


def test_a_model_on_the_meta_device_takes_the_same_bytes() -> None:
    figures = []
    for device in ("cpu", "meta"):
        model = net(device=device)
        step = Step(model, torch.zeros(4, 3, 8, 8, device=device), torch.optim.SGD(model.parameters(), lr=0.1))
        figures.append(measure(step).to_json())
    assert figures[0] == figures[1]


def test_a_ledger_survives_a_file(tmp_path: Path) -> None:
    model = net()
    ledger = measure(Step(model, torch.randn(2, 3, 8, 8)))
    path = tmp_path / "runs" / "ledger.json"
    ledger.save(path)
    assert Ledger.load(path) == ledger
    assert [file.name for file in path.parent.iterdir()] == ["ledger.json"]
    assert json.loads(path.read_text())["saved_bytes"] == ledger.saved_bytes


@pytest.mark.parametrize("text", ["", "[]", '{"format": "trady ledger 1"}', '{"format": "other"}'])
def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(TradyError, match=r"ledger\.json"):
        Ledger.load(path)


def test_a_ledger_prints_what_a_person_asks_first() -> None:
    model = net()
    text = str(measure(Step(model, torch.randn(64, 3, 8, 8))))
    for words in ("peak", "saved activations", "inference peak of the untouched model", "×", "conv2d", "KiB"):
        assert words in text
