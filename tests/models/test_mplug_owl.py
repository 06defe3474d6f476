"""mPLUG-Owl against the original's equations, in plain PyTorch and fused: features, splice, ragged batches, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.models.mplug_owl import MplugOwlForConditionalGeneration
from tests.families.instruments import Results, assert_same, check_precision, fused, recording
from tests.models.mplug_owl_models import (
    HEADS,
    IMAGE,
    LAYERS,
    PATCHES,
    QUERIES,
    ROWS,
    TEXT,
    TEXTS,
    VISION,
    VISION_FFN,
    inputs,
    original_abstractor,
    original_embeddings,
    original_vision,
    owl,
)

levels = pytest.mark.parametrize("level", [None, 0, 1, 2], ids=["unfused", "level0", "level1", "level2"])


class Original(nn.Module):
    """Rows of images by the original's equations, over the parameters of a model of ours."""

    def __init__(self, model: MplugOwlForConditionalGeneration) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, pixels: Tensor) -> Tensor:
        w = dict(self.model.named_parameters())
        return original_abstractor(w, original_vision(w, pixels))


class Ours(nn.Module):
    """Rows of images by the model."""

    def __init__(self, model: MplugOwlForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixels).pooler_output


def run(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 7) -> Results:
    """Rows and gradients for three images."""
    module = module.to(dtype)
    module.zero_grad(set_to_none=True)
    size, device = module.model.config.vision_config.image_size, module.model.device
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))
    pixels = pixels.to(device, dtype).requires_grad_()
    out = module(pixels)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(out))
    results = {"output": out.detach(), "d pixels": pixels.grad}
    return results | {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}


# what is computed


