"""The consistency methods."""
