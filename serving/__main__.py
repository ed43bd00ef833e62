"""`python -m serving`."""

from quasar.commands import run_program

if __name__ == "__main__":
    run_program("serving")
