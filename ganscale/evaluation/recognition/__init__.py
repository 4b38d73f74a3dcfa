"""Classifiers: how they are trained, and how much a GAN's images or features improve them."""
