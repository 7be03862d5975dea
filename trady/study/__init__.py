"""Training dynamics of a user's own model: heavy tails, rank stability, task dependence (``trady study``)."""
