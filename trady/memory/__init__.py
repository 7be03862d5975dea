"""Memory of a training step: measured by the ledger."""

from trady.memory.ledger import Ledger, measure
from trady.memory.live import LiveBytes
from trady.memory.saved import Saved

__all__ = ["Ledger", "LiveBytes", "Saved", "measure"]
