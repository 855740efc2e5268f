"""Several diffusion models together: mixtures, equal densities, products, annealing, tilting."""
