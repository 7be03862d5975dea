"""One cell of the table: a trainer with a budget, and plain training of the same tensors, end with which weights?"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trady
from benchmarks.trainers.builds import BUILDS
from trady.analysis.head import head_parameters
from trady.channels.selection import Selection

#: What is asked of every run: the same channels to the end, so that a plain run can be told which.
ASKED: Mapping[str, Any] = {"budget": "elements:3000", "policy": "static-random"}

#: The largest difference of a weight that counts as equal.
BAR = 1e-6

#: Settings of a feature, as each library's arguments take them.
FEATURES: Mapping[str, dict[str, Any]] = {
    "training": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "best model": {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    },
    "resume": {"save_strategy": "steps", "save_steps": 3},
    "generation": {},
    "packing": {},
    "all at once": {
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "greater_is_better": True,
    },
}  # fmt: skip

#: Cells that are no run, and why.
LEFT_OUT: Mapping[tuple[str, str], str] = {
    **{(name, "packing"): "it has none" for name in BUILDS if name != "SFTTrainer"},
    **{
        (name, "generation"): "the model does not generate"
        for name in ("Trainer", "Trainer, two forwards", "Trainer, model.bert(…)", "RewardTrainer",
                     "SentenceTransformerTrainer")
    },
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What one trainer did with one feature.

    Attributes:
        trainer: Its name.
        feature: Of :data:`FEATURES`.
        error: Largest difference of a weight from plain training of the same tensors; ``None`` where it was left out.
        changed: Largest difference of a weight from where it began: that it trained at all.
        says: Why it was left out.
        logged: Largest difference of what both have logged as losses and norms.
    """

    trainer: str
    feature: str
    error: float | None = None
    changed: float | None = None
    says: str = ""
    logged: float = 0.0

    @property
    def right(self) -> bool:
        """Whether it trained, and ended where plain training ends."""
        if self.error is None:
            return bool(self.says)
        return self.error <= BAR and (self.changed or 0) > 100 * BAR


def cell(trainer: str, feature: str) -> Cell:
    """Run one of the trainers that :func:`trady.tune` takes, with and without a budget."""
    if (says := LEFT_OUT.get((trainer, feature))) is not None:
        return Cell(trainer, feature, says=says)
    options = dict(FEATURES[feature])
    if feature == "packing":
        options["packing"] = True
    if feature == "generation" and trainer == "Seq2SeqTrainer":
        options |= {"predict_with_generate": True, "eval_strategy": "epoch"}
    with tempfile.TemporaryDirectory() as folder, quiet():
        out = Path(folder)

        def build(name: str) -> Any:
            made = BUILDS[trainer](out / name, dict(options))
            if feature == "generation" and hasattr(made.model, "generate"):
                made.add_callback(_generating())
            return made

        tuned = build("tuned")
        before = weights_of(tuned.model)
        session = trady.tune(tuned, **ASKED)
        tuned.train()
        whole = tuned
        if feature == "resume":
            again = build("again")
            trady.tune(again, **ASKED)
            again.train(resume_from_checkpoint=str(out / "tuned" / "checkpoint-3"))
            tuned = again
        compared = build("plain")
        step = session._step
        assert session.plan is not None
        assert step is not None
        mask(compared.model, session.plan, step.module, whole=beside(compared.model, step))
        compared.train()
        found = weights_of(tuned.model)
        error = max(difference(found, weights_of(compared.model)), difference(found, weights_of(whole.model)))
        return Cell(trainer, feature, error, difference(found, before), logged=logged_difference(whole, compared))


def beside(model: nn.Module, step: Any) -> list[nn.Parameter]:
    """What a loss calls beside the armed module, and trains whole."""
    if step.has_head:
        return []
    inside = {id(p) for p in model.get_submodule(step.module).parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def _generating() -> Any:
    from transformers import TrainerCallback

    class Generates(TrainerCallback):  # type: ignore[misc]
        """Asks the model for a few words after each step, as people do to see how it comes on."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            was_training = model.training
            model.eval()
            with torch.no_grad():
                model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=3, do_sample=False)
            model.train(was_training)

    return Generates()


def mask(
    model: nn.Module, plan: trady.Plan, module: str = "", *, selection: Selection | None = None, whole: Any = ()
) -> None:
    """Let what a plan trains train alone: whole weights, of whose gradients all but the channels are zero.

    Args:
        model: A plain model.
        plan: The plan of a budget for it.
        module: The part of the model that it is for.
        selection: The channels; those of the plan's first draw, if none are given.
        whole: What trains beside it.
    """
    chosen = plan.selection if selection is None else selection
    part = model.get_submodule(module)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in whole:
        parameter.requires_grad_(True)
    for parameter in head_parameters(part, plan.head).values():
        parameter.requires_grad_(True)
    for layer in plan.table:
        if layer.name in chosen.channels:
            weight = part.get_parameter(layer.parameter)
            kept = _kept(weight, layer, torch.from_numpy(chosen.channels[layer.name]))
            weight.requires_grad_(True)
            weight.register_hook(lambda gradient, kept=kept: gradient * kept)


def _kept(weight: Tensor, layer: Any, channels: Tensor) -> Tensor:
    kept = torch.zeros_like(weight)
    if layer.kind == "addmm":
        kept[channels] = 1
        return kept
    inputs = layer.channels // layer.groups
    outputs = weight.shape[0] // layer.groups
    for channel in channels.tolist():
        group = channel // inputs
        kept[group * outputs : (group + 1) * outputs, channel % inputs] = 1
    return kept


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of an entry."""
    assert one.keys() == other.keys()
    pairs = ((value.double(), other[name].double()) for name, value in one.items() if value.numel())
    return max(float((a - b).abs().max()) for a, b in pairs)


def logged_difference(one: Any, other: Any) -> float:
    """The largest difference of a loss or a norm that two trainers have logged, where both have."""
    found = 0.0
    for mine, theirs in zip(one.state.log_history, other.state.log_history, strict=False):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in mine and key in theirs:
                found = max(found, abs(float(mine[key]) - float(theirs[key])))
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the libraries say of themselves; what trady says stays."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", trady.TradyWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
