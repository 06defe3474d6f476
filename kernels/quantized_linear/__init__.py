"""Linear layers over frozen weights in 4 and 8 bits, on bitsandbytes' own bytes."""

from .decode import register_decoder as register_decoder
from .decode import scales as scales
from .op import dequantize as dequantize
from .op import quantized_linear as quantized_linear
from .projection import Projection as Projection
from .weights import Lora as Lora
from .weights import Nested as Nested
from .weights import Weight4bit as Weight4bit
from .weights import Weight8bit as Weight8bit
