"""Published settings of each method's experiments, in the units of the options, with their sources.

The files that are named are those of the authors' repositories as they were read in November 2026; FastGen's
and MeanFlow's in public copies. Values that could not be read there are omitted.
"""
