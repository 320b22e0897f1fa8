"""A language model as named places in a residual stream."""
