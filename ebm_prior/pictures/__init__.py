"""Pictures: grids of images, plots, contact sheets, and what a prior does."""
