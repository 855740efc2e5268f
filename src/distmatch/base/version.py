"""The version of the package, in ``base`` so that every other package can read it."""

__version__ = "0.1.0"
