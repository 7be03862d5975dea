"""What policies want measured, in sweeps that fit in the budget.

A measure is one class and one line here.
"""

from trady.evidence.gradients import FisherInformation, SquaredGradients, WeightNorms
from trady.evidence.measures import register_measure
from trady.evidence.velocity import KIND, Velocity

register_measure("gradients", SquaredGradients())
register_measure("fisher", FisherInformation())
register_measure("weights", WeightNorms())
register_measure(KIND, Velocity())
