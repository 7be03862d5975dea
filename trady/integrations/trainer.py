"""Any transformers-like trainer inside a memory budget: its bound methods are wrapped, its class stays what it is.

Such a trainer makes an optimizer over the weights of its model, calls ``compute_loss`` in ``training_step``, clips with
its accelerator, and writes and reads checkpoints. What trains under a budget are compact parameters beside the weights.
So at the first training step the plan is made for what that step is seen to call, the model is armed, and the optimizer
is adopted: each weight gives its place to its channels. New channels are drawn as epochs begin. A checkpoint holds what
a restart needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trady.analysis.by_hand import Wish
from trady.errors import StateError, TrainingError
from trady.integrations.adopting import (
    as_written,
    largest_of_all,
    memory_of_optimizer,
    not_shown,
    put_back,
    take_up,
)
from trady.integrations.example_record import FOLDER, read_checkpoint, step_from_state, step_to_state
from trady.integrations.looking import inputs_by_index, longest_inputs, own_loss, passes_of
from trady.integrations.loop_callback import loop_callback
from trady.integrations.recording import Step
from trady.integrations.refusals import check_trainer, optimizer_of, refuse_wrappers
from trady.model.batch import Batch
from trady.planning.budget import Budget
from trady.planning.plan import Plan
from trady.planning.request import Request
from trady.policies import Policy
from trady.process.ranks import processes
from trady.ranking.priors import Known
from trady.ranking.ranking import LayerRanking
from trady.records.lock import locked
from trady.training.checkpoint import Checkpoint, save_checkpoint
from trady.training.schedule import redraw_steps
from trady.training.settings import OBSERVED_BATCHES
from trady.training.state import State
from trady.tuner.full_device import out_of_memory
from trady.tuner.tuner import Tuner


@dataclass(frozen=True)
class Options:
    """What :func:`tune` is given beside the trainer.

    Attributes:
        request: What is asked of the budget.
        draws_per_epoch: How often channels are drawn in an epoch.
        example: What the model's ``forward`` gets in the largest batch that training will see.
    """

    request: Request
    draws_per_epoch: int = 1
    example: Any = None

    def __post_init__(self) -> None:
        if self.draws_per_epoch < 1:
            raise TrainingError(f"draws_per_epoch is {self.draws_per_epoch}; give at least 1")


def tune(
    trainer: Any,
    *,
    budget: str | int | Budget | None = None,
    policy: str | Policy = "trady",
    ranking: LayerRanking | Known | None = None,
    head: str | Sequence[str] | None = "auto",
    train: Wish | None = None,
    freeze: Wish | None = None,
    recompute: str = "auto",
    fidelity: str = "exact",
    draws_per_epoch: int = 1,
    example: Any = None,
    over_budget: str = "adapt",
    max_step_flops: str | float | None = None,
) -> Tuning:
    """Let a trainer of transformers, TRL or sentence-transformers train inside a memory budget.

    The trainer stays the object and of the class that it is; its ``train()`` is called as ever. The model is armed at
    the first training step and plain again when training ends, also after an error. ``args.seed`` decides the channels.

    Args:
        trainer: An instance of ``transformers.Trainer`` or of a class derived from it.
        budget: What a training step may take, e.g. ``"2 GiB"``; the policy ``head`` needs none.
        policy: Where to update.
        ranking: A layer ranking, ``"online"`` or ``"structural"``; without one the prior of this structure, or online.
        head: Modules that always train, outside the budget.
        train: Layers that channels are drawn from (:func:`trady.prepare`).
        freeze: Layers that stay as they are (:func:`trady.prepare`); flags ``requires_grad=False`` are obeyed too.
        recompute: What the backward pass recomputes instead of keeping it.
        fidelity: ``exact``, ``8bit`` or ``4bit``: how smooth activations are differentiated.
        draws_per_epoch: An epoch is cut into this many equal parts, and channels are drawn again before each.
        example: What the model's ``forward`` gets in the largest batch that training will see. Without it, the plan is
            made for what the first training step is seen to call, on the longest samples where the data can be read by
            index; what is larger later trains fewer channels.
        over_budget: What happens then (:func:`trady.prepare`).
        max_step_flops: What a step may take of the operations of full fine-tuning (:func:`trady.prepare`).

    Returns:
        The session, also under ``trainer.trady``: its plan, its tuner while it trains, its delta.

    Raises:
        ModelError: It is no such trainer, or FSDP, DeepSpeed, DataParallel, ``torch_compile`` or NEFTune are asked for.
        StateError: It has a budget already.
        TrainingError: ``draws_per_epoch`` is less than 1.
        BudgetError, PolicyError: As for :func:`trady.prepare`.
    """
    request = Request(
        budget, policy, ranking, head, recompute=recompute, fidelity=fidelity, train=train, freeze=freeze,
        over_budget=over_budget, max_step_flops=max_step_flops,
    )  # fmt: skip
    return Tuning(trainer, Options(request, draws_per_epoch, example))


class Tuning:
    """A trainer with a budget. Made by :func:`trady.tune`.

    Attributes:
        tuner: The tuner, from the first training step to the end of ``train()``; else ``None``.
        plan: What was decided; ``None`` before the first training step.
    """

    def __init__(self, trainer: Any, options: Options) -> None:
        check_trainer(trainer)
        self._trainer, self._options = trainer, options
        self.tuner: Tuner | None = None
        self.plan: Plan | None = None
        self._step: Step | None = None
        self._delta: dict[str, Tensor] | None = None
        self._restored: int | None = None
        self._epoch, self._epoch_begins = 0, False
        #: Parameters of the groups of an optimizer that the trainer was given, to be put back.
        self._given: tuple[torch.optim.Optimizer, list[list[nn.Parameter]]] | None = None
        self._own_optimizer = True
        self._originals: dict[str, Any] = {}
        for name in ("train", "training_step", "create_optimizer", "_load_from_checkpoint", "_load_best_model",
                     "_save_checkpoint"):  # fmt: skip
            self._wrap(name)
        trainer.add_callback(loop_callback(self))
        trainer.trady = self

    def delta(self) -> dict[str, Tensor]:
        """Collect the channels that were ever trained, and the head; :func:`trady.apply_delta` takes it.

        Names are those of the part of the model that trains by channel: the model, or what its loss calls of it.

        Raises:
            StateError: Nothing was trained yet.
        """
        if self.tuner is not None:
            return self.tuner.delta()
        if self._delta is None:
            raise StateError("nothing was trained yet: call train() first")
        return self._delta

    # -- what is wrapped -----------------------------------------------------------------------------

    def _wrap(self, name: str) -> None:
        original = self._originals[name] = getattr(self._trainer, name)
        ours = getattr(self, name if name.startswith("_") else f"_{name}")

        @wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        setattr(self._trainer, name, wrapped)

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        refuse_wrappers(self._trainer)
        with self._alone(kwargs.get("trial")):
            self._own_optimizer = self._trainer.optimizer is None
            try:
                return self._originals["train"](*args, **kwargs)
            finally:
                self._disarm()

    def _alone(self, trial: Any) -> AbstractContextManager[None]:
        """Keep other processes out of the folder of the checkpoints; trials of a search have folders of their own."""
        args = self._trainer.args
        saves = args.should_save and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        return locked(Path(args.output_dir)) if saves and trial is None else nullcontext()

    def _training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        if self.tuner is None or self._epoch_begins:
            items = args[0] if args else kwargs.get("num_items_in_batch")
            model.train()
            prepared = trainer._prepare_inputs(inputs)
            self._armed(lambda: self._seen(model, prepared, items))
            self._start_epoch(model, prepared, items)
            self._prepare_once(prepared)
        if self.tuner is None or self.tuner.model not in trainer.model.modules():
            raise StateError(
                "trainer.model is another one than the model that this run was armed for: exchange it before "
                "trainer.train(), or train it with a trainer of its own"
            )
        try:
            return self._originals["training_step"](model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if getattr(trainer.args, "auto_find_batch_size", False) or self._step is None:
                raise  # the trainer goes on with a smaller batch
            raise out_of_memory(self.tuner, self._step.example, error) from error

    def _prepare_once(self, prepared: Any) -> None:
        """Hand on what was prepared: a trainer that generates what it learns from would generate it twice."""
        trainer = self._trainer
        known = vars(trainer).get("_prepare_inputs")

        def prepare_inputs(_: Any) -> Any:
            vars(trainer).pop("_prepare_inputs")
            if known is not None:
                trainer._prepare_inputs = known
            return prepared

        trainer._prepare_inputs = prepare_inputs

    def _create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.tuner is None:
            made = self._originals["create_optimizer"](*args, **kwargs)
            if processes() == 1:
                return made
            # DDP waits for a gradient of all that requires one when it wraps the model, which is about to happen.
            self._armed(lambda: self._looked_ahead("several processes wrap the model before the first step"))
        return self._trainer.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint = read_checkpoint(folder)
        # On the weights that the run was started with: a policy may look at them.
        self._armed(lambda: self._kept(folder, checkpoint))
        self._originals["_load_from_checkpoint"](resume_from_checkpoint, *args, **kwargs)
        self._restored = self._restore(checkpoint)

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        self._originals["_load_best_model"](*args, **kwargs)
        if self.tuner is not None:
            self._restore(read_checkpoint(Path(self._trainer.state.best_model_checkpoint)))

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.args.should_save and self.tuner is not None and self._step is not None:
            place = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}" / FOLDER
            state = self.tuner.state_dict(lazily=True)
            states = {"tuner": State(state["tensors"], state["meta"])}
            if (example := step_to_state(self._step)) is not None:
                states["example"] = example
            save_checkpoint(place, Checkpoint(state["meta"]["epoch"], trainer.state.global_step, {}, "", states))
        self._originals["_save_checkpoint"](model, trial, *args, **kwargs)

    # -- what the callback calls ---------------------------------------------------------------------

    def epoch_begins(self, epoch: int) -> None:
        """Note that channels are to be drawn before the next training step."""
        self._epoch, self._epoch_begins = epoch, True

    def drop_gradients(self) -> None:
        """Do what ``model.zero_grad()`` does, for parameters that a wrapper of the model does not show."""
        if self.tuner is not None:
            for parameter in self.tuner.parameters():
                parameter.grad = None

    def end_step(self, step: int, steps: int, epochs: int) -> None:
        """Draw other channels where a part of the epoch ends, after ``step`` of ``steps`` steps."""
        an_epoch = -(-steps // max(1, epochs))
        if self.tuner is not None and step % an_epoch in redraw_steps(self._options.draws_per_epoch, an_epoch):
            self.tuner.redraw()

    def _start_epoch(self, model: nn.Module, prepared: Any, items: Any) -> None:
        """Draw the channels of an epoch, unless a checkpoint from its middle has them."""
        assert self.tuner is not None
        restored, self._restored, self._epoch_begins = self._restored, None, False
        if restored == self._epoch:
            return
        if self.tuner.observation_due:
            trainer = self._trainer
            batches = inputs_by_index(trainer, OBSERVED_BATCHES) or [prepared]
            with self.tuner.untouched():
                found = [passes_of(trainer, model, batch, items, only_first=True) for batch in batches]
            self.tuner.observe([(passes[0].batch.inputs, None) for passes in found if passes], own_loss)
        self.tuner.resample(self._epoch)

    # -- arming --------------------------------------------------------------------------------------

    def _seen(self, model: nn.Module, prepared: Any, items: Any) -> Step:
        """Tell from the first training step what a step calls, and from the data how large it becomes."""
        trainer = self._trainer
        passes = passes_of(trainer, model, prepared, items)
        further = [
            each for batch in longest_inputs(trainer, prepared) for each in passes_of(trainer, model, batch, items)
        ]
        return largest_of_all(Step.of(trainer.model, passes, more=further))

    def _kept(self, folder: Path, checkpoint: Checkpoint) -> Step:
        """What the run was planned for, as its checkpoint has kept it; else as the data shows it."""
        if "example" in checkpoint.states:
            return step_from_state(checkpoint.states["example"], self._trainer.args.device)
        return self._looked_ahead(f"{folder} does not say what the run was planned for")

    def _looked_ahead(self, why: str) -> Step:
        """Tell what a step calls before there is one.

        Raises:
            StateError: The data can be read once only.
        """
        batches = inputs_by_index(self._trainer, 1)
        if not batches:
            raise StateError(
                f"{why}, and the data cannot be looked at without taking it away: pass example= to trady.tune, a batch "
                "as the model's forward gets it"
            )
        return self._seen(self._trainer.model, batches[0], None)

    def _armed(self, step: Any) -> Tuner:
        """Arm the model for what ``step()`` tells, unless it is."""
        if self.tuner is not None:
            return self.tuner
        trainer, given = self._trainer, self._options.example
        with as_written(trainer.model):
            found = step() if given is None else Step("", Batch.of(given, trainer.model))
            model = trainer.model.get_submodule(found.module)
            if trainer.optimizer is None:
                self._originals["create_optimizer"]()
            optimizer = optimizer_of(trainer)
            groups = [list(group["params"]) for group in optimizer.param_groups]
            decision = self._request(found).decide(model, found.example, optimizer=memory_of_optimizer(optimizer))
            tuner = Tuner(decision)
            try:
                take_up(optimizer, tuner)
                tuner.attach(optimizer)
            except BaseException:
                tuner.finish()
                put_back(optimizer, groups)
                raise
        self.tuner, self.plan, self._step, self._delta = tuner, tuner.plan, found, None
        self._given = None if self._own_optimizer else (optimizer, groups)
        self._clip_together()
        return tuner

    def _request(self, step: Step) -> Request:
        args = self._trainer.args
        narrow = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        request = replace(
            self._options.request,
            seed=args.seed,
            autocast=narrow,
            accumulates=args.gradient_accumulation_steps > 1,
            calls_per_step=step.calls,
            batches_ahead=1 if args.device.type == "cpu" else 0,  # Accelerate's loaders read one ahead
        )
        if not step.has_head and request.head == "auto":  # what the loss calls behind it trains whole
            request = replace(request, head=None)
        return request

    def _clip_together(self) -> None:
        """Clip, and log the norm of, the channels with what the trainer clips: all its versions do so by this call."""
        assert self.tuner is not None
        accelerator, tuner = self._trainer.accelerator, self.tuner
        original = accelerator.clip_grad_norm_

        def clip_grad_norm_(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            return original([*given, *not_shown(tuner, given)], *args, **kwargs)

        accelerator.clip_grad_norm_ = clip_grad_norm_

    def _disarm(self) -> None:
        trainer = self._trainer
        self._restored, self._epoch_begins = None, False
        if self._own_optimizer:
            trainer.optimizer, trainer.lr_scheduler = None, None
        if self.tuner is None:
            return
        self._delta = self.tuner.delta()
        self.tuner.finish()
        vars(trainer.accelerator).pop("clip_grad_norm_", None)
        self.tuner = None
        if self._given is None:
            return
        put_back(*self._given)

    def _restore(self, checkpoint: Checkpoint) -> int:
        state = checkpoint.states["tuner"]
        assert self.tuner is not None
        self.tuner.load_state_dict({"tensors": dict(state.tensors), "meta": dict(state.meta)})
        return checkpoint.epoch
