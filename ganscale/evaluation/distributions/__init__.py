"""Metrics that compare the features of two image sets: FID, KID, precision, recall and others."""
