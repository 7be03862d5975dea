"""What the loop trains: a model armed by trady, or a plain one for comparison. The loop is the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from trady.errors import ModelError
from trady.memory import Ledger, measure
from trady.ops.quantized import is_quantized
from trady.process.ranks import Traffic, average_gradients_, processes
from trady.ranking.ranking import LayerRanking
from trady.records.translated import in_our_words
from trady.training.batch import Loss, split_batch
from trady.training.state import State
from trady.tuner.full_device import out_of_memory
from trady.tuner.gradients import channel_limit
from trady.tuner.parts import parts_of
from trady.tuner.tuner import Tuner


@dataclass(frozen=True)
class Trained:
    """What trains now.

    Attributes:
        channels: Number of selected input channels; 0 where nothing is selected by channel.
        digest: Digest of the selection; empty where there is none.
        trainable_parameters: Elements that the optimizer updates.
    """

    channels: int
    digest: str
    trainable_parameters: int


class Trainer(Protocol):
    """Everything about a run that depends on how the model is trained."""

    model: nn.Module
    #: Samples a forward and backward pass; ``None`` is the full batch.
    micro_batch: int | None

    def plan(self) -> Mapping[str, Any]:
        """Return what is decided so far."""

    def ranking(self) -> LayerRanking | None:
        """Return the layer ranking in use, if there is one."""

    def parts(self, batch: Any) -> Iterator[tuple[Any, torch.Tensor, float]]:
        """Cut a batch into parts for a pass each: inputs, labels, share of the samples; in ``no_grad`` for inference.

        Raises:
            BudgetError: Not even one sample fits in the budget.
        """

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer updates."""

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Make the optimizer follow the trainer's parameters."""

    def average(self) -> None:
        """Average the gradients of a step over the processes, where that is still to be done."""

    def channel_limit(self, ratio: float | str | None) -> float | None:
        """Return the number that a limit of a channel's gradient means now."""

    def clip(self, ratio: float | str | None, max_norm: float | None) -> float:
        """Clip the gradients; return their norm before."""

    @property
    def observation_due(self) -> bool:
        """Whether something has to be measured before the next epoch starts."""

    def observe(self, batches: Iterable[Any], loss: Loss, progress: Callable[[int, int], None]) -> None:
        """Measure it on pairs (inputs, labels); report the passes done, and those of the batches so far."""

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch."""

    def redraw(self) -> None:
        """Called between two steps of an epoch, where it has several draws."""

    def set_mode(self, *, training: bool) -> None:
        """Put the model in training or evaluation mode."""

    def draw(self) -> Trained:
        """Return what trains now."""

    def out_of_memory(self, inputs: Any, error: BaseException) -> BaseException:
        """Return what to raise where the memory of a GPU ran out on inputs."""

    def capture(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward and backward pass as one that is replayed until the next draw, where it can be."""

    def ledger(self, step: Callable[[], None], *, inference: bool = False) -> Ledger:
        """Run one training step and measure it."""

    def state(self) -> State:
        """Return all that is needed to resume."""

    def load_state(self, state: State) -> None:
        """Resume from a state."""

    def delta(self) -> Mapping[str, torch.Tensor] | None:
        """Return the changed channels; ``None`` where everything may have changed."""

    def untouched(self) -> AbstractContextManager[None]:
        """Context in which the model runs as its author wrote it."""

    def finish(self) -> nn.Module:
        """Return the plain model."""


