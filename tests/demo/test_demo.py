"""The whole demo, quick: it ends well, and what it wrote captions digits that it never saw."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm_fast import demo, quantization_report
from mllm_fast.demo import digits
from mllm_fast.models.captioner import Captioner, generate_captions

pytestmark = pytest.mark.slow


class Finished:
    """What one run of the demo left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        start = time.process_time()
        self.status = demo.run(folder, quick=True)
        self.seconds = time.process_time() - start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("demo") / "out")


def test_it_succeeds_in_a_minute_of_one_core(finished: Finished) -> None:
    assert finished.status == 0
    assert finished.seconds < 60
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {"systems.png", "digits.png", "digit.png", "bridge"}


def test_the_saved_bridge_captions_held_out_digits(finished: Finished) -> None:
    captioner = Captioner.load(finished.folder / "bridge")
    kinds = [row.kind for row in quantization_report(captioner.model).quantized]
    assert kinds == ["nf4"] * 21  # the language model was frozen in 4 bits
    _, _, images, answers = digits.load_images(digits.QUICK_SETTINGS.seed)
    for prompt in digits.TRAINED_PROMPTS:
        said = captioner.caption(images, prompt, max_new_tokens=8)
        right = [words == digits.caption(int(digit), prompt) for words, digit in zip(said, answers, strict=True)]
        assert sum(right) >= 0.95 * len(right)


def test_image_files_are_captioned(finished: Finished, tmp_path: Path) -> None:
    _, _, images, answers = digits.load_images(digits.QUICK_SETTINGS.seed)
    paths = []
    for i in range(20):
        pixels = (images[i, 0] * 255).round().byte().numpy()
        # As it comes, and as ink on paper at another size.
        image = Image.fromarray(pixels if i % 2 else 255 - pixels).resize(
            (8 + 24 * (i % 3),) * 2, Image.Resampling.NEAREST
        )
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1])
    said = generate_captions(finished.folder / "bridge", paths, None, max_new_tokens=8)
    right = [words == digits.caption(int(answer)) for words, answer in zip(said, answers, strict=False)]
    assert sum(right) >= 18
    example = generate_captions(finished.folder / "bridge", [finished.folder / "digit.png"])
    assert example == said[:1]


def test_the_split_is_honest() -> None:
    """The held-out quarter is the same for a seed, covers every digit, and shares no scan with the training images."""
    train, train_digits, held_out, held_out_digits = digits.load_images(3)
    assert (len(train), len(held_out)) == (1347, 450)
    assert torch.equal(digits.load_images(3)[2], held_out)
    assert not torch.equal(digits.load_images(4)[2], held_out)
    assert held_out_digits.bincount(minlength=10).min() >= 40
    assert len(train_digits) == 1347
    both = torch.cat([train, held_out]).flatten(1)
    repeated = len(both) - len(both.unique(dim=0))
    assert repeated == 0


def test_failure_is_a_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "QUICK_SETTINGS", digits.Settings(grammar_steps=2, epochs=1, batch=600))
    assert demo.run(tmp_path, quick=True) == 1
