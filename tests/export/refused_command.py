"""`python -m export …` where it refuses what it is told."""

import subprocess
import sys


def refusal_of(*arguments):
    """What the command says on standard error, which must be with exit code 2."""
    done = subprocess.run([sys.executable, "-m", "export", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    return done.stderr
