"""The time between the kernels: what a step costs where its arithmetic takes next to nothing."""
