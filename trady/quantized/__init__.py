"""Linear layers stored quantised, with their trained channels beside them.

A storage format is one file and one line below.
"""

from trady.quantized.bitsandbytes import BITSANDBYTES
from trady.quantized.formats import register_format
from trady.quantized.torchao import TORCHAO

register_format(TORCHAO)
register_format(BITSANDBYTES)
