"""BLIP-2's first stage on the Triton kernels, in Triton's interpreter: losses and all gradients are those of PyTorch's ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mllm_fast.kernels import runtime
from mllm_fast.models.blip2_stage1 import Blip2Stage1
from tests.families.instruments import assert_same
from tests.kernels.triton_device import INTERPRETING, poisoned  # noqa: F401
from tests.models.stage1_models import NEGATIVES, batch, stage1

if not INTERPRETING:
    pytest.skip("test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)


@pytest.mark.usefixtures("poisoned")
def test_losses_and_gradients() -> None:
    model = stage1(num_hidden_layers=2)[0].float().train()
    model.retrieval.vision_model.requires_grad_(False)
    given = batch()
    with torch.no_grad(), runtime.backend("torch"):
        features = model.encode_images(given.pop("pixel_values").float())
    ours, theirs = (losses_and_gradients(model, given, features, backend) for backend in ("triton", "torch"))
    assert_same(ours, theirs, tolerance=2e-4)


def losses_and_gradients(
    model: Blip2Stage1, given: dict[str, Tensor], features: Tensor, backend: str
) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with runtime.backend(backend):
        losses = model(**given, features=features, negatives=NEGATIVES)
        losses["loss"].backward()
    found = {name: value.detach() for name, value in losses.items()}
    return found | {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
