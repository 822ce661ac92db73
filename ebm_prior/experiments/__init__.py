"""Remakes of the paper's experiments. Users of the add-on never need this room."""
