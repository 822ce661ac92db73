"""Evaluation: distances between images, classifier tests between latents, outlier detection, diagnosis."""
