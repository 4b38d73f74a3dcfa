"""Metrics of GANs other than distances of features: tournaments, two-sample tests, stability."""
