"""Teachers from elsewhere: folders of diffusers, network pickles of EDM and EDM2."""
