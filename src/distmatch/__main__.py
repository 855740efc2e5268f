"""`python -m distmatch`."""

from distmatch.cli.main import entry

entry()
