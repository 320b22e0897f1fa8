"""Sparse autoencoders on tensors."""
