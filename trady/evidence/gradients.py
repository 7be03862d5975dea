"""Measures read off weights and weight gradients: norms, squared gradients, Fisher information."""

from __future__ import annotations

import torch

from trady.evidence.fisher_information import fisher_information
from trady.evidence.measures import MeasureContext, Measured
from trady.evidence.sweeps import squared_norm
from trady.ops.selected import channel_major
from trady.policies.evidence import Floats


class SquaredGradients:
    """``gradients``: mean over the batches of ‖∂L/∂W[:, c]‖₂², the squared norm of a stochastic gradient."""

    needs_batches = True

    def __call__(self, bench: MeasureContext) -> Measured:
        """Measure in sweeps."""
        found = bench.sweeper(0).mean(bench.batches, squared_norm)
        return Measured(found.values, batches=found.batches)


class FisherInformation:
    """``fisher``: ½ · mean over samples of (Σ_positions a_c · ∂L/∂a_c)², a_c the channel's input activations.

    The activation Fisher information of TinyTrain (arXiv 2307.09988), for the input of a layer instead of its
    output: :mod:`trady.evidence.fisher_information`.
    """

    needs_batches = True

    def __call__(self, bench: MeasureContext) -> Measured:
        """Measure in sweeps; of every channel one number a sample is kept beside its activations."""
        found = fisher_information(bench.sweeper(bench.armed.table.batch), bench.batches)
        return Measured(found.values, batches=found.batches)


class WeightNorms:
    """``weights``: ‖W[:, c]‖₂ of the weights as they are when the model is prepared."""

    needs_batches = False

    def __call__(self, bench: MeasureContext) -> Measured:
        """Read the weights."""
        bench.armed.write_back()
        norms: dict[str, Floats] = {}
        for layer in bench.armed.table:
            rows = channel_major(bench.armed.layers[layer.name].truth.dense(), layer.kind, layer.groups)
            norm = torch.linalg.vector_norm(rows, dim=tuple(range(2, rows.dim())), dtype=torch.float64)
            norms[layer.name] = norm.flatten().cpu().numpy()
        return Measured(norms)
