"""Asks a policy for channels and checks the answer, since users register policies of their own."""

from __future__ import annotations

from trady.channels.selection import Selection
from trady.errors import PolicyError
from trady.policies.base import Draw, Policy
from trady.policies.uniform import draw_uniformly


def draw_selection(policy: Policy, draw: Draw) -> Selection:
    """The channels that the policy selects, checked.

    Raises:
        PolicyError: When the answer is no :class:`Selection`, names a layer or channels that the
            model lacks, or costs more than the draw's capacity; names the policy and the layer.
        BudgetError: From a policy that cannot do with the capacity, such as ``full``.
    """
    return _checked(policy, draw, policy.select(draw))


def typical_selection(policy: Policy, draw: Draw) -> Selection:
    """A selection of the size that the policy's own will have: for plans, while nothing is measured.

    Errors are those of :func:`draw_selection`.
    """
    typical = getattr(policy, "typical", None)
    if typical is None:
        return draw_uniformly(draw, draw.pool, once=False)
    return _checked(policy, draw, typical(draw))


def _checked(policy: Policy, draw: Draw, selection: Selection) -> Selection:
    if not isinstance(selection, Selection):
        raise PolicyError(f"policy {policy.name!r} returned {type(selection).__name__}; return a trady.Selection")
    mistake = draw.table.mistake(selection)
    if mistake is not None:
        raise PolicyError(
            f"policy {policy.name!r} selected {mistake}; the layers of draw.table may train, which are not those that "
            "are frozen by hand or that max_step_flops leaves out"
        )
    unpriced = next((name for name in selection if name not in draw.costs), None)
    if unpriced is not None:
        raise PolicyError(f"policy {policy.name!r} selected layer {unpriced!r}, which has no cost here")
    spent = {name: draw.cost(name, len(channels), selection.output_count(name)) for name, channels in selection.items()}
    total = sum(spent.values())
    if draw.capacity is not None and spent and total > draw.capacity:
        costliest = max(spent, key=spent.__getitem__)
        raise PolicyError(
            f"policy {policy.name!r} selected channels that cost {total}, and {draw.capacity} is left; "
            f"layer {costliest!r} takes most, {spent[costliest]} for {len(selection[costliest])} channels"
        )
    return selection
