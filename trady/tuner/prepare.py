"""The two ways in: prepare a model, or plan what preparing would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trady.analysis.by_hand import Wish
from trady.planning.budget import Budget
from trady.planning.plan import Plan
from trady.planning.request import Request
from trady.policies import Policy
from trady.ranking.priors import Known
from trady.ranking.ranking import LayerRanking
from trady.tuner.full_device import warn_if_full
from trady.tuner.tuner import Tuner


def prepare(
    model: nn.Module,
    example: Any,
    *,
    budget: str | Budget | None = None,
    policy: str | Policy = "trady",
    ranking: LayerRanking | Known | None = None,
    head: str | Sequence[str] | None = "auto",
    seed: int = 0,
    plan: Plan | None = None,
    fuse: bool = True,
    recompute: str = "auto",
    fidelity: str = "exact",
    micro_batch: int | str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    train: Wish | None = None,
    freeze: Wish | None = None,
    calls_per_step: int = 1,
    accumulates: bool = False,
    autocast: torch.dtype | None = None,
    over_budget: str = "adapt",
    max_step_flops: str | float | None = None,
    batches_ahead: int = 0,
) -> Tuner:
    """Decide what trains inside a budget and arm the model for it.

    Args:
        model: Any module. Its classes, keys and printed form stay; its parameters outside the head are frozen.
        example: One batch as training will see it: a tensor, a tuple (positional arguments) or a mapping
            (keyword arguments). Only its shapes are read.
        budget: ``"300 MiB"`` or ``"peak:300 MiB"`` (a whole training step), ``"process:400 MiB"`` (all that the
            process has in memory: docs/budgets.md), ``"update:1 MiB"`` (what updating adds) or ``"elements:27946"``
            (B_mem of the paper). Only the policies ``head`` and ``full`` go without.
        policy: A registered policy or one of your own.
        ranking: Which layers are worth updating. Without one: the prior of this structure
            (:mod:`trady.ranking.priors`), or else what ``"online"`` asks for, to learn it in the first epoch, from
            the gradients that training computes anyway. ``"structural"`` guesses it from the layers' shapes.
        head: Modules that are always trained, outside the budget; ``"auto"`` is each weight layer that an output is
            made by and no other weight reads from, unless it is a language model's, which was trained before
            (:func:`trady.analysis.head.find_head`). The plan says which were found.
        seed: Seed of the draws.
        plan: A plan made before for a model of this structure: its budget, policy, pool, head and seed hold.
        fuse: Compute neighbouring calls together and overwrite what nobody reads again. Turn it off for a
            model whose forward takes another path from call to call.
        recompute: What the backward pass recomputes instead of saving it, where a segment of the model
            would save much (transformers). ``"auto"`` recomputes as little as a peak budget allows; under other
            budgets, as little as takes the peak to 1.5 times that of inference. ``"all"`` takes the least memory,
            ``"none"`` the least time.
        fidelity: How exactly smooth activations (GELU, SiLU, Mish) are differentiated where they are saved:
            ``"exact"``, or from a derivative in ``"8bit"`` or ``"4bit"`` (docs/fidelity.md).
        micro_batch: Samples of a forward and backward pass, where a step has several. Your loop cuts the batch and
            adds the gradients up; :func:`trady.finetune` does it by itself. ``"auto"`` is the largest chunk that
            the budget is possible with, ``"most"`` the largest with which nearly as many weights train as with any:
            ``tuner.plan.micro_batch``.
        loss: The loss of your loop on the example, from the model's output to a scalar: ``lambda output:
            F.mse_loss(output, target)``. Only a ``peak:`` budget asks what memory it takes; without it, the model's own
            loss where it gives one, or a cross entropy of its scores, is expected.
        train: Names or patterns (``"layer4*"``) of modules or parameters, or modules: channels of these layers alone
            are drawn. Without it, of all layers whose weight has ``requires_grad``.
        freeze: The same for layers that stay as they are. A head that is named trains in any case.
        calls_per_step: How often your loop calls the model before it runs backward(): 2 for a siamese network, 3 for
            triplets.
        accumulates: Whether your loop keeps gradients over a forward pass, to add several up.
        autocast: The dtype of your loop's ``torch.autocast``; without it, that of the autocast that is on now.
        over_budget: What happens before a forward pass that the plan does not cover and that would break a budget in
            bytes (longer sequences, more calls before backward(), gradients that were kept, autocast). ``"adapt"``:
            fewer channels train from then on; what cannot be helped so is refused. ``"refuse"``: a
            :class:`trady.errors.BudgetError`. ``"warn"``: a warning, and the pass runs.
        max_step_flops: What a step may take of the operations of a step of full fine-tuning, e.g. ``"0.6x"``. Channels
            are then drawn from the layers that the backward pass reaches within that (docs/budgets.md).
        batches_ahead: Batches that your loader holds on the model's device beside that of the step: 1 on a CPU, where
            Accelerate has prepared it.

    Returns:
        The tuner, with the channels of epoch 0 drawn.

    Raises:
        BudgetError: The budget or ``max_step_flops`` cannot be read, or is below the minimum.
        ModelError: The model cannot be traced or has nothing to update.
        PolicyError: There is no such policy, or it is given layers that ``max_step_flops`` leaves out.
        RankingError: The ranking is of another model.
        StateError: The model is prepared already.

    """
    asked = (budget, policy, ranking, head, seed, plan, fuse, recompute, fidelity, micro_batch, loss, train, freeze)
    loop = (calls_per_step, accumulates, autocast, over_budget, batches_ahead)
    request = Request(*asked, *loop, max_step_flops=max_step_flops)
    tuner = Tuner(request.decide(model, example))
    warn_if_full(tuner)
    return tuner


def plan(
    model: nn.Module,
    example: Any,
    *,
    budget: str | Budget | None = None,
    policy: str | Policy = "trady",
    ranking: LayerRanking | Known | None = None,
    head: str | Sequence[str] | None = "auto",
    seed: int = 0,
    fuse: bool = True,
    recompute: str = "auto",
    fidelity: str = "exact",
    micro_batch: int | str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    train: Wish | None = None,
    freeze: Wish | None = None,
    calls_per_step: int = 1,
    accumulates: bool = False,
    autocast: torch.dtype | None = None,
    over_budget: str = "adapt",
    max_step_flops: str | float | None = None,
    batches_ahead: int = 0,
) -> Plan:
    """Say what :func:`prepare` would do, without touching the model or allocating a step.

    The model may lie on the meta device. Arguments and errors are those of :func:`prepare`.
    """
    asked = (budget, policy, ranking, head, seed, None, fuse, recompute, fidelity, micro_batch, loss, train, freeze)
    loop = (calls_per_step, accumulates, autocast, over_budget, batches_ahead)
    request = Request(*asked, *loop, max_step_flops=max_step_flops)
    decision = request.decide(model, example)
    return decision.plan(decision.start)
