"""What ``plan.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trady.channels.cost import Cost, Sparsity
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable, FrozenLayer, Layer
from trady.errors import CheckpointError
from trady.planning.step_flops import StepFlops
from trady.records.schema import Natural, Positive
from trady.records.versioned import Format

FORMAT = Format("trady-plan", "plan", CheckpointError, "make one with trady.plan(...).save(path)")


@dataclass(frozen=True)
class PlanRecord:
    """The entries of a plan's file, as :class:`trady.planning.plan.Plan` explains them; later ones have defaults."""

    model: str
    budget: str | None
    policy: str
    seed: int
    layers: tuple[Layer, ...]
    frozen: tuple[FrozenLayer, ...]
    batch: Positive
    element_bytes: Positive
    weight_element_bytes: Positive
    parameters: Natural
    pool: tuple[str, ...]
    ranking: str
    head: tuple[str, ...]
    head_parameters: Natural
    selection: Mapping[str, Any]
    cost: Cost
    predicted_peak_bytes: Natural | None
    least_peak_bytes: Natural | None
    recomputed: tuple[str, ...] = ()
    recomputable: Natural = 0
    recomputed_share: float = 0.0
    fidelity: str = "exact"
    sparsity: Sparsity | None = None
    predicted_parts: Mapping[str, Natural] = field(default_factory=dict)
    micro_batch: Positive | None = None
    measured_on: str = ""
    needs: tuple[str, ...] = ()
    needs_each_epoch: bool = False
    observed: bool = True
    held: tuple[str, ...] = ()
    read_ahead_bytes: Natural = 0
    predicted_phases: Mapping[str, Natural] = field(default_factory=dict)
    process: Mapping[str, Any] | None = None
    predicted_process_bytes: Natural | None = None
    step: StepFlops | None = None

    @property
    def table(self) -> ChannelTable:
        """The layers.

        Raises:
            ValueError: Two have the same name, or a size is not possible.
        """
        table = ChannelTable(
            self.layers, self.frozen, self.batch, self.element_bytes, self.weight_element_bytes, self.parameters
        )
        table.check_sizes()
        return table

    def drawn(self, table: ChannelTable) -> Selection:
        """The selection.

        Raises:
            ValueError: It is damaged, or holds what the table does not have.
        """
        selection = Selection.from_json(self.selection)
        if (mistake := table.mistake(selection)) is not None:
            raise ValueError(f"it selects {mistake}")
        return selection