@levels
def test_the_originals_equations(level: int | None) -> None:
    model = owl()
    ours = model if level is None else fused(model, level=level)
    theirs = run(Original(model))
    assert theirs["output"].shape == (3, ROWS, TEXT)
    # Everything that sees is trained: nothing of it may be left out.
    assert len(theirs) == 2 + sum(not name.startswith("language_model.") for name, _ in model.named_parameters())
    assert_same(run(Ours(ours)), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    # At a larger gain, five layers amplify rounding until its size is a matter of luck.
    def build(seed: int) -> nn.Module:
        return Ours(owl(seed=seed, gain=1.0))

    check_precision(build, mllm_fast.fuse, lambda m, s, d: run(m, d, s), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released model's lengths: 257 image tokens, 64 queries, heads of 64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def build(seed: int) -> nn.Module:
        return Ours(owl(seed=seed, gain=1.0, width=256, image_size=224, num_query_tokens=64).cuda())

    check_precision(build, mllm_fast.fuse, lambda m, s, d: run(m, d, s), dtype, seeds=range(3))


@levels
def test_an_image_that_is_seen_in_part(level: int | None) -> None:
    model = owl().double()
    ours = model if level is None else fused(model, level=level)
    image = torch.randn(2, 6, VISION, dtype=torch.float64)
    seen = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    image[seen == 0] = 1e4  # of what nobody may see
    expected = original_abstractor(dict(model.named_parameters()), image, seen)
    for called in (None, "attention.key", ""):
        if called is not None:  # a child that has to be called, and upstream's path in the middle of fused layers
            cross = ours.abstractor.encoder.layers[1].crossattention
            cross.get_submodule(called).register_forward_hook(lambda *_: None)
        rows = ours.abstractor(ours.query_tokens.expand(2, -1, -1), image, seen).last_hidden_state
        torch.testing.assert_close(rows, expected, atol=1e-10, rtol=1e-10)


@levels
def test_the_splice(level: int | None) -> None:
    model = owl().double()
    ours, given = (model if level is None else fused(model, level=level)), inputs()
    given["pixel_values"] = given["pixel_values"].double()
    expected = original_embeddings(model, given)
    embedded = ours.embed_prompt(given["input_ids"], given["pixel_values"])
    torch.testing.assert_close(embedded, expected, atol=1e-10, rtol=1e-10)
    logits = ours(**given).logits
    theirs = model.language_model(
        inputs_embeds=expected,
        attention_mask=given["attention_mask"],
        position_ids=given["attention_mask"].cumsum(1).sub(1).clamp(min=0),
    ).logits
    # Llama's norms are fp32, whatever the model is.
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)


def test_dropout_in_training() -> None:
    """On the attention's probabilities: its mean over many patterns is that without, and it varies as much as upstream's."""
    model = owl(seed=1).double()
    model.abstractor.encoder.layers = model.abstractor.encoder.layers[:1]
    ours = fused(model)
    image = torch.randn(1, 5, VISION, dtype=torch.float64)
    queries, samples = model.query_tokens.detach(), 4000
    means = []
    for m in (model, ours):
        torch.manual_seed(3)
        attention = m.abstractor.encoder.layers[0].crossattention.attention
        attention.attention_dropout = 0.3
        m.train()
        layer = m.abstractor.encoder.layers[0]
        # Before the network, which is not linear: the mean of what is added is then that without dropout.
        layer.crossattention.output.mlp.w2.weight.data.zero_()
        with torch.no_grad():
            out = layer(queries.expand(samples, -1, -1), image.expand(samples, -1, -1))
            without = layer.eval()(queries, image)[0]
        assert (out.std(dim=0) > 1e-3).any(dim=-1).all(), "every query loses something in some pattern"
        means.append((out.mean(dim=0) - without, out.std(dim=0) / samples**0.5))
    for difference, error in means:
        assert (difference.abs() <= 5 * error + 1e-12).all()
    assert torch.allclose(means[0][1], means[1][1], rtol=0.1, atol=1e-4)


# what is not computed


def test_work() -> None:
    """The image is normalised once, and projected by one GEMM; the first layer's queries are projected for one row."""
    model = owl()
    images, tokens = 3, PATCHES + 1
    counted = []
    for m in (model, fused(model)):
        with torch.no_grad(), recording() as seen:
            m.abstractor(m.query_tokens.expand(images, -1, -1), torch.randn(images, tokens, VISION))
        over_image = [g for g in seen.gemms if g.k == VISION and g.batch * g.m == images * tokens]
        norms = seen.count("native_layer_norm", lambda shapes: shapes[0] == (images, tokens, VISION))
        joined = seen.count("cat", lambda shapes: shapes[0] == (images, QUERIES, VISION))
        one_row = [g for g in seen.gemms if g.k == VISION and g.batch * g.m == QUERIES]
        counted.append((len(over_image), norms, joined, len(one_row)))
    # Upstream's keys are queries and image together, so it has no GEMM over the image alone.
    assert counted == [(0, LAYERS, LAYERS, 0), (1, 1, 0, 1)]


def test_vision_layers_are_five_ops() -> None:
    model = fused(owl())
    layer, x = model.vision_model.encoder.layers[0], torch.randn(2, PATCHES + 1, VISION)
    with torch.no_grad(), recording() as seen:
        layer(x)
    assert sorted((g.k, g.n) for g in seen.gemms if g.batch == 1) == [
        (VISION, VISION), (VISION, VISION_FFN), (VISION, 3 * VISION), (VISION_FFN, VISION),
    ]  # fmt: skip
    assert seen.count("clone") == 0


def test_many_images_on_a_cpu_are_projected_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = owl(), torch.randn(3, 3, 28, 28)
    ours = fused(model)
    with torch.no_grad():
        expected = ours.get_image_features(given).pooler_output
        monkeypatch.setattr("mllm_fast.modules.visual_abstractor.LARGEST", 1000)
        with recording() as seen:
            rows = ours.get_image_features(given).pooler_output
    assert [g.n for g in seen.gemms if g.k == VISION and g.m == 3 * (PATCHES + 1)][-LAYERS:] == [2 * VISION] * LAYERS
    torch.testing.assert_close(rows, expected)


def test_the_norm_that_gpus_leave_to_the_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_fast.modules.visual_abstractor.defers_norm", lambda x: True)
    model = owl()
    assert_same(run(Ours(fused(model))), run(Original(model)))


# ragged batches, and what transformers expects of a model


@pytest.mark.parametrize("text", TEXTS)
def test_a_batch_is_its_samples(text: str) -> None:
    """Padding changes nothing, also where positions are counted from the left."""
    model, given = fused(owl(text)), inputs()
    together, first = model(**given).logits, 0
    for row, count in enumerate((2, 1, 0)):
        mask = given["attention_mask"][row].bool()
        pixels = given["pixel_values"][first : first + count] if count else None
        alone = model(given["input_ids"][row : row + 1, mask], pixels).logits
        torch.testing.assert_close(together[row : row + 1, mask], alone, atol=1e-4, rtol=1e-4)
        first += count


def test_images_side_by_side() -> None:
    model, pixels = owl().double(), inputs()["pixel_values"][:2].double()
    ids = torch.tensor([[1, *[IMAGE] * (2 * ROWS), 5]])
    rows = model.get_image_features(pixels).pooler_output
    embedded = model.embed_prompt(ids, pixels)
    assert torch.equal(embedded[0, 1 : 1 + 2 * ROWS], rows.flatten(0, 1))


def test_rows_of_images_in_place_of_images() -> None:
    model, given = owl(), inputs()
    expected = model(**given).logits
    rows = model.get_image_features(given.pop("pixel_values")).pooler_output
    assert torch.equal(model(**given, image_features=rows).logits, expected)
    ids = given.pop("input_ids")
    assert torch.equal(model(**given, inputs_embeds=model.embed_prompt(ids, image_features=rows)).logits, expected)


def test_an_image_token_of_the_vocabulary() -> None:
    """A vocabulary may have a word for it; the image stands in its places all the same."""
    given = inputs()
    outside, inside = owl(), owl(image_token_id=59)
    expected = outside(**given).logits
    given["input_ids"] = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, 59)
    assert torch.equal(inside(**given).logits, expected)
    new = inside.generate(**given, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert torch.equal(new[:, :-2], given["input_ids"]), "a word can be decoded, so it stays"


def test_labels() -> None:
    model, given = owl(), inputs()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    out = model(**given, labels=labels)
    wanted = labels.masked_fill(labels == IMAGE, -100)[:, 1:]
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), wanted.flatten())
    torch.testing.assert_close(out.loss, expected)
    assert (labels == IMAGE).any(), "the caller's labels stay as they are"


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_and_gradient_checkpointing(reentrant: bool) -> None:
    model, given = owl(), inputs()
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    results = []
    for m, checkpointing in ((model, False), (fused(model), False), (fused(model), True)):
        m.zero_grad()
        m.train()
        m.abstractor.config.attention_probs_dropout_prob = 0.0
        for layer in m.abstractor.encoder.layers:
            layer.crossattention.attention.attention_dropout = 0.0
        if checkpointing:
            enable = getattr(m, "activation_checkpointing_enable", None) or m.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        given["pixel_values"].requires_grad_()
        given["pixel_values"].grad = None
        m(**given).loss.backward()
        assert all(p.grad is not None for p in m.parameters())
        results.append({n: p.grad for n, p in m.named_parameters()} | {"pixels": given["pixel_values"].grad})
    assert_same(results[1], results[0], 1e-5)
    assert_same(results[2], results[0], 1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_language_models(text: str) -> None:
    model, given = owl(text), inputs()
    ours = fused(model)
    torch.testing.assert_close(ours(**given).logits, model(**given).logits, atol=1e-4, rtol=1e-4)
    alone = model(torch.tensor([[1, *[IMAGE] * ROWS, 5]]), given["pixel_values"][:1]).logits
    other = model(torch.tensor([[1, *[IMAGE] * ROWS, 5]]), given["pixel_values"][1:2]).logits
    assert (alone - other)[0, -1].abs().max() > 1e-3, "the image matters"


@levels
def test_recorded_outputs(level: int | None) -> None:
    model = owl(attn_implementation="eager")
    ours = model if level is None else fused(model, level=level)
    pixels = inputs()["pixel_values"]
    plain = model.vision_model(pixels).last_hidden_state
    out = ours.vision_model(pixels, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(3, PATCHES + 1, VISION)] * 3
    assert [a.shape for a in out.attentions] == [(3, HEADS, PATCHES + 1, PATCHES + 1)] * 2
    torch.testing.assert_close(ours.vision_model.post_layernorm(out.hidden_states[-1]), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.last_hidden_state, plain, atol=1e-4, rtol=1e-4)
    queries = ours.query_tokens.expand(3, -1, -1)
    states = ours.abstractor(queries, plain, output_hidden_states=True).hidden_states
    weights = ours.abstractor(queries, plain, output_attentions=True).attentions
    assert [h.shape for h in states] == [(3, QUERIES, VISION)] * (LAYERS + 1)
    assert [w.shape for w in weights] == [(3, HEADS, QUERIES, QUERIES + PATCHES + 1)] * LAYERS
    assert ours.abstractor(queries, plain).hidden_states is None


def test_eager_attention_is_the_same() -> None:
    pixels = inputs()["pixel_values"]
    by_sdpa, by_eager = (owl(attn_implementation=name).get_image_features(pixels) for name in ("sdpa", "eager"))
    torch.testing.assert_close(by_sdpa.pooler_output, by_eager.pooler_output, atol=1e-4, rtol=1e-4)


def test_fuse_and_back() -> None:
    model, given = owl(), inputs()
    expected, names = model(**given).logits, list(model.state_dict())
    ours = fused(model)
    report = mllm_fast.fuse(copy.deepcopy(model))
    layer, encoder, vision = (
        f"FusedMplugOwl{name}" for name in ("VisualAbstractorLayer", "VisualAbstractorEncoder", "VisionEncoderLayer")
    )
    own = [row for row in (*report.fused, *report.left_alone) if not row.path.startswith("language_model")]
    assert [getattr(row, "now", row) for row in own] == [vision] * 2 + [encoder] + [layer] * LAYERS
    assert list(ours.state_dict()) == names
    logits = ours(**given).logits
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(**given).logits, logits)
    mllm_fast.unfuse(ours)
    for (name, mine), theirs in zip(ours.named_modules(), model.modules(), strict=True):
        assert type(mine) is type(theirs), name
        assert not [key for key in mine.__dict__ if "mllm_fast" in key], name
    assert torch.equal(ours(**given).logits, expected)


