"""Models by name.

A source of models is one file and one line below.
"""

from trady.training.models.efficientnet import EFFICIENTNET
from trady.training.models.from_function import FUNCTION
from trady.training.models.from_run import RUN
from trady.training.models.from_transformers import TRANSFORMERS
from trady.training.models.source import register_model_source

register_model_source(RUN)  # first: a folder that holds a run is one, whatever it is called
register_model_source(EFFICIENTNET)
register_model_source(FUNCTION)
register_model_source(TRANSFORMERS)  # last: it takes every name
