"""The loss of a language model over a frozen head, without ever holding the logits."""

from .op import frozen_cross_entropy

__all__ = ["frozen_cross_entropy"]
