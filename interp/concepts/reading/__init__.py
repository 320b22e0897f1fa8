"""Find directions, read concepts with honest statistics, compare and keep what was found."""
