"""The visual abstractor and the vision layers of mPLUG-Owl around wrapped, packed and hooked children; and our own module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.families.mplug_owl import FusedMplugOwlVisualAbstractorLayer
from mllm_fast.modules.visual_abstractor import VisualAbstractor
from tests.families.builders import randomise
from tests.families.instruments import Results, assert_same, backward_results, check_precision, recording
from tests.models.mplug_owl_models import ABSTRACTOR_FFN, LAYERS, QUERIES, TEXT, VISION, original_abstractor, owl

ABSTRACTOR = "abstractor.encoder.layers.1.crossattention"
VISION_LAYER = "vision_model.encoder.layers.0"
LINEARS = [f"{ABSTRACTOR}.{name}" for name in (
    "attention.query", "attention.key", "attention.value", "output.out_proj", "output.mlp.w1", "output.mlp.w2",
    "output.mlp.w3",
)] + [f"{VISION_LAYER}.{name}" for name in ("self_attn.query_key_value", "self_attn.dense", "mlp.fc1", "mlp.fc2")]  # fmt: skip
NORMS = [f"{ABSTRACTOR}.{name}" for name in ("norm1", "normk", "output.norm2", "output.mlp.ffn_ln")] + [
    f"{VISION_LAYER}.{name}" for name in ("input_layernorm", "post_attention_layernorm")
]
# What a drop-in does not call, so that a hook there has to bring upstream's path back.
BYPASSED = [
    ABSTRACTOR, f"{ABSTRACTOR}.attention", f"{ABSTRACTOR}.output", f"{ABSTRACTOR}.output.mlp",
    f"{ABSTRACTOR}.output.mlp.act", f"{VISION_LAYER}.self_attn", f"{VISION_LAYER}.mlp", f"{VISION_LAYER}.mlp.activation_fn",
]  # fmt: skip
WHOLE = [VISION_LAYER, "abstractor.encoder.layers.1", "abstractor.encoder.layers.0"]
orders = pytest.mark.parametrize("fuse_first", [True, False], ids=["fuse_first", "wrap_first"])


def results(model: Any) -> Results:
    """Rows of two images, their gradients, and the rows again without gradients: the second may come from what is kept."""
    model.zero_grad(set_to_none=True)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    leaves = {"pixels": pixels.requires_grad_()}
    found = backward_results(model.get_image_features(leaves["pixels"]).pooler_output, leaves, model)
    with torch.no_grad():
        return found | {f"again {i}": model.get_image_features(leaves["pixels"]).pooler_output for i in range(2)}


def twins(wrap: Callable[[nn.Module], Any], fuse_first: bool = True, **sizes: int) -> tuple[Any, Any]:
    """(fused, plain), both with `wrap` applied, before or after fusing."""
    plain = owl(gain=1.0, **sizes).double()
    fused = copy.deepcopy(plain)
    wrap(plain)
    for step in (mllm_fast.fuse, wrap) if fuse_first else (wrap, mllm_fast.fuse):
        step(fused)
    return fused, plain


def double(_: nn.Module, __: Any, out: Any) -> Any:
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


@pytest.mark.parametrize("path", [*LINEARS, *NORMS, *BYPASSED, *WHOLE])
def test_hooks(path: str) -> None:
    for fuse_first in (True, False):
        fused, plain = twins(lambda m: m.get_submodule(path).register_forward_hook(double), fuse_first)
        assert_same(results(fused), results(plain))
        for m in (fused, plain):
            m.get_submodule(path)._forward_hooks.clear()
        assert_same(results(fused), results(plain))


@pytest.mark.parametrize("path", LINEARS)
def test_hooks_fire_once(path: str) -> None:
    """Keys and values are called on queries and image together, as upstream calls them."""
    shapes: list[list[torch.Size]] = []
    for m in twins(lambda m: None):
        shapes.append([])
        m.get_submodule(path).register_forward_hook(lambda _, args, out: shapes[-1].append(args[0].shape))
        m.get_image_features(torch.randn(2, 3, 28, 28).double())
    assert shapes[0] == shapes[1]


def add_lora(model: nn.Module, *paths: str, dropout: float = 0.0) -> None:
    """LoRA of rank 2 with B drawn instead of 0, so that it matters."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[*paths], lora_dropout=dropout)
    peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


@orders
@pytest.mark.parametrize("path", [*LINEARS, "all"])
def test_lora(path: str, fuse_first: bool) -> None:
    paths = LINEARS if path == "all" else [path]
    fused, plain = twins(lambda m: add_lora(m, *paths), fuse_first)
    ours = results(fused)
    assert sum("lora_A" in name for name in ours) == len(paths)
    assert_same(ours, results(plain))


def test_lora_with_dropout_drops_each_image_by_itself() -> None:
    """Queries of all images are equal, and would all lose the same if they were projected as one row."""
    fused, _ = twins(lambda m: add_lora(m, "abstractor.encoder.layers.0.crossattention.attention.query", dropout=0.5))
    seen: list[Tensor] = []
    query = fused.get_submodule("abstractor.encoder.layers.0.crossattention.attention.query")
    query.register_forward_hook(lambda _, __, out: seen.append(out))
    image = torch.randn(1, 5, VISION).double().expand(2, -1, -1)
    fused.train().abstractor(fused.query_tokens.expand(2, -1, -1), image)
    assert not torch.equal(seen[0][0], seen[0][1])


