"""How far other work on the machine may have raised what was measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.fields import check_fields
from quasar.errors import DamagedEngineError

# The smallest times of two halves of the rounds that lie nearer than this agree. The controller's choices move by a
# draft or so where a latency is 10 % off, and two halves of a quiet machine's rounds are within 5 %.
AGREEMENT = 1.1
# A median so far above the minimum: most passes were slowed. It is 1.02 to 1.2 on quiet machines.
_MOST_SPREAD = 1.4
# Threads that waited for a core for more than this share of their time had not the machine to themselves: even the
# fastest pass may then be slow. It is below 0.03 alone, and about 0.5 beside a process that keeps every core busy.
_MOST_WAITED = 0.1
# Measurements after which noisy latencies are kept: on some machines they never agree, and each look takes seconds.
_MOST_ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What the rounds of a measurement say of its latencies.

    Attributes:
        agreed: the smallest times of two halves of the rounds were within `AGREEMENT`, at every width.
        spread: median time / smallest time, the middle one of all widths and cached lengths; 1 is quiet.
        waited: share of the time in which this process's threads could have run and had no core; None where the
            system does not tell.
        attempts: measurements that these latencies are the best of.
    """

    agreed: bool
    spread: float
    waited: float | None = None
    attempts: int = 1

    @property
    def noisy(self) -> bool:
        """Whether other work may have raised the latencies."""
        return not self.agreed or self.spread > _MOST_SPREAD or (self.waited or 0.0) > _MOST_WAITED

    @property
    def deserves_another_look(self) -> bool:
        """Whether they should be measured again: noisy, and not too often already."""
        return self.noisy and self.attempts < _MOST_ATTEMPTS

    def __str__(self) -> str:
        waited = "" if self.waited is None else f", threads waited {100 * self.waited:.0f} % of their time"
        agreed = "" if self.agreed else ", repeated minima did not agree"
        return f"{'noisy' if self.noisy else 'quiet'}: median / minimum {self.spread:.2f}{waited}{agreed}"

    def to_json(self) -> dict[str, Any]:
        """The manifest's `cost_noise`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Noise | None":
        """Read it; None, as engines of earlier versions have it, stays None. Raises `DamagedEngineError`."""
        if value is None:
            return None
        known: dict[str, type] = {"agreed": bool, "spread": float}
        if isinstance(value, Mapping):
            value = {name: item for name, item in value.items() if name != "waited" or item is not None}
            known |= {name: kind for name, kind in (("waited", float), ("attempts", int)) if name in value}
        fields = check_fields("cost_noise", value, known)
        if not fields["spread"] >= 1:
            raise DamagedEngineError(
                f"manifest.json: cost_noise.spread is {fields['spread']!r}; 1 or more was expected"
            )
        return cls(**fields)


def thread_times() -> dict[str, tuple[float, float]]:
    """Thread → seconds that it ran, and that it waited for a core. Empty where the system (not Linux) does not tell."""
    times: dict[str, tuple[float, float]] = {}
    try:
        for task in Path("/proc/self/task").iterdir():
            ran, waited, _ = (task / "schedstat").read_text(encoding="ascii").split()
            times[task.name] = (int(ran) / 1e9, int(waited) / 1e9)
    except (OSError, ValueError):
        # A thread may also end while its figures are read; then nothing is said.
        return {}
    return times


def waited_share(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> float | None:
    """Of the time that threads could have run between two `thread_times`, the share in which they had no core."""
    ran = waited = 0.0
    for name in before.keys() & after.keys():
        ran += after[name][0] - before[name][0]
        waited += after[name][1] - before[name][1]
    return None if ran + waited <= 0 else round(waited / (ran + waited), 3)
