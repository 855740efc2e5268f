"""Samples that agree with something known: measurements, a forward model, another image, neighbors."""
