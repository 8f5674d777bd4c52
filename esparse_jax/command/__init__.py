"""The `esparse` command."""
