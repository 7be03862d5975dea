"""What a GPU says: gradients, peaks, times, large language models, limits and a training, within a few minutes."""
