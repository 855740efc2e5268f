"""The kernel methods."""
