"""`quasar`, and `python -m quasar`."""

from typing import NoReturn

from quasar.commands import run_program


def main() -> NoReturn:
    """The console script."""
    run_program("quasar")


if __name__ == "__main__":
    main()
