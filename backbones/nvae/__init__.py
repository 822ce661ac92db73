"""NVAE (Vahdat & Kautz, 2020): adapter, network, and the official checkpoints."""
