"""The program: `python -m ebm_prior` is `ebm-prior`. Whenever Ctrl-C comes, it ends in one line."""

from ebm_prior.compute.stopping import program


def main() -> None:
    """`ebm-prior`, from before its imports to the end of the process."""
    with program():
        from ebm_prior.cli.main import main as command_line

        command_line(prog_name="ebm-prior")


if __name__ == "__main__":
    main()
