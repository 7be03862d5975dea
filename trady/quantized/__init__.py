"""Linear layers stored quantised, with their trained channels beside them."""

# The function hides the module of its name: ``trady.quantized.dequantize(model)`` is what messages say to call.
from trady.quantized.dequantize import dequantize

__all__ = ["dequantize"]
