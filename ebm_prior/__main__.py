"""`python -m ebm_prior` is `ebm-prior`."""

from ebm_prior.cli import main

main(prog_name="ebm-prior")
