"""MLP, UNet, DiT, the discriminator head, EMA, saved models. Importing this package loads no torch."""
