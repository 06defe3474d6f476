"""Low-memory fine-tuning of the bridge, or of LoRA, through a frozen language model."""

from .checkpoint import NoCheckpointError as NoCheckpointError
from .checkpoint import RunExistsError as RunExistsError
from .checkpoint import RunMismatchError as RunMismatchError
from .checkpoint import read_trained as read_trained
from .diagnosis import NonFiniteLossError as NonFiniteLossError
from .interruption import TrainingInterrupted as TrainingInterrupted
from .loop import train as train
from .loss import HeadHasToBeCalledError as HeadHasToBeCalledError
from .loss import can_skip_logits as can_skip_logits
from .loss import language_model_loss as language_model_loss
from .memory import BatchShape as BatchShape
from .optimizers import build_optimizer as build_optimizer
from .optimizers import build_schedule as build_schedule
from .optimizers import parameter_groups as parameter_groups
from .prepare import FinetuningPlan as FinetuningPlan
from .prepare import Lora as Lora
from .prepare import prepare_finetuning as prepare_finetuning
from .processes import join_processes as join_processes
from .processes import leave_processes as leave_processes
from .settings import TrainingResult as TrainingResult
from .settings import TrainingSettings as TrainingSettings
from .trainer import TrainerModel as TrainerModel
