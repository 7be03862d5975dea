"""Other people's trainers: what ends equal to plain training of the same tensors."""
