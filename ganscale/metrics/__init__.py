"""Measures of images by their features: pure functions, and the networks that give features."""
