"""The evolutionary search of MCUNetV3 (Lin et al. 2022, arXiv 2206.15472): the largest summed contribution that fits.

    maximise Σ_i gain[i, r_i]   with   Σ_i cost[i, r_i] ≤ budget

over one choice r_i for every layer, "not at all" among them. A population starts at random and keeps its best. Children
come from uniform crossover and mutation, and a child that costs too much loses layers at random until it fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trady.policies.evidence import Floats

Genomes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evolution:
    """Settings of the search.

    Attributes:
        population: Schemes in a generation.
        generations: Generations.
        survivors: Share of a generation that lives on and has children.
        mutation: Probability that a layer's choice is drawn again.
        seed: Of everything random.
    """

    population: int = 128
    generations: int = 100
    survivors: float = 0.25
    mutation: float = 0.1
    seed: int = 0

    def best(self, gains: Floats, costs: Genomes, budget: int) -> Genomes:
        """Search.

        Args:
            gains: What each choice contributes, ``[layers, choices]``; choice 0 is "not at all", gain 0.
            costs: What each choice takes, ``[layers, choices]``; choice 0 takes nothing.
            budget: What all may take together.

        Returns:
            The best choices that were seen, ``[layers]``; their cost fits.

        """
        layers, choices = gains.shape
        rng = np.random.Generator(np.random.PCG64(self.seed))
        rows = np.arange(layers)

        def gain(genomes: Genomes) -> Floats:
            total: Floats = gains[rows, genomes].sum(1)
            return total

        genomes = rng.integers(0, choices, (self.population, layers))
        parents_kept = max(2, int(self.population * self.survivors))
        genomes = _made_to_fit(genomes, gains, costs, budget, rng)
        for _ in range(self.generations):
            genomes = genomes[np.argsort(-gain(genomes), kind="stable")]
            parents = genomes[:parents_kept]
            pairs = rng.integers(0, parents_kept, (2, self.population - parents_kept))
            from_first = rng.random((pairs.shape[1], layers)) < 0.5
            children = np.where(from_first, parents[pairs[0]], parents[pairs[1]])
            changed = rng.random(children.shape) < self.mutation
            children = np.where(changed, rng.integers(0, choices, children.shape), children)
            genomes = np.concatenate([parents, _made_to_fit(children, gains, costs, budget, rng)])
        best: Genomes = genomes[int(np.argmax(gain(genomes)))]
        return best


def _made_to_fit(genomes: Genomes, gains: Floats, costs: Genomes, budget: int, rng: np.random.Generator) -> Genomes:
    """Remove choices that do not gain, then layers at random until the rest fits."""
    rows = np.arange(genomes.shape[1])
    genomes = np.where(gains[rows, genomes] > 0, genomes, 0)
    for genome in genomes:
        order = rng.permutation(len(rows))
        spent = int(costs[rows, genome].sum())
        for row in order.tolist():
            if spent <= budget:
                break
            spent -= int(costs[row, genome[row]])
            genome[row] = 0
    return genomes
