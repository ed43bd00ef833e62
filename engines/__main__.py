"""`python -m engines`."""

from engines.cli import app
from quasar.cli import run

if __name__ == "__main__":
    run(app)
