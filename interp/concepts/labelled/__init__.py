"""Labelled data in: examples from files and lists, and the rows of activations that speak for them."""
