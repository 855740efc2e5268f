"""Several methods at the same budget, side by side: options, costs, a plan, the runs, what they say."""
