"""From a request to a decision: budget, draws, recomputation, the plan and forecasts."""
