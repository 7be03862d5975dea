"""The ledger: a training step's tensor memory, measured."""

import contextlib
import copy
import gc
import json
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_registry
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from trady.errors import TradyError
from trady.memory import Ledger, Saved, measure
from trady.ops.context import current_operation, label_saved

FLOAT = 4


def net(**options):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **options),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10, **options),
    )


def weight_bytes(model):
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def saved_by_hand(forward, weights):
    """An independent count: storages packed in the forward that are no weights."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    packed = {}

    def pack(tensor):
        packed[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(nbytes for pointer, nbytes in packed.items() if pointer not in known)


def leftovers():
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


class Step:
    """A step of a model, with what a test may want to vary."""

    def __init__(self, model, batch, optimizer=None, loss=None):
        self.model, self.batch, self.optimizer = model, batch, optimizer
        self.loss = loss or (lambda output: output.square().mean())

    def __call__(self):
        self.loss(self.model(self.batch)).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_a_linear_layer_is_accounted_for_by_hand():
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
def test_the_parts_sum_to_the_peak(optimizer):
    model = net()
    steps = optimizer and optimizer(model.parameters(), lr=0.1)
    ledger = measure(Step(model, torch.randn(4, 3, 8, 8), steps))
    assert sum(ledger.parts.values()) == ledger.peak_bytes
    assert ledger.parts["weights"] == ledger.weight_bytes == weight_bytes(model)
    assert ledger.parts["inputs"] == ledger.input_bytes == 4 * 3 * 8 * 8 * FLOAT
    assert ledger.peak_without_weights_bytes == ledger.peak_bytes - ledger.weight_bytes
    assert ledger.remarks == ()


def test_saved_bytes_are_those_of_an_independent_count():
    model = nn.Sequential(net(), nn.BatchNorm1d(10), nn.GELU(), nn.Dropout(), nn.LayerNorm(10), nn.Softmax(-1))
    x = torch.randn(4, 3, 8, 8)
    expected = saved_by_hand(lambda: model(x), [*model.parameters(), *model.buffers()])
    ledger = measure(lambda: model(x).sum().backward(), inference=False)
    assert ledger.saved_bytes == expected
    assert ledger.saved_bytes_of("activations") == expected
    assert ledger.saved_bytes_of("bits") == 0


def test_savers_are_named_by_layer_and_operation():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 3)))
    x, y = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    ledger = measure(lambda: F.cross_entropy(model(x).tanh(), y).backward())
    named = {(saved.layer, saved.operation) for saved in ledger.saved}
    assert {("0", "linear"), ("1.0", "gelu"), ("1.1", "linear")} <= named
    assert ("(loss)", "cross_entropy") in named
    assert ("(loss)", "tanh") in named


def test_a_storage_saved_twice_belongs_to_its_first_saver():
    model = nn.Sequential(nn.Sigmoid(), nn.Linear(8, 8))  # saves its output; saves that as its input
    x = torch.randn(4, 8, requires_grad=True)
    ledger = measure(lambda: model(x).sum().backward())
    assert ledger.saved == (Saved("0", "sigmoid", "activations", 4 * 8 * FLOAT, 1),)


class Labelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(label_saved(x > 0, "bits"))
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class LeanReLU(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        token = current_operation.set(self.operation)
        try:
            return Labelled.apply(x)
        finally:
            current_operation.reset(token)


@pytest.mark.parametrize(("operation", "expected"), [("lean relu", "lean relu"), (None, "Labelled")])
def test_lean_operations_are_listed_as_they_call_themselves(operation, expected):
    model = nn.Sequential(nn.Linear(8, 8), LeanReLU(operation))
    ledger = measure(Step(model, torch.randn(4, 8)))
    assert Saved("1", expected, "bits", 4 * 8, 1) in ledger.saved
    assert ledger.saved_bytes_of("bits") == 32


def test_optimizer_state_is_counted_from_the_start_of_the_step():
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


def test_without_momentum_there_is_no_optimizer_state():
    model = net()
    step = Step(model, torch.randn(4, 3, 8, 8), torch.optim.SGD(model.parameters(), lr=0.1))
    assert measure(step).optimizer_state_bytes == 0


def test_gradients_kept_from_step_to_step_are_counted():
    model = net()
    step = Step(model, torch.randn(64, 3, 8, 8))
    step()
    ledger = measure(step)
    assert ledger.parts["gradients"] == ledger.gradient_bytes == weight_bytes(model)


def test_updates_inside_the_backward_are_seen_one_gradient_at_a_time():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))

    def update(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    ledger = measure(Step(model, torch.randn(4, 64)))
    assert ledger.gradient_bytes == 64 * 64 * FLOAT


def test_compact_parameters_and_their_gradients_are_their_own_parts():
    model = nn.Linear(64, 64, bias=False).requires_grad_(False)
    compact = torch.zeros(64, 4, requires_grad=True)
    x = torch.randn(8, 64)

    def step():
        (model(x) + x[:, :4] @ compact.t()).sum().backward()
        torch.zeros(1 << 16)  # the peak

    ledger = measure(step, model, compact=[compact])
    assert ledger.gradient_bytes == compact.nbytes
    assert ledger.parts["compact parameters"] == ledger.parts["compact gradients"] == compact.nbytes
    assert ledger.parts["gradients"] == 0
    assert ledger.weight_bytes == 64 * 64 * FLOAT


class Fickle(nn.Module):
    """A model that changes a buffer and draws random numbers in eval mode too."""

    trained: ClassVar[list[tuple[bool, bool, bool]]] = []  # of the class: what an object keeps is put back

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.norm.training = False
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.trained.append((self.training, self.linear.training, torch.is_grad_enabled()))
        self.calls += 1
        return self.norm(self.linear(x)) + torch.rand(())

    def train(self, mode=True):
        raise AssertionError("train() may do more than set a flag")


def test_the_inference_pass_leaves_flags_buffers_and_random_numbers_alone():
    model = Fickle()
    x = torch.randn(4, 4)
    torch.manual_seed(0)
    measure(lambda: model(x).sum().backward(), inference=False)
    expected_draw, expected_calls = torch.rand(()), model.calls.clone()

    model.calls.zero_()
    torch.manual_seed(0)
    ledger = measure(lambda: model(x).sum().backward())
    assert torch.rand(()) == expected_draw
    assert model.calls == expected_calls == 1
    assert model.trained[-1] == (False, False, False)
    assert (model.training, model.linear.training, model.norm.training) == (True, True, False)
    assert ledger.inference_peak_bytes is not None


def test_the_inference_pass_runs_on_the_untouched_model():
    model = nn.Linear(4, 4)
    armed = model.register_forward_hook(lambda *_: torch.zeros(1000))
    events = []

    @contextlib.contextmanager
    def untouched():
        events.append("disarmed")
        model._forward_hooks.pop(armed.id)
        yield
        events.append("armed")

    x = torch.randn(4, 4)
    ledger = measure(lambda: model(x), untouched=untouched)
    assert events == ["disarmed", "armed"]
    assert ledger.inference_peak_bytes == 16 * FLOAT + 4 * FLOAT + 16 * FLOAT + 16 * FLOAT


class TakesKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.linear = nn.Linear(16, 2)

    def forward(self, *, input_ids, mask=None, labels=None):
        hidden = self.embedding(input_ids) * mask.unsqueeze(-1)
        return {"loss": F.cross_entropy(self.linear(hidden.mean(1)), labels)}


def test_the_model_is_found_with_a_batch_of_keywords():
    model = TakesKeywords()
    batch = {
        "input_ids": torch.randint(0, 50, (4, 7)),
        "mask": torch.ones(4, 7),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    ledger = measure(lambda: model(**batch)["loss"].backward())
    assert ledger.weight_bytes == weight_bytes(model)
    assert ledger.input_bytes == sum(tensor.nbytes for tensor in batch.values())
    assert ledger.inference_peak_bytes > ledger.weight_bytes + ledger.input_bytes
    assert "embedding" in {saved.layer for saved in ledger.saved}


def test_the_model_is_the_module_with_the_most_parameters():
    model, small, loss = net(), nn.Linear(3, 3), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    ledger = measure(lambda: loss(model(small(x.transpose(1, 3)).transpose(1, 3)), y).backward())
    assert ledger.weight_bytes == weight_bytes(model)
    assert {"0", "1", "3", "Linear", "(loss)"} <= {saved.layer for saved in ledger.saved}


def test_a_model_that_is_wrapped_is_still_measured_by_its_own_names():
    model = net()
    wrapped = nn.Sequential(nn.Sequential(model))
    x = torch.randn(4, 3, 8, 8)
    ledger = measure(lambda: wrapped(x).sum().backward(), model)
    assert {saved.layer for saved in ledger.saved} == {"0", "1", "3"}
    assert ledger.inference_peak_bytes == measure(lambda: model(x).sum().backward()).inference_peak_bytes


def test_a_step_without_a_model_is_measured_with_a_remark():
    w, x = torch.zeros(8, 8, requires_grad=True), torch.randn(4, 8)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def step():
        (x @ w).sum().backward()
        optimizer.step()

    ledger = measure(step)
    assert ledger.weight_bytes == w.nbytes
    assert ledger.inference_peak_bytes is None
    assert ledger.saved == (Saved("(outside)", "matmul", "activations", x.nbytes, 1),)
    assert "no module with parameters" in ledger.remarks[0]


def test_a_batch_that_the_step_drops_is_not_kept_alive():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    born = []

    def step():
        x = torch.ones(1000, 8)
        born.append(weakref.ref(x.untyped_storage()))
        hidden = model[0](x)
        del x
        gone = born[0]() is None
        model[1](hidden)
        assert gone

    measure(step)

    def whole():
        model(torch.ones(1000, 8))

    ledger = measure(whole)
    gc.collect()
    assert ledger.inference_peak_bytes == weight_bytes(model) + 3 * 1000 * 8 * FLOAT


def test_a_model_that_cannot_run_again_leaves_a_remark():
    class Once(nn.Linear):
        def forward(self, x):
            if not self.training:
                raise ValueError("no eval here")
            return super().forward(x)

    x = torch.randn(2, 4)
    model = Once(4, 4)
    ledger = measure(lambda: model(x).sum().backward())
    assert ledger.inference_peak_bytes is None
    assert ledger.remarks == ("no inference peak: the model raised ValueError: no eval here",)
    assert model.training


def test_the_inference_pass_has_the_autocast_of_the_step():
    model, x = nn.Linear(256, 256), torch.randn(64, 256)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).sum()
        loss.backward()

    halves = 2 * (64 * 256 + 256 * 256 + 256 + 64 * 256)  # batch, weight, bias and output in bfloat16
    assert measure(step).inference_peak_bytes == weight_bytes(model) + x.nbytes + halves


def test_measuring_does_not_change_the_step():
    torch.manual_seed(0)
    measured, plain = net(), None
    plain = copy.deepcopy(measured)
    x = torch.randn(4, 3, 8, 8)
    for model, run in ((measured, measure), (plain, lambda step: step())):
        run(Step(model, x, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)))
    for one, other in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_raises_passes_its_error_on_and_leaves_no_hooks():
    class Failing(nn.Linear):
        def forward(self, x):
            raise KeyError("mine")

    model = nn.Sequential(nn.Linear(4, 4), Failing(4, 4))
    before = leftovers()
    with pytest.raises(KeyError, match="mine"):
        measure(lambda: model(torch.randn(2, 4)))
    assert leftovers() == before
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_measured_step_leaves_no_hooks():
    model = net()
    before = leftovers()
    measure(Step(model, torch.randn(2, 3, 8, 8), torch.optim.SGD(model.parameters(), lr=0.1)))
    assert leftovers() == before
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_step_that_never_goes_backward_leaks_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    seen = []

    def step():
        output = model(torch.randn(4, 8))
        seen.append(weakref.ref(output.untyped_storage()))

    measure(step)
    assert seen[0]() is None


def test_changing_a_saved_tensor_in_place_is_still_an_error():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())

    def step():
        output = model(torch.randn(4, 8))
        with torch.no_grad():
            output.add_(1)
        output.sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        measure(step)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_step_saves_the_inputs_of_its_blocks(reentrant):
    x = torch.randn(128, 64, requires_grad=True)
    ledger = measure(Step(Checkpointed(reentrant), x))
    full = measure(Step(Checkpointed(None), x))
    block_inputs = 4 * x.nbytes
    assert block_inputs <= ledger.saved_bytes <= block_inputs + x.nbytes + 8 * 1024  # the loss; random states
    assert full.saved_bytes > 3 * ledger.saved_bytes
    assert ledger.working_peak_bytes < full.working_peak_bytes
    assert ledger.inference_peak_bytes == full.inference_peak_bytes
    assert sum(ledger.parts.values()) == ledger.peak_bytes


def test_hooks_disabled_around_the_step_are_remarked_on():
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        ledger = measure(lambda: model(x).sum().backward())
    assert ledger.saved == ()
    assert "hooks were disabled" in ledger.remarks[0]
    assert ledger.gradient_bytes == weight_bytes(model)


def test_a_step_that_disables_hooks_itself_is_measured_with_a_remark():
    model, x = nn.Linear(8, 8), torch.randn(4, 8)

    def step():
        loss = model(x).sum()
        torch.func.grad(lambda scale: model(x * scale).sum())(torch.ones(()))
        loss.backward()

    ledger = measure(step)
    assert any("hooks were disabled" in remark for remark in ledger.remarks)
    assert ledger.gradient_bytes == weight_bytes(model)
    assert ("(model)", "linear") in {(saved.layer, saved.operation) for saved in ledger.saved}


def test_a_model_on_the_meta_device_takes_the_same_bytes():
    figures = []
    for device in ("cpu", "meta"):
        model = net(device=device)
        step = Step(model, torch.zeros(4, 3, 8, 8, device=device), torch.optim.SGD(model.parameters(), lr=0.1))
        figures.append(measure(step).to_json())
    assert figures[0] == figures[1]


def test_a_ledger_survives_a_file(tmp_path):
    model = net()
    ledger = measure(Step(model, torch.randn(2, 3, 8, 8)))
    path = tmp_path / "runs" / "ledger.json"
    ledger.save(path)
    assert Ledger.load(path) == ledger
    assert [file.name for file in path.parent.iterdir()] == ["ledger.json"]
    assert json.loads(path.read_text())["saved_bytes"] == ledger.saved_bytes


@pytest.mark.parametrize("text", ["", "[]", '{"format": "trady ledger 1"}', '{"format": "other"}'])
def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(TradyError, match=r"ledger\.json"):
        Ledger.load(path)


def test_a_ledger_prints_what_a_person_asks_first():
    model = net()
    text = str(measure(Step(model, torch.randn(64, 3, 8, 8))))
    for words in ("peak", "saved activations", "inference peak of the untouched model", "×", "conv2d", "KiB"):
        assert words in text
