"""VDVAE (Child, 2021): adapter, network, and the official checkpoints."""
