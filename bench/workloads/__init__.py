"""What is measured, one file per system. Importing this package registers every workload."""

from . import attention, flamingo

__all__ = ["attention", "flamingo"]