def test_weights_that_change_after_fusing() -> None:
    model, pixels = owl(), inputs()["pixel_values"]
    ours = fused(model)
    with torch.no_grad():
        ours.get_image_features(pixels)
        for m in (model, ours):
            m.abstractor.encoder.layers[1].crossattention.normk.weight.mul_(1.5)
            m.abstractor.encoder.layers[2].crossattention.attention.value.weight.add_(0.1)
        torch.testing.assert_close(
            ours.get_image_features(pixels).pooler_output, model.get_image_features(pixels).pooler_output,
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip


def test_prepacked_weights() -> None:
    model, pixels = owl().bfloat16(), inputs()["pixel_values"]
    with torch.no_grad():
        expected = model.float().get_image_features(pixels).pooler_output
        rows = fused(model.bfloat16(), prepack=True).get_image_features(pixels).pooler_output
        theirs = model.get_image_features(pixels).pooler_output
    assert (rows - expected).square().mean() <= 4 * (theirs - expected).square().mean()


def test_autocast() -> None:
    model, pixels = owl(), inputs()["pixel_values"]
    exact = model.get_image_features(pixels).pooler_output
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model.get_image_features(pixels).pooler_output
        ours = fused(model).get_image_features(pixels).pooler_output
    assert ours.dtype == theirs.dtype
    assert (ours - exact).square().mean() <= 4 * (theirs - exact).square().mean()
