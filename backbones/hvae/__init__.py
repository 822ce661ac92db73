"""HVAE (Havtorn et al., 2021): adapter, network, and the official checkpoints."""
