"""Lightning's ``Trainer`` inside a memory budget: one callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trady.analysis.by_hand import Wish
from trady.errors import CheckpointError, ModelError, StateError, TrainingError
from trady.integrations.adopting import largest_of_all
from trady.integrations.example_record import step_from_state, step_to_state
from trady.integrations.recording import Step, recorded
from trady.integrations.refusals import refuse_model
from trady.model.batch import Batch
from trady.model.untouched import untouched
from trady.planning.budget import Budget
from trady.planning.plan import Plan
from trady.planning.request import Request
from trady.policies import Policy
from trady.ranking.priors import Known
from trady.ranking.ranking import LayerRanking
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.optimizer_probe import optimizer_memory
from trady.training.randomness import own_randomness
from trady.training.state import State
from trady.tuner.adoption import innermost
from trady.tuner.tuner import Tuner

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("this module needs Lightning: pip install lightning") from error

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class TradyCallback(Callback):  # type: ignore[misc, valid-type, unused-ignore]
    """For ``Trainer(callbacks=[TradyCallback(budget="2 GiB")])``; nothing else of a script changes.

    The model is armed at the first training batch, for what ``training_step`` is seen to call, and plain again when
    training ends, also after an error. Channels are drawn as epochs begin. Checkpoints hold what ``ckpt_path`` needs.

    Args:
        budget: What a training step may take, e.g. ``"2 GiB"``; the policy ``head`` needs none.
        policy: Where to update.
        ranking: A layer ranking, ``"online"`` or ``"structural"``; without one the prior of this structure, or online.
        head: Modules that always train, outside the budget.
        train: Layers that channels are drawn from (:func:`trady.prepare`).
        freeze: Layers that stay as they are (:func:`trady.prepare`).
        recompute: What the backward pass recomputes instead of keeping it.
        fidelity: ``exact``, ``8bit`` or ``4bit``: how smooth activations are differentiated.
        seed: Decides the channels.
        example: What the ``LightningModule`` or the one model in it gets in the largest batch that training will see:
            needed where the first batch does not show it.

    Raises:
        BudgetError, PolicyError: As for :func:`trady.prepare`.
    """

    def __init__(
        self,
        budget: str | int | Budget | None = None,
        *,
        policy: str | Policy = "trady",
        ranking: LayerRanking | Known | None = None,
        head: str | Sequence[str] | None = "auto",
        train: Wish | None = None,
        freeze: Wish | None = None,
        recompute: str = "auto",
        fidelity: str = "exact",
        seed: int = 0,
        example: Any = None,
    ) -> None:
        self._request = Request(
            budget, policy, ranking, head, seed, recompute=recompute, fidelity=fidelity, train=train, freeze=freeze
        )
        self._example = example
        self.tuner: Tuner | None = None
        self.plan: Plan | None = None
        self._step: Step | None = None
        self._delta: dict[str, Tensor] | None = None
        self._state: Mapping[str, Any] = {}
        self._loaded: Mapping[str, Any] | None = None
        self._restored: int | None = None
        self._drawn = -1

    def delta(self) -> dict[str, Tensor]:
        """Collect the channels that were ever trained, and the head, as :meth:`trady.Tuner.delta`.

        Raises:
            StateError: Nothing was trained yet.
        """
        if self.tuner is not None:
            return self.tuner.delta()
        if self._delta is None:
            raise StateError("nothing was trained yet: call trainer.fit() first")
        return self._delta

    # -- checkpoints ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs beside what Lightning keeps."""
        if self.tuner is None or self._step is None:
            return dict(self._state)
        example = step_to_state(self._step)
        kept = None if example is None else {"tensors": dict(example.tensors), "meta": dict(example.meta)}
        return {"tuner": self.tuner.state_dict(), "example": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for the moment when the optimizers are there."""
        self._loaded = state_dict or None

    # -- what Lightning calls ------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be; arm the model where a checkpoint says for what."""
        _refuse(trainer, pl_module, seen=self._example is None)
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        example = loaded.get("example")
        if example is None and self._example is None:
            raise CheckpointError(
                "the checkpoint does not say what the run was planned for: pass example= to TradyCallback"
            )
        device = pl_module.device
        step = None if example is None else step_from_state(State(example["tensors"], example["meta"]), device)
        self._arm(trainer, pl_module, step)
        assert self.tuner is not None
        self.tuner.load_state_dict(loaded["tuner"])
        self._restored = int(loaded["tuner"]["meta"]["epoch"])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Arm the model before the first batch; draw the channels before the first one of an epoch."""
        if self.tuner is not None and self.tuner.model not in pl_module.modules():
            raise StateError(
                "the LightningModule has another model than the one that this run was armed for: exchange it before "
                "trainer.fit()"
            )
        if self.tuner is None:
            step = None if self._example is not None else largest_of_all(_seen(trainer, pl_module, batch, batch_idx))
            self._arm(trainer, pl_module, step)
        elif self._drawn == trainer.current_epoch:
            return
        assert self.tuner is not None
        self._drawn = trainer.current_epoch
        restored, self._restored = self._restored, None
        if restored == self._drawn:
            return
        if self.tuner.observation_due:
            raise TrainingError(
                f"the policy {self._request.rule.name} measures gradients before it draws, which a callback cannot do: "
                "choose trady, trady+ or dynamic-random, or call trady.prepare in a loop of your own"
            )
        self.tuner.resample(self._drawn)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the plain model back."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the plain model back."""
        self._finish()

    # -- arming --------------------------------------------------------------------------------------

    def _arm(self, trainer: Any, pl_module: nn.Module, step: Step | None) -> None:
        found = Step("", Batch.of(self._example, pl_module)) if step is None else step
        model = pl_module.get_submodule(found.module)
        optimizers = [innermost(optimizer) for optimizer in trainer.optimizers]
        weights = {id(p) for p in model.parameters()}
        ours = [each for each in optimizers if any(id(p) in weights for g in each.param_groups for p in g["params"])]
        if not ours:
            raise StateError(
                "no optimizer of configure_optimizers() has parameters of the model: build one from self.parameters()"
            )
        memory = OptimizerMemory()
        for optimizer in ours:
            memory |= optimizer_memory(optimizer)
        request = replace(
            self._request,
            autocast=_AUTOCAST.get(str(trainer.precision)),
            accumulates=trainer.accumulate_grad_batches > 1,
            calls_per_step=found.calls,
        )
        if not found.has_head and request.head == "auto":
            request = replace(request, head=None)
        tuner = Tuner(request.decide(model, found.example, optimizer=memory))
        try:
            for optimizer in ours:
                tuner.attach(optimizer)
        except BaseException:
            tuner.finish()
            raise
        self.tuner, self.plan, self._step, self._delta, self._drawn = tuner, tuner.plan, found, None, -1

    def _finish(self) -> None:
        if self.tuner is not None:
            self._state, self._delta = self.state_dict(), self.tuner.delta()
            self.tuner.finish()
            self.tuner = None


def _seen(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Step:
    """Tell from the first batch what a training step calls; nothing is logged or changed by it."""
    narrow = trainer.precision_plugin.forward_context
    with own_randomness(), untouched(pl_module, batch), _silent(pl_module), recorded(pl_module) as passes, narrow():
        pl_module.training_step(batch, batch_idx)
    return Step.of(pl_module, passes)


@contextmanager
def _silent(pl_module: Any) -> Iterator[None]:
    """Let ``self.log`` of a LightningModule do nothing."""
    before = {name: vars(pl_module)[name] for name in ("log", "log_dict") if name in vars(pl_module)}
    pl_module.log = pl_module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del pl_module.log, pl_module.log_dict
        for name, value in before.items():
            setattr(pl_module, name, value)


def _refuse(trainer: Any, pl_module: Any, *, seen: bool) -> None:
    """Refuse what shards, wraps or hides what must be whole.

    Raises:
        ModelError: The message says what to take instead.
    """
    if trainer.world_size > 1 and not isinstance(getattr(trainer.strategy, "model", None), DistributedDataParallel):
        raise ModelError(
            f"a memory budget does not work with {type(trainer.strategy).__name__} on {trainer.world_size} devices, "
            'which cuts the model into parts; take strategy="ddp", or devices=1'
        )
    refuse_model(pl_module)
    others = [each for each in trainer.callbacks if isinstance(each, TradyCallback)]
    if len(others) > 1:
        raise StateError("there are two TradyCallbacks in this trainer: leave one of them")
    if seen and not pl_module.automatic_optimization:
        raise ModelError(
            "with automatic_optimization=False a batch cannot be looked at before it trains: pass example=, a batch as "
            "the module's forward gets it, to TradyCallback"
        )
