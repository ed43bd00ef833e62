"""What is *built and loaded*: the contract, the engine directory with its manifest, and the back ends' sessions."""

from engines.contract import Contract
from engines.loading import LoadedEngine, load_engine
from engines.manifest import Manifest

__all__ = ["Contract", "LoadedEngine", "Manifest", "load_engine"]
