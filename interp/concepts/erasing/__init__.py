"""Take a concept out of rows, and show that it is gone."""
