"""Human evaluation: people say which images are real, or which are better, without being told."""
