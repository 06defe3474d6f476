"""The functional API: every op, tensors in and tensors out. Each docstring gives shapes, dtypes and errors."""

from __future__ import annotations

from .kernels.attention import Mask as Mask
from .kernels.attention import MediaRanges as MediaRanges
from .kernels.attention import MediaSubsets as MediaSubsets
from .kernels.attention import absorbed_attention as absorbed_attention
from .kernels.attention import attention as attention
from .kernels.cross_entropy import frozen_cross_entropy as frozen_cross_entropy
from .kernels.gated_residual import gated_residual as gated_residual
from .kernels.linear import StackedWeight as StackedWeight
from .kernels.linear import grouped_linear as grouped_linear
from .kernels.linear import linear_residual as linear_residual
from .kernels.linear import norm_linear as norm_linear
from .kernels.linear import stack_weights as stack_weights
from .kernels.linear import stacked_linear as stacked_linear
from .kernels.norm import Norm as Norm
from .kernels.norm import layer_norm as layer_norm
from .kernels.norm import normalize as normalize
from .kernels.norm import rms_norm as rms_norm
from .kernels.quantized_linear import Lora as Lora
from .kernels.quantized_linear import Nested as Nested
from .kernels.quantized_linear import Weight4bit as Weight4bit
from .kernels.quantized_linear import Weight8bit as Weight8bit
from .kernels.quantized_linear import dequantize as dequantize
from .kernels.quantized_linear import quantized_linear as quantized_linear
from .kernels.splice import image_rows as image_rows
from .kernels.splice import splice_rows as splice_rows
