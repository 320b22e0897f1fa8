"""What steering does, what it costs, and whether it is more than chance."""
