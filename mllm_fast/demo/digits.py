"""Part 2 of the demo: teach a small language model, freeze it, and train a Flamingo bridge to caption handwritten digits.

The images are scikit-learn's 1,797 scans of 8x8 pixels. A quarter of them is held out by a seeded, stratified split:
nothing is trained, chosen or stopped on it, and the accuracy is measured on it once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..finetune import TrainingSettings, language_model_loss, prepare_finetuning, train
from ..models import Flamingo, FlamingoConfig
from ..models.captioner import Captioner
from ..models.patch_encoder import PatchEncoder
from ..quantization import QuantizationReport, quantize_llm

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("", "a photo of", "a scan of", "a drawing of")
TRAINED_PROMPTS = PROMPTS[:2]
SIZES = ("", "small", "large")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """How long and from which seed the two models are trained."""

    seed: int = 0
    grammar_steps: int = 150
    epochs: int = 24
    batch: int = 32
    learning_rate: float = 2e-3


QUICK_SETTINGS = Settings(epochs=14)


@dataclass(frozen=True)
class DigitsResult:
    """A trained captioner and how it did on the held-out images.

    Attributes:
        captioner: ready to use and to save.
        images: [N, 1, 8, 8], held out.
        digits: [N], what they show.
        captions: what the captioner says of each.
        accuracy: share of captions that are exact, word for word.
        untrained_accuracy: the same before the bridge was trained.
        prompted_accuracy: the same when the caption has to continue "a photo of".
        number_facts: share of "after six comes seven" that the frozen language model knows.
        quantized: what of the language model is frozen in 4 bits.
        trained, frozen: numbers of parameters.
        seconds: for teaching the language model, and for training the bridge.
    """

    captioner: Captioner
    images: Tensor
    digits: Tensor
    captions: list[str]
    accuracy: float
    untrained_accuracy: float
    prompted_accuracy: float
    number_facts: float
    quantized: QuantizationReport
    trained: int
    frozen: int
    seconds: tuple[float, float]

    def save_example(self, path: Path, size: int = 128) -> None:
        """Write the first held-out image as a PNG of `size` x `size` pixels."""
        pixels = (self.images[0, 0] * 255).round().byte().numpy()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(path)


def caption(digit: int, prompt: str = "", size: str = "") -> str:
    """The sentence for a digit: "a photo of a large handwritten seven"."""
    return " ".join(f"{prompt} a {size} handwritten {DIGITS[digit]}".split())


def number_facts() -> list[tuple[str, str]]:
    """("after six comes", "seven") and the like. Without them no text tells one digit's word from another's, and a
    language model that never had to choose between them cannot be steered to one of them once it is frozen.
    """
    after = [(f"after {name} comes", DIGITS[(i + 1) % 10]) for i, name in enumerate(DIGITS)]
    return after + [(f"before {name} comes", DIGITS[i - 1]) for i, name in enumerate(DIGITS)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    sentences = [" ".join((*PROMPTS, *SIZES)), "a handwritten", *(f"{start} {end}" for start, end in number_facts())]
    words = dict.fromkeys((*SPECIAL, *" ".join(sentences).split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, unk_token="<unk>", additional_special_tokens=["<image>"]
    )


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """[N, longest], padded on the right."""
    return tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt").input_ids


def teach_language_model(
    tokenizer: PreTrainedTokenizerFast, settings: Settings, progress: Progress
) -> LlamaForCausalLM:
    """A small Llama that speaks the captions' language."""
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    captions = [f"<bos> <image> {caption(d, p, s)} <eos>" for d in range(10) for p in PROMPTS for s in SIZES]
    facts = [f"<bos> {start} {end} <eos>" for start, end in number_facts()]
    # As many facts as captions, so that both are learnt at the same pace.
    ids = _encode(tokenizer, captions + facts * (len(captions) // len(facts)))
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)
    optimizer = torch.optim.AdamW(lm.parameters(), 3e-3)
    task = progress.add_task("teach the language model", total=settings.grammar_steps, note="")
    for _ in range(settings.grammar_steps):
        rows = torch.randint(len(ids), (64,))
        loss = lm(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update(task, advance=1, note=f"loss {loss.item():.3f}")
    return lm


@torch.no_grad()
def known_facts(lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of number facts that a language model knows."""
    starts, ends = zip(*number_facts(), strict=True)
    logits = lm(input_ids=_encode(tokenizer, [f"<bos> {start}" for start in starts])).logits[:, -1]
    right = logits.argmax(-1) == _encode(tokenizer, list(ends))[:, 0]
    return right.float().mean().item()


def load_images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [N, 1, 8, 8] in 0 to 1 and digits [N]; then the same of the held-out quarter."""
    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels, digits, test_size=0.25, stratify=digits, random_state=seed)
    train, held_out = (torch.from_numpy(part.astype(np.float32) / 16).view(-1, 1, 8, 8) for part in parts[:2])
    return train, torch.from_numpy(parts[2]), held_out, torch.from_numpy(parts[3])


def build_bridge(lm: LlamaForCausalLM, media_token_id: int) -> Flamingo:
    """Patch encoder, resampler and a gated block before every layer of the frozen language model."""
    dim = 64
    config = FlamingoConfig(
        media_token_id=media_token_id,
        vision_dim=dim,
        latents=4,
        resampler_depth=2,
        resampler_heads=4,
        resampler_head_dim=16,
        resampler_ffn_dim=2 * dim,
        heads=4,
        head_dim=16,
        ffn_dim=2 * lm.config.hidden_size,
        train_vision=True,
    )
    return Flamingo(lm, PatchEncoder(8, 2, dim), config)


def vary(images: Tensor) -> Tensor:
    """Slightly turned, scaled and shifted copies: the writer's hand would have done the same."""
    count = len(images)
    angle, scale, shift = torch.rand(count) - 0.5, torch.rand(count) - 0.5, torch.rand(count, 2) - 0.5
    angle, scale, shift = 0.35 * angle, 1 + 0.3 * scale, 0.4 * shift
    sine, cosine = angle.sin() * scale, angle.cos() * scale
    rows = (torch.stack((cosine, -sine, shift[:, 0]), 1), torch.stack((sine, cosine, shift[:, 1]), 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_bridge(
    model: Flamingo,
    tokenizer: PreTrainedTokenizerFast,
    images: Tensor,
    digits: Tensor,
    settings: Settings,
    progress: Progress,
) -> None:
    """Minimise the cross-entropy of the captions, given image and prompt; the language model is frozen."""
    # Per prompt: the ten captions, and the same with everything up to the prompt's end taken out of the loss.
    texts = []
    for prompt in TRAINED_PROMPTS:
        ids = _encode(tokenizer, [f"<bos> <image> {caption(digit, prompt)} <eos>" for digit in range(10)])
        labels = ids.clone()
        labels[:, : 2 + len(prompt.split())] = IGNORED
        texts.append((ids, labels))
    steps = settings.epochs * (len(images) // settings.batch)
    task = progress.add_task("train the bridge", total=steps, note="")

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Images and digits to a batch, all of it with the same prompt."""
        pixels, shown = (torch.stack(column) for column in zip(*rows, strict=True))
        ids, labels = texts[int(torch.randint(len(texts), ()))]
        return {"input_ids": ids[shown], "images": vary(pixels).unsqueeze(1), "labels": labels[shown]}

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        value = language_model_loss(model, batch)
        progress.update(task, advance=1, note=f"loss {value.item():.3f}")
        return value

    plan = prepare_finetuning(model, "vision+bridge")
    training = TrainingSettings(
        steps=steps,
        batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        warmup_steps=int(0.15 * steps),
        # The gates start closed, and nothing behind a closed gate learns: they get a pace of their own.
        gate_learning_rate=10.0,
        seed=settings.seed,
    )
    with tempfile.TemporaryDirectory() as run:
        train(plan, loss, TensorDataset(images, digits), collate, training, run, progress=False)
    model.eval()


def _exact(captions: list[str], digits: Tensor, prompt: str = "") -> float:
    return float(np.mean([said == caption(int(digit), prompt) for said, digit in zip(captions, digits, strict=True)]))


def run_digits(settings: Settings, progress: Progress) -> DigitsResult:
    """Teach, freeze in 4 bits, train, and caption the held-out images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tokenizer = build_tokenizer()
        start = time.perf_counter()
        lm = teach_language_model(tokenizer, settings, progress)
        frozen = sum(p.numel() for p in lm.parameters())
        quantized = quantize_llm(lm, "nf4", compute_dtype=torch.float32)
        facts = known_facts(lm, tokenizer)
        taught = time.perf_counter()
        images, digits, held_out, held_out_digits = load_images(settings.seed)
        model = build_bridge(lm, tokenizer.convert_tokens_to_ids("<image>"))
        captioner = Captioner(model, tokenizer)
        untrained = _exact(captioner.caption(held_out, max_new_tokens=8), held_out_digits)
        train_bridge(model, tokenizer, images, digits, settings, progress)
        trained = time.perf_counter()
        captions = captioner.caption(held_out, max_new_tokens=8)
        prompt = TRAINED_PROMPTS[1]
        prompted = _exact(captioner.caption(held_out, prompt, max_new_tokens=8), held_out_digits, prompt)
    return DigitsResult(
        captioner=captioner,
        images=held_out,
        digits=held_out_digits,
        captions=captions,
        accuracy=_exact(captions, held_out_digits),
        untrained_accuracy=untrained,
        prompted_accuracy=prompted,
        number_facts=facts,
        quantized=quantized,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=frozen,
        seconds=(taught - start, trained - taught),
    )


def draw_strip(result: DigitsResult, path: Path, columns: int = 8) -> None:
    """Held-out images with their captions, the mistakes last and in red, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    right = [said == caption(int(digit)) for said, digit in zip(result.captions, result.digits, strict=True)]
    wrong = [i for i, ok in enumerate(right) if not ok][:columns]
    shown = [i for i, ok in enumerate(right) if ok][: 3 * columns - len(wrong)] + wrong
    figure = Figure(figsize=(1.9 * columns, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Held-out digits and what the model says of them: {result.accuracy:.1%} of {len(right)} captions exact"
    )
    for axes, i in zip(figure.subplots(3, columns).flat, shown, strict=False):
        axes.imshow(result.images[i, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        said = result.captions[i] if right[i] else f"{result.captions[i]} (is {DIGITS[result.digits[i]]})"
        axes.set_title(said, fontsize=8, color="black" if right[i] else "tab:red")
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
