"""Activations on disk: harvested, checksummed, read where they lie."""
