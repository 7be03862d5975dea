"""Autograd operations that keep less: sparse weight gradients, lean activations, norms and pooling.

Nothing here knows of policies, budgets or models: tensors and plain options in, tensors out.
"""
