"""Reconstruction of degraded images by an encoder or by inversion; comparisons of runs."""
