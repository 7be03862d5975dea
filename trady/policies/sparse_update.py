"""Sparse update (MCUNetV3, Lin et al. 2022, arXiv 2206.15472): a searched scheme, the largest-norm channels first.

    selection = for each layer i of the scheme the round(r_i · channels) input channels with the largest ‖W[:, c]‖₂

W are the pretrained weights, so the same channels train in every epoch. What is left of the budget stays unused, and a
scheme that does not fit in the budget is refused, not cut. The paper also trains the biases of the last layers; biases
do not train here.

What it spends that TraDy does not: a search for the scheme beforehand, for this network and budget (``trady search``).
It trains every candidate layer by itself for a while, and an evolutionary search then combines them into a scheme.
"""

from __future__ import annotations

import json

import numpy as np

from trady.channels.selection import Selection
from trady.errors import BudgetError, PolicyError
from trady.policies.base import Draw
from trady.policies.evidence import Needs
from trady.policies.registry import register_policy
from trady.policies.schemes import Scheme


class SparseUpdate:
    """The channels of a scheme.

    Args:
        scheme: Which layers, and which share of each; ``Scheme.load(path)`` reads one.
    """

    name = "sparse-update"
    uses_ranking = False
    whole = True
    names_layers = True
    needs = Needs(("weights",))

    def __init__(self, scheme: Scheme | None = None) -> None:
        self.scheme = scheme
        self.options = "" if scheme is None else json.dumps(scheme.to_json(), sort_keys=True)

    def select(self, draw: Draw) -> Selection:
        """Take the largest-norm channels of the scheme's layers.

        Raises:
            BudgetError: The scheme does not fit; the message says what it needs.
            PolicyError: There is no scheme, or it is of another network.

        """
        norms, counts = draw.measured("weights"), self._counts(draw)
        return Selection({n: np.argsort(-norms[n], kind="stable")[:count] for n, count in counts.items()})

    def typical(self, draw: Draw) -> Selection:
        """Take the first channels instead, as many: the weights are not known yet, and the cost is the same."""
        return Selection({name: np.arange(count) for name, count in self._counts(draw).items()})

    def check_scheme(self) -> Scheme:
        """Return the scheme.

        Raises:
            PolicyError: There is none; it says how to get one.

        """
        if self.scheme is None:
            raise PolicyError(
                "policy 'sparse-update' needs a scheme: type policy=SparseUpdate(Scheme.load(path)), or "
                "--policy sparse-update --scheme FILE; trady search MODEL DATASET --budget elements:N --out FILE "
                "finds one"
            )
        return self.scheme

    def _counts(self, draw: Draw) -> dict[str, int]:
        scheme = self.check_scheme()
        counts = scheme.counts(draw.table)
        needed = sum(count * draw.costs[name] for name, count in counts.items())
        if draw.capacity is not None and needed > draw.capacity:
            raise BudgetError(
                f"the scheme needs {needed} for its channels, and the budget leaves {draw.capacity} (in the budget's "
                f"own unit; {scheme.elements(draw.table)} elements for one sample); give it that, or search a "
                "smaller scheme with trady search"
            )
        return counts


register_policy(SparseUpdate())
