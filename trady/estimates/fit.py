"""Will it fit? What a training step takes by any method, and the largest batch and longest sequence in a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trady.errors import BudgetError, ModelError
from trady.estimates.adapters import ALL, RANK
from trady.estimates.estimator import Asked, Estimator, Progress
from trady.estimates.methods import TRADY, Settings, read_method
from trady.estimates.report import FitReport, MethodFit
from trady.estimates.subject import Subject, subject_of_module, subject_of_name
from trady.memory.workspaces import expected_workspace_bytes
from trady.model.untouched import untouched
from trady.planning.budget import parse_budget
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.training.models.from_config import read_dtype
from trady.training.models.from_function import find_function
from trady.training.optimizers import OptimizerFactory, memory_of

#: What is compared where nobody says.
USUAL = (
    "full", "checkpoint", "lora", "lora-checkpoint", "qlora", "qlora-checkpoint", "bitfit", "head", "last-2", TRADY,
)  # fmt: skip

#: Samples of a step where nobody says.
USUAL_BATCH = 8

DEVICES = ("cpu", "cuda")

#: Optimizers by name; what they take is measured on a few small parameters.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "sgd-momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
}


def fit(
    model: nn.Module | str,
    example: Any = None,
    *,
    methods: Sequence[str] = USUAL,
    memory: str | int | None = None,
    budgets: Sequence[str | int] = (),
    batch_size: int | None = None,
    length: int | None = None,
    image_size: int | None = None,
    classes: int = 10,
    dtype: str | None = None,
    optimizer: str | OptimizerFactory = "adamw",
    autocast: str | None = None,
    loss: Callable[[Any], Tensor] | str | None = None,
    rank: int = RANK,
    targets: str | Sequence[str] = ALL,
    blocks: Sequence[str] = (),
    device: str | None = None,
    seed: int = 0,
    done: Callable[[FitReport], object] | None = None,
    at: Progress | None = None,
) -> FitReport:
    """Tell what a training step of a model takes, method by method, without weights and without running it.

    Every method is applied to a copy of the model without memory, and a step of it is followed on shapes: forward pass,
    backward pass and an update with the optimizer's state in place. So the figures are those that
    :func:`trady.measure` finds in a real step on a CPU (docs/fit.md).

    Args:
        model: A module, with ``example``; or a name: a folder, a ``config.json`` or a name on the Hugging Face Hub
            (its weights are not looked for), ``package.module:function``, or ``efficientnet-lite0``.
        example: One batch for a module: a tensor, a tuple or a mapping. Its samples and tokens are cut and repeated.
        methods: ``full``, ``checkpoint``, ``lora``, ``lora-checkpoint``, ``qlora``, ``qlora-checkpoint``,
            ``qlora-8bit``, ``qlora-8bit-checkpoint``, ``bitfit``, ``head``, ``last-N`` (the last N blocks) and
            ``trady`` (in the smallest budget that is possible, and in one for 2 % of the channels of every layer).
        memory: What a step may take, such as ``"16GiB"``: the largest batch and the longest sequence are looked for,
            and TraDy is planned in it as well.
        budgets: ``peak:`` budgets that TraDy is planned in too.
        batch_size: Samples of a step; of the example by default, else 8.
        length: Tokens of a sequence; of the example by default, else 512 or as many as the model takes.
        image_size: Height and width of images; the model's own by default.
        classes: Outputs of a head that is made new.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the model's own by default.
        optimizer: ``sgd``, ``sgd-momentum``, ``adam``, ``adamw``, ``adafactor``, or a function that makes one of
            parameters.
        autocast: ``bfloat16`` or ``float16``, what forward passes compute in under ``torch.autocast``.
        loss: What a step makes of the model's output, a scalar, or ``package.module:function`` that computes it; for
            models whose output is neither a loss nor class scores. It makes its labels of the output, whose samples and
            tokens are those of the step that is asked about. Without it, the loss that the model returns, else a cross
            entropy.
        rank: Of adapters.
        targets: Where adapters stand: ``"all"`` layers but the head, ``"peft"`` (its own choice for this type of
            model), or names of layers such as ``("q_proj", "v_proj")``.
        blocks: Class names of the blocks that are checkpointed and counted by ``last-N``; found by default.
        device: ``cpu`` or ``cuda``: whose default of ``foreach`` the optimizer steps by, and whose cuBLAS keeps
            workspaces. By default ``cuda`` where there is one.
        seed: Of token ids.
        done: Called after each method, with the report as far as it is.
        at: Told what is under way.

    Returns:
        A row for each method; one that this model has nothing for says so in ``refused``.

    Raises:
        ModelError: There is no such model, method or loss, or the model cannot run on its batch.
        BudgetError: The memory or a budget cannot be read.

    """
    known = [read_method(name) for name in methods if name != TRADY]
    limits = [_bytes(text, "budgets") for text in budgets]
    memory_bytes = None if memory is None else _bytes(memory, "memory")
    settings = Settings(rank, targets, tuple(blocks))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    taken = _taken(optimizer, device)
    computed = _read_loss(loss)
    for name, number in (("batch_size", batch_size), ("length", length), ("image_size", image_size)):
        if number is not None and number < 1:
            raise ModelError(f"{name} is {number}; it is at least 1")
    if isinstance(model, str):
        subject = subject_of_name(
            model,
            classes=classes,
            batch_size=batch_size or USUAL_BATCH,
            length=length,
            image_size=image_size,
            dtype=dtype,
            seed=seed,
        )
    elif isinstance(model, nn.Module):
        subject = subject_of_module(model, example, dtype, batch_size, length)
    else:
        raise ModelError(f"model is a {type(model).__name__}; it is a torch.nn.Module or the name of one")
    if memory_bytes is not None and TRADY in methods and memory_bytes not in limits:
        limits.append(memory_bytes)
    report = _empty(subject, optimizer, autocast, device, memory_bytes)
    rows: list[MethodFit] = []

    def add(row: MethodFit) -> None:
        rows.append(row)
        if done is not None:
            done(replace(report, rows=tuple(rows), complete=False))

    def tell(what: str) -> None:
        if at is not None:
            at(what)

    kept = expected_workspace_bytes(device)
    asked = Asked(taken, memory_bytes, read_dtype(autocast), settings, computed, kept)
    with untouched(subject.model, subject.bare, watches=False):
        tell("tracing")
        estimator = Estimator(subject, asked)
        for method in known:
            add(estimator.row(method, tell))
        if TRADY in methods:
            for row in estimator.smallest_trady(tell):
                add(row)
        for limit in limits:
            add(estimator.trady_within(limit, tell))
    return replace(report, rows=tuple(rows))


def _bytes(text: str | int, name: str) -> int:
    if isinstance(text, int):
        if text < 1:
            raise BudgetError(f"{name} is {text}; it is a number of bytes above 0, or a text such as '16GiB'")
        return text
    budget = parse_budget(text)
    if (peak := budget.peak_bytes) is None:
        raise BudgetError(f"{name} is {text}; it is what a whole step may take, such as 16GiB")
    return peak


def _read_loss(loss: Callable[[Any], Tensor] | str | None) -> Callable[[Any], Tensor] | None:
    found: Any = find_function(loss) if isinstance(loss, str) else loss
    if found is not None and not callable(found):
        raise ModelError(
            f"loss is a {type(found).__name__}; it is a function of the model's output, or the name of one"
        )
    return cast("Callable[[Any], Tensor] | None", found)


def _taken(optimizer: str | OptimizerFactory, device: str) -> OptimizerMemory:
    """Measure what an optimizer takes, stepping as by default on a device that need not be there."""
    if device not in DEVICES:
        raise ModelError(f"device {device!r} is not known; type one of {', '.join(DEVICES)}")
    if not isinstance(optimizer, str):
        return memory_of(optimizer, torch.device("cpu"))
    if optimizer not in OPTIMIZERS:
        raise ModelError(f"no optimizer {optimizer!r}; there are {', '.join(OPTIMIZERS)}")
    make = OPTIMIZERS[optimizer]
    foreach = device == "cuda"
    return memory_of(lambda parameters: make(parameters, lr=1e-3, foreach=foreach), torch.device("cpu"))


def _empty(
    subject: Subject, optimizer: str | OptimizerFactory, autocast: str | None, device: str, memory: int | None
) -> FitReport:
    weights = [*subject.bare.parameters(), *subject.bare.buffers()]
    return FitReport(
        model=subject.name,
        parameters=sum(parameter.numel() for parameter in subject.bare.parameters()),
        weight_bytes=sum(tensor.nbytes for tensor in weights),
        dtype=str(subject.dtype).removeprefix("torch."),
        batch_size=subject.batch_size,
        length=subject.length,
        image_size=subject.image_size,
        optimizer=optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "of your own"),
        autocast=autocast,
        device=device,
        memory_bytes=memory,
    )
