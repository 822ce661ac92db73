"""BIVA (Maaløe et al., 2019): adapter, network, and the official checkpoints."""
