"""What is measured, one file per system. Importing this package registers every workload."""

from . import attention, blip, flamingo

__all__ = ["attention", "blip", "flamingo"]
