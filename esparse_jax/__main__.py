"""`python -m esparse_jax`: the `esparse` command."""

from esparse_jax.command.cli import main

if __name__ == "__main__":
    main()
