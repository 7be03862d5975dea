"""Architectures of transformers, timm and torchvision: gradients against the dense model's, and peak budgets."""
