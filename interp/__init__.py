"""See and steer what a language model represents."""
