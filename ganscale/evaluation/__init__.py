"""Evaluation of generated images: image sets, and metrics that are computed on them."""
