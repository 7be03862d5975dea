"""A method that a workload leaves out."""

from trady.estimates.unsuitable import UnsuitableMethodError

#: A method that this network has nothing for; the message says why.
SkippedError = UnsuitableMethodError
