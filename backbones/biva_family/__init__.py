"""What BIVA and HVAE share: layers and deterministic paths."""
