"""The geometry of any set of vectors."""
