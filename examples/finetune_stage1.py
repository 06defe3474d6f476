"""BLIP-2's first stage on handwritten digits: contrast, matching and generation, then images are asked for by text.

Real scans (scikit-learn's 1,797 digits of 8 x 8 pixels), everything trained from nothing. A quarter is held out: each of its
images has to find its own among the ten texts. Chance is 10 %.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval

import mllm_fast
from mllm_fast.demo.digits import DIGITS, load_images, vary
from mllm_fast.finetune import TrainingSettings, train
from mllm_fast.models.blip2_stage1 import Blip2Stage1

BAR = 0.85
CLS, SEP, DEC, FIRST = 1, 2, 3, 4


def build() -> Blip2Stage1:
    """Four vision layers, four layers of Q-Former, a vocabulary of ten words and four special tokens."""
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.15}
    config = Blip2Config(
        vision_config={**sizes, "num_hidden_layers": 3, "image_size": 8, "patch_size": 2},
        qformer_config={
            **sizes, "num_hidden_layers": 2, "cross_attention_frequency": 1, "encoder_hidden_size": 64,
            "vocab_size": FIRST + 10, "max_position_embeddings": 8, "use_qformer_text_input": True,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        num_query_tokens=4,
        image_text_hidden_size=32,
    )  # fmt: skip
    retrieval = Blip2ForImageTextRetrieval(config)
    # Made for pretrained parts: from nothing, equal queries and small weights would all see the mean of the picture for long.
    torch.nn.init.normal_(retrieval.query_tokens)
    return Blip2Stage1(retrieval, bos_token_id=DEC, eos_token_id=SEP)


class OneOfEach(torch.utils.data.Dataset):
    """Ten images, one of each digit: in a larger batch, a wrong text could be a right one."""

    def __init__(self, images: torch.Tensor, digits: torch.Tensor) -> None:
        self.images = images
        self.rows = [torch.nonzero(digits == digit).flatten() for digit in range(10)]

    def __len__(self) -> int:
        return min(map(len, self.rows))

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([self.images[rows[torch.randint(len(rows), ())]] for rows in self.rows])


def main() -> int:
    """0 where the bar is reached, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", help="folder of the run (default: one that is deleted)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, digits, held_out, answers = load_images(seed=0)
    texts = torch.tensor([[CLS, FIRST + digit, SEP] for digit in range(10)])

    def collate(groups):  # type: ignore[no-untyped-def]
        (group,) = groups
        pixels = vary(group).expand(-1, 3, -1, -1)
        return {"input_ids": texts, "attention_mask": torch.ones_like(texts), "pixel_values": pixels}

    model = build()
    plan = mllm_fast.prepare_finetuning(model, train="bridge+vision")
    settings = TrainingSettings(
        steps=args.steps, batch_size=1, learning_rate=2e-3, warmup_steps=args.steps // 10, weight_decay=0.05
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(args.output or folder)
        result = train(
            plan, lambda model, batch: dict(model(**batch)), OneOfEach(images, digits), collate, settings, output
        )

    model.eval()
    with torch.no_grad():
        similarity = model.similarity(texts, torch.ones_like(texts), held_out.expand(-1, 3, -1, -1))
    right = (similarity.argmax(dim=1) == answers).float().mean().item()
    print(f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.2f}; {right:.1%} of {len(answers)} held-out images ({DIGITS[0]} "
          f"to {DIGITS[9]}) find their text; chance is 10 %")  # fmt: skip
    return 0 if right >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
