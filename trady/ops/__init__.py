"""Autograd functions that keep less: sparse weight gradients, lean activations, normalisation and pooling.

Nothing here knows of policies, budgets or models: tensors and plain options in, tensors out.
"""
