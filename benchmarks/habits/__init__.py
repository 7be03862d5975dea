"""Training code as people write it, with a plain model and with a prepared one."""

from __future__ import annotations

from benchmarks.habits import budgets, by_name, combined, exports, gradients, loops, models, optimizers, writes
from benchmarks.habits.row import Outcome, Row, try_row

#: Every kind, in the order of the table.
ROWS: tuple[Row, ...] = (
    *optimizers.ROWS,
    *loops.ROWS,
    *by_name.ROWS,
    *gradients.ROWS,
    *writes.ROWS,
    *exports.ROWS,
    *budgets.ROWS,
    *models.ROWS,
    *combined.ROWS,
)

__all__ = ["ROWS", "Outcome", "Row", "try_row"]
