"""``transformers.Trainer`` inside a memory budget.

The Trainer knows the model's parameters only, and what trains under a budget are compact parameters beside the model.
So here the optimizer is made over these, their gradients are clipped and dropped with the others', new channels are
drawn as epochs begin, and a checkpoint holds what a restart needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trady.analysis.by_hand import Wish
from trady.errors import CheckpointError, ModelError, StateError, TrainingError
from trady.model.batch import Batch
from trady.planning.budget import Budget
from trady.planning.plan import Plan
from trady.planning.request import Request
from trady.policies import Policy
from trady.ranking.priors import Known
from trady.ranking.ranking import LayerRanking
from trady.records.lock import locked
from trady.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from trady.training.optimizers import memory_of
from trady.training.randomness import own_randomness
from trady.training.schedule import redraw_steps
from trady.training.settings import OBSERVED_BATCHES
from trady.training.state import State
from trady.tuner.tuner import Tuner

try:
    import transformers
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
except ImportError as error:
    raise ImportError('this module needs transformers: pip install "trady[transformers]"') from error
if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"this module needs transformers 5 or newer, and {transformers.__version__} is installed")

#: Batches that are looked at for the largest one, which the plan is made for.
EXAMPLES = 8
#: What a checkpoint of the Trainer has from trady.
FOLDER = "trady"

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


@dataclass(frozen=True)
class Options:
    """What ``TradyTrainer`` is given beside the Trainer's own arguments.

    Attributes:
        request: What is asked of the budget.
        draws_per_epoch: How often channels are drawn in an epoch.
        example: Keyword arguments of the model's ``forward``, of the largest batch that training will see.
    """

    request: Request
    draws_per_epoch: int
    example: Mapping[str, Any] | None


class TradyMixin(_Base):  # type: ignore[misc, valid-type]
    """For a subclass of ``transformers.Trainer`` of your own: ``class Mine(TradyMixin, SFTTrainer)``.

    The model is armed when training starts and plain again when it ends, also after an error. Gradients are clipped
    to ``max_grad_norm`` together, as the Trainer does. ``args.seed`` decides the channels.

    Args:
        *args: As the Trainer's.
        budget: What a training step may take, e.g. ``"2 GiB"``; the policy ``head`` needs none.
        policy: Where to update.
        ranking: A layer ranking, ``"online"`` or ``"structural"``; without one the prior of this structure, or online.
        head: Modules that always train, outside the budget.
        train_layers: Layers that channels are drawn from, ``train=`` of :func:`trady.prepare`.
        freeze: Layers that stay as they are (:func:`trady.prepare`); flags ``requires_grad=False`` are obeyed too.
        recompute: What the backward pass recomputes instead of keeping it.
        fidelity: ``exact``, ``8bit`` or ``4bit``: how smooth activations are differentiated.
        calls_per_step: How often ``compute_loss`` calls the model (:func:`trady.prepare`).
        over_budget: What happens before a pass that would break the budget: ``"adapt"``, ``"refuse"`` or ``"warn"``.
        draws_per_epoch: An epoch is cut into this many equal parts, and channels are drawn again before each.
        example: Keyword arguments of the model's ``forward`` for the largest batch that training will see. Without
            it the plan is made for the longest samples of the training data where these have a column ``length`` or
            ``input_ids``, else for the largest of the first 8 batches; what is larger later trains fewer channels.
        **kwargs: As the Trainer's, but for ``optimizers``: ``args.optim`` names it, or ``optimizer_cls_and_kwargs``.

    Raises:
        StateError: An optimizer was given, which cannot know the parameters.
        ModelError: FSDP, DeepSpeed, DataParallel, ``torch_compile`` or NEFTune are asked for.
        TrainingError: ``draws_per_epoch`` is less than 1.

    """

    def __init__(
        self,
        *args: Any,
        budget: str | int | Budget | None = None,
        policy: str | Policy = "trady",
        ranking: LayerRanking | Known | None = None,
        head: str | Sequence[str] | None = "auto",
        train_layers: Wish | None = None,
        freeze: Wish | None = None,
        recompute: str = "auto",
        fidelity: str = "exact",
        calls_per_step: int = 1,
        over_budget: str = "adapt",
        draws_per_epoch: int = 1,
        example: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if draws_per_epoch < 1:
            raise TrainingError(f"draws_per_epoch is {draws_per_epoch}; give at least 1")
        request = Request(
            budget, policy, ranking, head, recompute=recompute, fidelity=fidelity, train=train_layers, freeze=freeze,
            calls_per_step=calls_per_step, over_budget=over_budget,
        )  # fmt: skip
        with _unnoticed_quantization(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is not None:
            raise StateError(
                "an optimizer was given, and what trains is not known before the plan is made: leave it to "
                "TrainingArguments(optim=...) or optimizer_cls_and_kwargs"
            )
        _refuse_wrappers(self)
        self.options = Options(request, draws_per_epoch, example)
        self.tuner: Tuner | None = None
        self.plan: Plan | None = None
        self._delta: dict[str, Tensor] | None = None
        self._restored: int | None = None
        self.add_callback(_Steps(self))

    def delta(self) -> dict[str, Tensor]:
        """Collect the channels that were ever trained, and the head; :func:`trady.apply_delta` takes it.

        Raises:
            StateError: Nothing was trained yet.
        """
        if self.tuner is not None:
            return self.tuner.delta()
        if self._delta is None:
            raise StateError("nothing was trained yet: call train() first")
        return self._delta

    # -- what the Trainer calls ----------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; the model is plain again afterwards.

        Raises:
            LockedError: Another process trains into the same ``output_dir``, and checkpoints are to be saved there.
        """
        with self._alone(kwargs.get("trial")):
            try:
                return super().train(*args, **kwargs)
            finally:
                self._disarm()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name over what trains under the budget."""
        if self.optimizer is None:
            tuner = self._armed()
            decaying = set(self.get_decay_parameter_names(self.model))
            groups: dict[float, list[nn.Parameter]] = {self.args.weight_decay: [], 0.0: []}
            for name, parameter in tuner.named_parameters():
                decays = name.removesuffix(".channels") in decaying
                groups[self.args.weight_decay if decays else 0.0].append(parameter)
            self.optimizer = tuner.attach(
                self._new_optimizer([{"params": p, "weight_decay": decay} for decay, p in groups.items() if p])
            )
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._armed()  # on the weights that the run was started with: a policy may look at them
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restored = self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore(Path(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save and self.tuner is not None:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state = self.tuner.state_dict(lazily=True)
            states = {"tuner": State(state["tensors"], state["meta"])}
            save_checkpoint(folder / FOLDER, Checkpoint(state["meta"]["epoch"], self.state.global_step, {}, "", states))
        super()._save_checkpoint(model, trial)

    # -- what the callback calls ---------------------------------------------------------------------

    def start_epoch(self, epoch: int) -> None:
        """Draw the channels of an epoch, unless a checkpoint from its middle has them."""
        tuner, restored, self._restored = self._armed(), self._restored, None
        if restored == epoch:
            return
        if tuner.observation_due:
            tuner.observe([(batch, None) for batch in self._batches(OBSERVED_BATCHES)], _own_loss)
        tuner.resample(epoch)

    def drop_gradients(self) -> None:
        """Do what ``model.zero_grad()`` does, for parameters that are not in the model."""
        for parameter in self._armed().parameters():
            parameter.grad = None

    def end_step(self, step: int, steps: int, epochs: int) -> None:
        """Draw other channels where a part of the epoch ends, after ``step`` of ``steps`` steps."""
        an_epoch = -(-steps // max(1, epochs))
        if step % an_epoch in redraw_steps(self.options.draws_per_epoch, an_epoch):
            self._armed().redraw()

    def _alone(self, trial: Any) -> AbstractContextManager[None]:
        """Keep other processes out of the folder of the checkpoints; trials of a search have folders of their own."""
        saves = self.args.should_save and self.args.save_strategy != SaveStrategy.NO
        return locked(Path(self.args.output_dir)) if saves and trial is None else nullcontext()

    # -- arming --------------------------------------------------------------------------------------

    def _armed(self) -> Tuner:
        if self.tuner is not None:
            return self.tuner
        options = self.options
        memory = memory_of(lambda p: self._new_optimizer([{"params": list(p)}]), self.args.device)
        narrow = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        adds_up = self.args.gradient_accumulation_steps > 1
        request = replace(options.request, seed=self.args.seed, autocast=narrow, accumulates=adds_up)
        if self.args.device.type == "cpu":  # Accelerate's loaders read one batch ahead
            request = replace(request, batches_ahead=1)
        example = options.example
        if example is None:
            found = [*self._longest(), *self._batches(EXAMPLES)]
            example = max(found, key=lambda batch: Batch.of(batch).elements, default=None)
        if example is None:
            raise TrainingError("the training data gave no batch")
        self.model.train()
        self.tuner = Tuner(request.decide(self.model, example, optimizer=memory))
        self.plan, self._delta = self.tuner.plan, None
        # The Trainer clips and logs the norm of the model's own parameters, in all its versions through this call.
        original, parameters = self.accelerator.clip_grad_norm_, list(self.tuner.parameters())
        self.accelerator.clip_grad_norm_ = lambda _, *given, **named: original(parameters, *given, **named)
        return self.tuner

    def _disarm(self) -> None:
        if self.tuner is None:
            return
        self._delta = self.tuner.delta()
        self.tuner.finish()
        del self.accelerator.clip_grad_norm_
        self.tuner, self._restored = None, None
        self.optimizer, self.lr_scheduler = None, None

    def _restore(self, folder: Path) -> int:
        if not (folder / FOLDER).is_dir():
            raise CheckpointError(
                f"{folder} holds no state of trady's ({FOLDER}/): it was not written by a Trainer with a budget"
            )
        checkpoint = load_checkpoint(folder / FOLDER)
        if "tuner" not in checkpoint.states:
            raise CheckpointError(f"{folder / FOLDER} is of no Trainer; name another one, or start again")
        state = checkpoint.states["tuner"]
        self._armed().load_state_dict({"tensors": dict(state.tensors), "meta": dict(state.meta)})
        return checkpoint.epoch

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.optimizer_cls_and_kwargs is not None:
            kind, settings = self.optimizer_cls_and_kwargs
        else:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if not known or {"params", "model", "optimizer_dict"} & set(settings):
            asked = getattr(self.args.optim, "value", self.args.optim)
            raise TrainingError(
                f"optim={asked!r} makes its optimizer from the whole model, and under a budget most of it does not "
                "train: choose adamw_torch, sgd or another one over parameters"
            )
        made: torch.optim.Optimizer = kind(groups, **settings)
        return made

    def _batches(self, count: int) -> list[dict[str, Any]]:
        """Return what the model's forward gets in the first batches, without a trace on the random numbers."""
        found = []
        with own_randomness():
            loader = self.get_train_dataloader()
            batches = iter(loader)
            for _ in range(count):
                samples, items = self.get_batch_samples(batches, 1, self.args.device)
                if not samples:
                    break
                found.append(self._forward_arguments(samples[0], items))
            getattr(loader, "end", lambda: None)()  # Accelerate's loaders are told that nobody reads on
        return found

    def _longest(self) -> list[dict[str, Any]]:
        """Return what the model's forward gets in a batch of the longest samples, where their lengths are known."""
        with own_randomness():
            loader = self.get_train_dataloader()
            data, size = loader.dataset, getattr(loader, "batch_size", None) or self.args.train_batch_size
            known = getattr(data, "column_names", None) or (list(data[0]) if isinstance(data, list) and data else [])
            column = next((name for name in ("length", "input_ids") if name in known), None)
            if column is None or not hasattr(data, "__getitem__"):
                return []
            values = [sample[column] for sample in data] if isinstance(data, list) else data[column]
            lengths = [value if isinstance(value, int) else len(value) for value in values]
            chosen = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:size]
            batch = loader.collate_fn([data[index] for index in chosen])
            return [self._forward_arguments(batch, None)]

    def _forward_arguments(self, inputs: Any, items: Any) -> dict[str, Any]:
        """Return what ``compute_loss``, whatever it is, would call the model with."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _CalledError(args, kwargs)

        hook = self.model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            self.compute_loss(self.model, dict(self._prepare_inputs(inputs)), num_items_in_batch=items)
        except _CalledError as call:
            if call.positional:
                raise ModelError(
                    "compute_loss calls the model with positional arguments: call it by keywords"
                ) from None
            return call.named
        finally:
            hook.remove()
        raise ModelError("compute_loss does not call the model: trady cannot see what it works on")


class TradyTrainer(TradyMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` that fine-tunes inside a memory budget; see :class:`TradyMixin`."""


