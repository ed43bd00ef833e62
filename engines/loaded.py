"""An engine that a back end has loaded."""

from dataclasses import dataclass

from engines.directory import EngineDirectory
from engines.draft_head import DraftHeadSession
from engines.record import MachineRecord
from engines.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """An engine that is ready to run, with what was measured on this machine.

    `kernels`: which of the back end's kernels run; "" where it has one kind. `kernels_reason`: why those, where others
    would be taken if they could run. `draft_head`: the one that the directory has, where the kernels run it.
    """

    directory: EngineDirectory
    record: MachineRecord
    backend: str
    session: Session
    kernels: str = ""
    kernels_reason: str = ""
    draft_head: DraftHeadSession | None = None
