"""`python -m ebm_prior` is `ebm-prior`."""

from ebm_prior.cli.main import main

main(prog_name="ebm-prior")
