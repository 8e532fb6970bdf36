"""Latent diffusion: noise levels, forward and reverse process, samplers, losses of the autoencoder, metrics of samples."""
