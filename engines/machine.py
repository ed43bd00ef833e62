"""Which machine this is, as far as kernels and latencies depend on it, and where what is learned about it is kept."""

import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quasar.files import sha256_json

# Instruction sets that choose a library's kernels.
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What row invariance, integer exactness and latencies may change with.

    `kernels`: the back end's name for those that run. `threads` 0: the library's own choice.
    """

    system: str
    processor: str
    instruction_sets: tuple[str, ...]
    library: str
    provider: str
    threads: int
    cores: int
    kernels: str = "stock"

    @property
    def key(self) -> str:
        """A short name for this machine with this library."""
        return sha256_json(self.to_json())[:16]

    def to_json(self) -> dict[str, Any]:
        """The manifest's `machine`."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}


def cpu_machine(*, library: str, provider: str, threads: int, kernels: str) -> Machine:
    """This machine's CPU, for a back end that runs on it; `library`: the back end's, with its version."""
    processor, flags = read_processor()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=processor,
        instruction_sets=tuple(flag for flag in INSTRUCTION_SETS if flag in flags),
        library=library,
        provider=provider,
        threads=threads,
        cores=usable_cores(),
        kernels=kernels,
    )


def user_cache() -> Path:
    """The folder for what is learned about machines: `QUASAR_CACHE`, or the user's cache folder."""
    if named := os.environ.get("QUASAR_CACHE"):
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:
        # A service may run as a user without a home.
        home = Path(tempfile.gettempdir())
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "quasar-verifier"


def usable_cores() -> int:
    """Cores that this process may run on at once: those it is bound to, and no more than its CPU quota pays for.

    A quota is rounded down: threads beyond it would stop all others of the pass when it is used up.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    bound = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = cpu_quota()
    return bound if quota is None else min(bound, max(int(quota), 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the control groups of this process (a container's, on Linux) grant; None where none limits it.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`). `root`: where /proc and /sys are found.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    quotas: list[float | None] = []
    for number, controllers, path in (line.split(":", 2) for line in groups if line.count(":") >= 2):
        names = ["", "unified"] if number == "0" else ["cpu", controllers]
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        # Every group above limits, too. A container may not see its own path, but then its group is the root it sees.
        own = Path(path.lstrip("/"))
        for name in names:
            quotas += [_group_quota(root / "sys/fs/cgroup" / name / folder) for folder in (own, *own.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _group_quota(folder: Path) -> float | None:
    """Cores that one group grants by itself."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        # "max", or -1, is no limit.
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def read_processor() -> tuple[str, frozenset[str]]:
    """The processor's name and flags; Linux tells both."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return name, flags
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            return name, frozenset(value.split())
    return name, flags
