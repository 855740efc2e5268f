"""The diffusion substrate: denoisers, noise levels, exact mixtures, samplers, guidance."""
