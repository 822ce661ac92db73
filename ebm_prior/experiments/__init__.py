"""Remakes of the paper's experiments. Nobody needs them to use a prior."""
