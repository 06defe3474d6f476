"""Layer norm and RMS norm, with residual and dropout."""

from .op import Norm, layer_norm, normalize, rms_norm

__all__ = ["Norm", "layer_norm", "normalize", "rms_norm"]
