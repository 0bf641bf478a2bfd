"""Models from and to other software."""
