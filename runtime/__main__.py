"""`python -m runtime`."""

from quasar.cli import run
from runtime.cli import app

if __name__ == "__main__":
    run(app)
