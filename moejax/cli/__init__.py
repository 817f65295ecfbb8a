"""The `moejax` command; no logic of the field. `moejax.cli.main` is its entry point."""
