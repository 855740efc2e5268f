"""The transport methods."""