class TunerTrainer:
    """A model that a :class:`trady.Tuner` has armed."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner
        self.model = tuner.model
        self.micro_batch = tuner.micro_batch
        self._table = tuner.plan.table

    def plan(self) -> Mapping[str, Any]:
        """Return the tuner's plan."""
        return self.tuner.plan.to_json()

    def ranking(self) -> LayerRanking | None:
        """Return the ranking given or learnt."""
        return self.tuner.ranking

    def parts(self, batch: Any) -> Iterator[tuple[Any, torch.Tensor, float]]:
        """Let the tuner cut it so that the budget is kept."""
        return cast("Iterator[tuple[Any, torch.Tensor, float]]", self.tuner.micro_batches(*split_batch(batch)))

    def parameters(self) -> list[nn.Parameter]:
        """Return the compact parameters and the head's."""
        return list(self.tuner.parameters())

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let the tuner see the optimizer's steps."""
        return self.tuner.attach(optimizer)

    def average(self) -> None:
        """Do nothing: the tuner has done it in the last backward pass."""

    def channel_limit(self, ratio: float | str | None) -> float | None:
        """Go by the share of the weights that trains."""
        return channel_limit(ratio, self._table, self.tuner.selection)

    def clip(self, ratio: float | str | None, max_norm: float | None) -> float:
        """Clip each channel against its own weights, the head by its norm."""
        return self.tuner.clip_gradients(ratio, max_norm)

    @property
    def observation_due(self) -> bool:
        """Ask the tuner."""
        return self.tuner.observation_due

    def observe(self, batches: Iterable[Any], loss: Loss, progress: Callable[[int, int], None]) -> None:
        """Let the tuner measure what its policy draws from."""
        self.tuner.observe(batches, loss, progress=progress)

    def start_epoch(self, epoch: int) -> None:
        """Draw new channels."""
        self.tuner.resample(epoch)

    def redraw(self) -> None:
        """Draw other channels."""
        self.tuner.redraw()

    def set_mode(self, *, training: bool) -> None:
        """Set the mode; an armed model keeps its normalisation statistics fixed in both."""
        self.model.train(training)

    def draw(self) -> Trained:
        """Return the selection in numbers."""
        selection = self.tuner.selection
        return Trained(selection.count, selection.digest, sum(p.numel() for p in self.parameters()))

    def out_of_memory(self, inputs: Any, error: BaseException) -> BaseException:
        """Say what was predicted, what is free, and what would fit."""
        return out_of_memory(self.tuner, inputs, error)

    def capture(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Let the tuner record it as a CUDA graph."""
        return self.tuner.capture(step)

    def ledger(self, step: Callable[[], None], *, inference: bool = False) -> Ledger:
        """Measure a step with the tuner's own labels."""
        return self.tuner.ledger(step, inference=inference)

    def state(self) -> State:
        """Return the head, the changed weights, the selection and the ranking so far."""
        given = self.tuner.state_dict(lazily=True)
        return State(given["tensors"], given["meta"])

    def load_state(self, state: State) -> None:
        """Restore the tuner."""
        self.tuner.load_state_dict({"tensors": dict(state.tensors), "meta": dict(state.meta)})

    def delta(self) -> Mapping[str, torch.Tensor] | None:
        """Return the changed channels and the head, each copied when it is asked for."""
        return self.tuner.changed

    def untouched(self) -> AbstractContextManager[None]:
        """Leave the model to PyTorch."""
        return self.tuner.untouched()

    def finish(self) -> nn.Module:
        """Disarm the model."""
        return self.tuner.finish()


class FullTrainer:
    """Plain PyTorch: every parameter trains that is not frozen by hand; the statistics of normalisations are fixed."""

    def __init__(self, model: nn.Module, micro_batch: int | None = None, frozen: Collection[int] = ()) -> None:
        self.model, self.micro_batch, self._traffic = model, micro_batch, Traffic()
        if (stored := next((name for name, p in model.named_parameters() if is_quantized(p)), None)) is not None:
            raise ModelError(
                f"plain full fine-tuning trains full weights, and {stored} is stored quantised: only channels of it "
                "can train. Take a policy with a budget, such as trady, or call trady.dequantize(model) first"
            )
        self._frozen_before = [p for p in model.parameters() if not p.requires_grad]
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in frozen)
        if not self.parameters():
            raise ModelError("the model has no parameters to train, or all of them are frozen by hand")

    def plan(self) -> Mapping[str, Any]:
        """Return the number of parameters: there is nothing to decide."""
        trainable = self.draw().trainable_parameters
        return {"policy": "full", "trainable_parameters": trainable, "micro_batch": self.micro_batch}

    def ranking(self) -> LayerRanking | None:
        """Return nothing: every layer trains."""
        return None

    def parts(self, batch: Any) -> Iterator[tuple[Any, torch.Tensor, float]]:
        """Cut it into micro-batches, where these are asked for."""
        return cast("Iterator[tuple[Any, torch.Tensor, float]]", parts_of(split_batch(batch), self.micro_batch))

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer as it is."""
        return optimizer

    def average(self) -> None:
        """Average all gradients, in a few buffers."""
        if processes() > 1:
            self._traffic += average_gradients_(self.parameters())

    def channel_limit(self, ratio: float | str | None) -> None:
        """Channels are not clipped."""

    def clip(self, ratio: float | str | None, max_norm: float | None) -> float:
        """Clip all gradients together by their norm, as plain fine-tuning usually does."""
        limit = math.inf if max_norm is None else max_norm
        return float(torch.nn.utils.clip_grad_norm_(self.parameters(), limit))

    @property
    def observation_due(self) -> bool:
        """Nothing is chosen, so nothing is measured."""
        return False

    def observe(self, batches: Iterable[Any], loss: Loss, progress: Callable[[int, int], None]) -> None:
        """Nothing is measured."""

    def start_epoch(self, epoch: int) -> None:
        """Nothing changes between epochs."""

    def redraw(self) -> None:
        """Nothing changes within an epoch."""

    def set_mode(self, *, training: bool) -> None:
        """Set the mode, with the statistics of batch normalisation fixed as under a tuner.

        So the methods are compared in the same mode. It is also the stronger baseline: in a few hundred small steps
        running statistics do not settle (EfficientNet-Lite0 on 1 200 images: 39 % against 79 %).
        """
        self.model.train(training)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.eval()

    def draw(self) -> Trained:
        """Return the number of parameters."""
        return Trained(0, "", sum(p.numel() for p in self.parameters()))

    def out_of_memory(self, inputs: Any, error: BaseException) -> BaseException:
        """Nothing was predicted."""
        return in_our_words(error) or error

    def capture(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return it as it is."""
        return step

    def ledger(self, step: Callable[[], None], *, inference: bool = False) -> Ledger:
        """Measure a step."""
        before = self._traffic
        ledger = measure(step, model=self.model, inference=inference)
        return ledger.averaging(self._traffic - before)

    def state(self) -> State:
        """Return all weights and buffers."""
        return State(dict(self.model.state_dict()))

    def load_state(self, state: State) -> None:
        """Load all weights and buffers."""
        self.model.load_state_dict(dict(state.tensors))

    def delta(self) -> Mapping[str, torch.Tensor] | None:
        """Return nothing: every weight changes."""
        return None

    def untouched(self) -> AbstractContextManager[None]:
        """Nothing was touched."""
        return nullcontext()

    def finish(self) -> nn.Module:
        """Restore the parameters' flags and drop their gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None
        for parameter in self._frozen_before:
            parameter.requires_grad_(False)
        return self.model
