"""Layers and deterministic paths that BIVA and HVAE share."""
