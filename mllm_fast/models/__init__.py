"""Systems that have no maintained class elsewhere."""

from .bridge_file import BridgeMismatchError
from .flamingo import Flamingo, FlamingoConfig

__all__ = ["BridgeMismatchError", "Flamingo", "FlamingoConfig"]
