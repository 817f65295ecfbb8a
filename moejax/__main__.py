"""`python -m moejax` is the `moejax` command."""

from moejax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