@orders
@pytest.mark.parametrize("path", LINEARS)
def test_4_bit_children(path: str, fuse_first: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def pack(model: nn.Module) -> None:
        model.float()
        linear = model.get_submodule(path)
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, quant_type="nf4"
        )
        packed.bias = linear.bias
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, packed.to("cpu"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Whole blocks in a row: of others, bitsandbytes' CPU code takes the wrong scales.
        fused, plain = twins(pack, fuse_first, width=64)
        pixels = torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            ours, theirs = (m.get_image_features(pixels).pooler_output for m in (fused, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_layer_by_itself() -> None:
    """It projects the image it is given, and can be fused alone."""
    layer = owl(gain=1.0).double().abstractor.encoder.layers[0]
    fused = copy.deepcopy(layer)
    mllm_fast.fuse(fused)
    assert type(fused) is FusedMplugOwlVisualAbstractorLayer
    queries, image = (torch.randn(2, n, VISION, dtype=torch.float64) for n in (QUERIES, 6))
    found = []
    for m in (fused, layer):
        leaves = {"queries": queries.clone().requires_grad_(), "image": image.clone().requires_grad_()}
        found.append(backward_results(m(*leaves.values()), leaves, m))
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_of_the_abstractor(dtype: torch.dtype) -> None:
    class Rows(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.abstractor, self.query_tokens = model.abstractor, model.query_tokens

        def forward(self, image: Tensor) -> Tensor:
            return self.abstractor(self.query_tokens.expand(len(image), -1, -1), image).last_hidden_state

    def run(module: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        module.zero_grad(set_to_none=True)
        image = torch.randn(3, 6, VISION, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
        return backward_results(module(image), {"image": image}, module)

    check_precision(lambda seed: Rows(owl(seed=seed, gain=1.0)), mllm_fast.fuse, run, dtype)


# our own module


def own(**options: Any) -> VisualAbstractor:
    sizes = {"depth": LAYERS, "heads": 4, "queries": QUERIES, "ffn_dim": ABSTRACTOR_FFN, **options}
    return randomise(VisualAbstractor(VISION, TEXT, **sizes)).double()


_ROLES = {
    "norm_queries": "norm1", "norm_image": "normk", "query": "attention.query", "key": "attention.key",
    "value": "attention.value", "out": "output.out_proj", "ffn_norm": "output.norm2", "ffn_gate": "output.mlp.w1",
    "ffn_up": "output.mlp.w3", "ffn_inner_norm": "output.mlp.ffn_ln", "ffn_down": "output.mlp.w2",
}  # fmt: skip


def original_names(module: VisualAbstractor) -> dict[str, Tensor]:
    w = {"query_tokens": module.queries[None], "abstractor.vit_eos": module.end[None, None]}
    w |= {f"abstractor.visual_fc.{name}": p for name, p in module.projection.named_parameters()}
    for i, layer in enumerate(module.layers):
        for role, name in _ROLES.items():
            at = f"abstractor.encoder.layers.{i}.crossattention.{name}"
            w |= {f"{at}.{part}": p for part, p in layer[role].named_parameters()}
    return w


def test_own_module() -> None:
    module = own()
    image = torch.randn(2, 6, VISION, dtype=torch.float64)
    expected = original_abstractor(original_names(module), image)
    torch.testing.assert_close(module(image), expected, atol=1e-10, rtol=1e-10)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    expected = original_abstractor(original_names(module), image, mask)
    torch.testing.assert_close(module(image, mask), expected, atol=1e-10, rtol=1e-10)
    found = []
    for forward in (module, lambda image: original_abstractor(original_names(module), image)):
        module.zero_grad(set_to_none=True)
        leaf = image.clone().requires_grad_()
        found.append(backward_results(forward(leaf), {"image": leaf}, module))
    assert len(found[0]) == 2 + len(list(module.parameters()))
    assert_same(*found)


def test_own_module_keeps_what_it_derives_and_takes_leading_dimensions() -> None:
    module = own()
    image = torch.randn(2, 3, 6, VISION, dtype=torch.float64)
    with torch.no_grad():
        rows = module(image)
        assert rows.shape == (2, 3, QUERIES + 1, TEXT)
        torch.testing.assert_close(rows[1, 2], module(image[1, 2]))
        with recording() as seen:
            module(image)
        assert seen.count("cat", lambda shapes: shapes[0] == (VISION, VISION)) == 0, "no weight is stacked again"
        module.layers[0]["key"].weight.mul_(1.5)
        assert (module(image) - rows).abs().max() > 1e-3
    clone = copy.deepcopy(module)
    assert torch.equal(clone(image), module(image))
    assert list(clone.state_dict()) == [name for name, _ in module.named_parameters()]


def test_own_module_drops_in_training_only() -> None:
    module = own(dropout=0.5)
    image = torch.randn(1, 6, VISION, dtype=torch.float64)
    torch.manual_seed(0)
    assert not torch.equal(module(image), module(image))
    assert torch.equal(module.eval()(image), module(image))
    with pytest.raises(ValueError, match="heads must divide dim, got 5 and 32"):
        VisualAbstractor(VISION, TEXT, heads=5)
    with pytest.raises(mllm_fast.NothingToFuseError):
        mllm_fast.fuse(nn.Linear(2, 2))
