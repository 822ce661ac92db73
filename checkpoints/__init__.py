"""Small trained backbones and priors, as package data; README.md says how each was made."""
