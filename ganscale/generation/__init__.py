"""Trained generators: sampling, interpolation, directions, inversion, snapshots and pictures."""
