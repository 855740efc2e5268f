"""Utilities for all packages: user errors, estimates, safe files, seeded streams."""
