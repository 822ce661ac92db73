"""Pictures: grids of images, plots, pages that combine them, and pictures of a prior at work (`ebm-prior show`)."""
