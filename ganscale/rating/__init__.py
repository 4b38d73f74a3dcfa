"""Human evaluation: a blind test of which images are real, or which are better."""
