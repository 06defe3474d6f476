"""What is measured, one file per system. Importing this package registers every workload."""

from . import flamingo

__all__ = ["flamingo"]
