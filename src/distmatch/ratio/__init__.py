"""Density ratios for distillation: where log r comes from, and how it is normalised."""
