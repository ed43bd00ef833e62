"""What was measured of an engine on one machine, in the manifest and in the user's cache."""

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.contract import MAX_WIDTH
from engines.latency import CURVE_LENGTH, LatencySurface
from engines.noise import Noise
from engines.probes.row_invariance import RowInvariance
from quasar.errors import DamagedEngineError, EngineError
from quasar.files import write_json

_log = logging.getLogger("quasar.engines")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """What was measured on one machine: probes, whether exact integer kernels must be asked for, and latencies.

    `cost_noise` None: engines of earlier versions do not tell.
    """

    machine: dict[str, Any]
    row_invariance: RowInvariance
    exact_integers: bool
    cost_surface_ms: LatencySurface
    cost_noise: Noise | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of the manifest that belong to a machine; the user cache keeps the same ones."""
        surface = {
            str(length): {str(width): ms for width, ms in by_width.items()}
            for length, by_width in self.cost_surface_ms.items()
        }
        length = CURVE_LENGTH if CURVE_LENGTH in self.cost_surface_ms else max(self.cost_surface_ms)
        return {
            "row_invariance": {**asdict(self.row_invariance), "boundaries": list(self.row_invariance.boundaries)},
            "cost_curve_ms": surface[str(length)],
            "cost_surface_ms": surface,
            **({} if self.cost_noise is None else {"cost_noise": self.cost_noise.to_json()}),
            "machine": {**self.machine, "exact_integers": self.exact_integers},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "MachineRecord":
        """Read those keys; raises `DamagedEngineError` naming what does not fit."""
        invariance = value["row_invariance"]
        chain, widest = invariance.get("chain", 0), invariance.get("widest")
        if not (isinstance(widest, int) and (chain is None or (isinstance(chain, int) and 1 <= chain <= widest))):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; 1 <= chain <= widest expected")
        if widest > MAX_WIDTH or not isinstance(invariance.get("tree"), bool):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; widest or tree does not fit")
        # Absent in engines that earlier versions built: not probed.
        if not isinstance(prefill := invariance.get("prefill", False), bool):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; prefill does not fit")
        if not isinstance(batch := invariance.get("batch", False), bool):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; batch does not fit")
        boundaries = invariance.get("boundaries")
        if not isinstance(boundaries, list) or not all(isinstance(total, int) for total in boundaries):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; boundaries must be totals")
        machine = dict(value["machine"])
        exact = machine.pop("exact_integers", None)
        try:
            surface = {
                int(length): {int(width): float(ms) for width, ms in by_width.items()}
                for length, by_width in value["cost_surface_ms"].items()
            }
        except (ValueError, TypeError, AttributeError):
            raise DamagedEngineError(
                "manifest.json: cost_surface_ms must map cached lengths to widths to milliseconds"
            ) from None
        if any(not 0 < ms < math.inf for by_width in surface.values() for ms in by_width.values()):
            raise DamagedEngineError("manifest.json: cost_surface_ms has latencies that are no time")
        if not isinstance(exact, bool) or not surface or not all(surface.values()):
            raise DamagedEngineError("manifest.json: machine.exact_integers or cost_surface_ms is missing")
        return cls(
            machine=machine,
            row_invariance=RowInvariance(
                chain=chain,
                widest=widest,
                boundaries=tuple(sorted(boundaries)),
                tree=invariance["tree"],
                # Earlier versions did not look at width 1, which a prompt's last chunk may have.
                prefill=prefill and chain == 1,
                batch=batch,
            ),
            exact_integers=exact,
            cost_surface_ms=surface,
            cost_noise=Noise.from_json(value.get("cost_noise")),
        )


def read_record(path: Path) -> MachineRecord | None:
    """A record of the user's cache; None where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, EngineError):
        return MachineRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    return None


def keep_record(path: Path, record: MachineRecord) -> None:
    """Write it into the user's cache; where that fails, the next load only takes longer."""
    try:
        write_json(path, record.to_json())
    except OSError as error:
        _log.warning("the probe's result cannot be kept in %s (%s): the next load probes again", path, error)
