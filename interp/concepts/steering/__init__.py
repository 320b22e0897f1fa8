"""Change the stream of a model while it runs, or in its weights."""
