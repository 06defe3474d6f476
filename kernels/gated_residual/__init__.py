"""residual + tanh(gate) * branch: how Flamingo adds a gated branch."""

from .op import gated_residual

__all__ = ["gated_residual"]
