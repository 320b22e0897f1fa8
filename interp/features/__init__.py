"""A sparse autoencoder on a model."""