class _CalledError(Exception):
    """The model's forward was called, which is all that was to be known."""

    def __init__(self, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.positional, self.named = positional, named


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Tells the trainer where its loop stands."""

    def __init__(self, trainer: TradyMixin) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.start_epoch(int((state.epoch or 0.0) + 1e-6))  # a whole number, but for rounding

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.drop_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step(state.global_step, state.max_steps, state.num_train_epochs)


@contextmanager
def _unnoticed_quantization(model: Any) -> Iterator[None]:
    """Hide that a model is quantised: the Trainer wants adapters there, and here its channels train beside it."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


def _own_loss(output: Any, _: None) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    if not isinstance(loss, Tensor) or loss.dim():
        raise TrainingError(
            "this policy measures gradients of the loss that the model returns, and it returns none: choose one that "
            "measures nothing (trady, trady+, dynamic-random), or give the batches labels"
        )
    return loss


def _refuse_wrappers(trainer: Any) -> None:
    args = trainer.args
    for asked, what, instead in (
        (trainer.is_deepspeed_enabled, "DeepSpeed", "plain or distributed data-parallel training"),
        (trainer.is_fsdp_enabled, "FSDP", "plain or distributed data-parallel training"),
        (args.n_gpu > 1, "DataParallel over several GPUs", "torchrun, or CUDA_VISIBLE_DEVICES with one of them"),
        (args.torch_compile, "torch_compile", "compiling the model after train()"),
        (args.neftune_noise_alpha is not None, "NEFTune, whose noise cannot be planned", "dropout"),
    ):
        if asked:
            raise ModelError(f"a memory budget does not work with {what}; take {instead}")
