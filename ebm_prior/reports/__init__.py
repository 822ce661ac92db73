"""Results in words, tables and one HTML page."""
