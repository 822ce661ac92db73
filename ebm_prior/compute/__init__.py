"""What knows machines and nothing of priors: randomness, processes, CUDA graphs, memory."""
