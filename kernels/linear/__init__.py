"""GEMMs with a norm before them, or an activation, gate, residual or norm after; and stacked GEMMs."""

from .activations import ACTIVATIONS
from .grouped import grouped_linear
from .lowered import serves as lowers_by_panels
from .op import linear_residual, norm_linear
from .packed import can_pack, pack_weight, packed_linear
from .stacked import StackedWeight, stack_weights, stacked_linear

__all__ = [
    "ACTIVATIONS",
    "StackedWeight",
    "can_pack",
    "grouped_linear",
    "linear_residual",
    "lowers_by_panels",
    "norm_linear",
    "pack_weight",
    "packed_linear",
    "stack_weights",
    "stacked_linear",
]
