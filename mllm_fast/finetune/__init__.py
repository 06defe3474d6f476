"""Low-memory fine-tuning of the bridge, or of LoRA, through a frozen language model."""

from .loss import HeadHasToBeCalledError as HeadHasToBeCalledError
from .loss import can_skip_logits as can_skip_logits
from .loss import language_model_loss as language_model_loss
from .memory import BatchShape as BatchShape
from .prepare import FinetuningPlan as FinetuningPlan
from .prepare import Lora as Lora
from .prepare import prepare_finetuning as prepare_finetuning
