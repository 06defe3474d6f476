"""Frozen language models in 4 and 8 bits: quantise the language model of a multimodal model, and nothing else of it."""

from .loading import ModelNotFoundError as ModelNotFoundError
from .loading import UnreadableModelError as UnreadableModelError
from .loading import load as load
from .quantize import adopt as adopt
from .quantize import quantize_llm as quantize_llm
from .report import QuantizationReport as QuantizationReport
from .report import quantization_report as quantization_report
from .selection import NothingToQuantizeError as NothingToQuantizeError
from .selection import UnmatchedNameError as UnmatchedNameError
