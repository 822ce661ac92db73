"""The mathematics: backbone contract, energy, samplers, scores, prior. It imports torch and numpy alone."""
