"""Local geometry of a denoiser: Jacobians, flows, dimension, conservativity, agreement, tails."""
