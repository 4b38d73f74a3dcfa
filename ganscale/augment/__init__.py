"""Differentiable augmentation of the images a discriminator sees."""
