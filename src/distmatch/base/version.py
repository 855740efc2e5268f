"""The version of the package, in the first room so that every other one may read it."""

__version__ = "0.1.0"
