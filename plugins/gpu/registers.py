"""What a compiled kernel takes of the GPU, as the tools that Triton brings read it from the image."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quasar.errors import QuasarError

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Registers of a thread, and bytes of a thread's values that lie in memory, since registers ran out."""

    registers: int
    spilled_bytes: int


def resources_of(image: bytes) -> Resources:
    """Of the one kernel in an image."""
    from triton import backends

    tool = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory(prefix="quasar-cubin-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(image)
        done = subprocess.run(  # noqa: S603 - a tool of an installed package
            [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=False
        )
    found = _USAGE.search(done.stdout)
    if found is None:
        raise QuasarError(f"cuobjdump says nothing of a kernel's registers: {(done.stderr or done.stdout).strip()}")
    return Resources(registers=int(found[1]), spilled_bytes=int(found[2]))
