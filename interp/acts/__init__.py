"""Activations as data, and the floor that concepts and space share."""
