"""The main job end to end: capture, autoencoder, probe, steering, analogies, a map, one report."""
