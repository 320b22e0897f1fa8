"""Linear concept directions: find, read, steer, measure."""
