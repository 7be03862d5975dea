"""Watches one training step: its storages, modules, autograd and optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils._pytree import tree_leaves

from trady.memory.inference import inference_peak
from trady.memory.live import LiveBytes, Storage
from trady.memory.modules import ModuleStack
from trady.memory.saved import OperationNames, saved_tensors
from trady.memory.workspaces import workspace_bytes
from trady.model.parameters import own_parameters
from trady.ops.channel_gradient import ChannelGradient

#: What a peak is made of, in the order of reports.
PARTS = (
    "weights",
    "compact parameters",
    "inputs",
    "saved activations",
    "gradients",
    "compact gradients",
    "optimizer state",
    "temporaries",
    "workspaces",
)

Saver = tuple[nn.Module | None, str, str, str]


class Recorder:
    """Records a training step inside ``with``; its methods are called afterwards.

    Args:
        model: The model, if it is known.
        compact: Leaf tensors trained in place of channels of the model's weights.
        early: Optimizers that update before their ``step()``.

    Attributes:
        remarks: What could not be measured, and why.
        allocator_peak_bytes: On CUDA, the allocator's peak.
    """

    def __init__(
        self,
        model: nn.Module | None,
        compact: Iterable[torch.Tensor],
        early: Iterable[torch.optim.Optimizer] = (),
    ) -> None:
        self.remarks: list[str] = []
        self.allocator_peak_bytes: int | None = None
        self._live = LiveBytes()
        self._modules = ModuleStack(model, self._adopt, self._batch, self._live.unseen)
        self._operations = OperationNames()
        self._weights: dict[nn.Module, list[Storage]] = {}
        self._savers: list[tuple[Saver, Storage]] = []
        self._compact = {id(tensor): tensor for tensor in compact}
        self._early = list(early)
        self._watched: set[int] = set()
        self._saved_remarks: list[str] = []
        self._device: str | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        with ExitStack() as stack:
            self._stack = stack
            for tensor in self._compact.values():
                self._live.register(tensor, "compact parameters", since_start=True)
                self._watch_gradient(tensor)
            if self._modules.model is not None:
                self._adopt(self._modules.model)
            for optimizer in self._early:
                self._optimizer_stepped(optimizer)
            stack.callback(optimizers.register_optimizer_step_pre_hook(self._optimizer_steps).remove)
            stack.callback(optimizers.register_optimizer_step_post_hook(self._optimizer_stepped).remove)
            stack.enter_context(self._modules)
            # The global hooks here tell a module from its torch.compile wrapper, so this warning does not apply.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            self._saved_remarks = stack.enter_context(saved_tensors(self._saved))
            stack.enter_context(self._operations)
            if torch.cuda.is_initialized():
                for index in range(torch.cuda.device_count()):
                    torch.cuda.reset_peak_memory_stats(index)
            stack.enter_context(self._live)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        if self._modules.model is not None:
            self._gradients(own_parameters(self._modules.model))
        self._gradients(self._compact.values())
        self._live.forget()
        self._conclude()

    def inference_peak(self, untouched: Callable[[], AbstractContextManager[object]]) -> int | None:
        """The peak of an inference pass on the step's batch; ``None``, with a remark, if that is not possible."""
        model, call = self._modules.model, self._modules.call
        if model is None:
            return None
        if call is None:
            self.remarks.append("no inference peak: the step did not call the model itself")
            return None
        try:
            return inference_peak(model, call, device=self._device, untouched=untouched) + self.workspace_bytes
        except Exception as problem:
            self.remarks.append(f"no inference peak: the model raised {type(problem).__name__}: {problem}")
            return None

    def peak(self) -> tuple[int, dict[str, int]]:
        """The highest bytes of the step, and its parts."""
        highest, moment = self._live.highest(self._counts)
        parts: dict[str, int] = {}
        for storage in filter(self._counts, self._live.log):
            if storage.alive_at(moment):
                part = storage.category or ("saved activations" if storage.saved else "temporaries")
                parts[part] = parts.get(part, 0) + storage.nbytes
        if workspaces := self.workspace_bytes:
            parts["workspaces"] = workspaces
        return highest + workspaces, parts

    @property
    def workspace_bytes(self) -> int:
        """What libraries keep beside tensors, on the device of the step (:mod:`trady.memory.workspaces`)."""
        return 0 if self._device is None else workspace_bytes(torch.device(self._device))

    def highest(self, *categories: str) -> int:
        """The most bytes that storages of these categories took at one time."""
        return self._live.highest(lambda s: s.category in categories and self._counts(s))[0]

    def weight_bytes(self) -> int:
        """Parameters and buffers of the model; without a model, all that optimizers stepped."""
        model = self._modules.model
        if model is None:
            return self.highest("weights")
        return sum(storage.nbytes for storage in self._weights[model] if self._counts(storage))

    def savers(self) -> Iterator[tuple[tuple[str, str, str], int]]:
        """Layer, operation and kind of every storage saved, and its bytes."""
        for (root, layer, operation, kind), storage in self._savers:
            if storage.category not in ("weights", "compact parameters") and self._counts(storage):
                yield (self._modules.spell(root, layer), operation, kind), storage.nbytes

    def _conclude(self) -> None:
        model = self._modules.model
        devices = set() if model is None else {storage.device for storage in self._weights.get(model, ())}
        if len(devices) == 1:  # tensors elsewhere, such as a batch in host memory, are not counted
            self._device = devices.pop()
        self.remarks += self._saved_remarks
        if model is None:
            self.remarks.append("the step called no module with parameters: there is no model to compare with")
        on_cuda = self._device in (None, "cuda")
        if on_cuda and torch.cuda.is_initialized():
            indices = range(torch.cuda.device_count())
            self.allocator_peak_bytes = sum(torch.cuda.max_memory_allocated(index) for index in indices)

    def _counts(self, storage: Storage) -> bool:
        return self._device in (None, storage.device)

    def _adopt(self, module: nn.Module) -> None:
        """Register a module's weights and gradients, and watch for new gradients."""
        parameters = list(own_parameters(module))
        weights = [*parameters, *module.buffers()]
        self._weights[module] = self._live.register(weights, "weights", since_start=True)
        self._gradients(parameters)
        for parameter in parameters:
            self._watch_gradient(parameter)

    def _batch(self, tensors: list[torch.Tensor]) -> None:
        self._live.register(tensors, "inputs")

    def _watch_gradient(self, leaf: torch.Tensor) -> None:
        """See the gradient as soon as it exists: an update inside the backward pass frees it at once."""
        # What an armed model shows as a parameter that trains is none for autograd: its channels are watched.
        asked: Any = torch.Tensor
        if id(leaf) in self._watched or not (asked.is_leaf.__get__(leaf) and asked.requires_grad.__get__(leaf)):
            return
        self._watched.add(id(leaf))
        see: Any = leaf.register_post_accumulate_grad_hook
        handle = see(lambda owner: self._gradients((owner,)))
        self._stack.callback(handle.remove)
        hooks: Any = leaf._post_accumulate_grad_hooks
        for key in [key for key in hooks if key != handle.id]:  # an updating hook must run after this one
            hooks[key] = hooks.pop(key)

    def _gradients(self, owners: Iterable[torch.Tensor]) -> None:
        for owner in owners:
            if owner.grad is not None and not isinstance(owner.grad, ChannelGradient):  # its channels have owners too
                category = "compact gradients" if id(owner) in self._compact else "gradients"
                self._live.register(owner.grad, category, since_start=True)

    def _optimizer_steps(self, optimizer: optimizers.Optimizer, *_: object) -> None:
        owners = [owner for group in optimizer.param_groups for owner in group["params"]]
        self._live.register(owners, "weights", since_start=True)
        self._gradients(owners)
        self._optimizer_stepped(optimizer)

    def _optimizer_stepped(self, optimizer: optimizers.Optimizer, *_: object) -> None:
        state = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]
        self._live.register(state, "optimizer state", since_start=True)

    def _saved(self, tensor: torch.Tensor, kind: str, frame: Any) -> None:
        for storage in self._live.register(tensor):
            if not storage.saved:
                storage.saved = True
                saver = (*self._modules.layer(), self._operations.name(frame), kind)
                self._savers.append((saver, storage))
