"""Remakes of the paper's experiments. They are not needed to use a prior."""
