"""The machine, without priors: randomness, processes, CUDA graphs, memory."""
