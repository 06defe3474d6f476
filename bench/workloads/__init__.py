"""What is measured, one file per system. Importing this package registers every workload."""

from . import attention, blip, finetune, flamingo, fused, quantized

__all__ = ["attention", "blip", "finetune", "flamingo", "fused", "quantized"]
