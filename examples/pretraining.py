"""The objectives that transformers has no class for: BLIP's pretraining, and BLIP-2's first stage.

Tiny models with random weights learn four pairs of a picture and a caption by contrast, matching and generation together. Each
is verified first (what fusing changes, as errors against a wider dtype), and says its captions at the end.
"""

import argparse
import sys

import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval, BlipConfig

from mllm_fast.models.blip2_stage1 import Blip2Stage1
from mllm_fast.models.blip_pretraining import BlipPretraining
from mllm_fast.verification import verify

PAD, CLS, SEP, DEC, ENC, FIRST, WORDS = 0, 1, 2, 3, 4, 5, 12
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.1,
}  # fmt: skip
VISION = {**SIZES, "image_size": 16, "patch_size": 4}


def pretraining() -> BlipPretraining:
    """BLIP: two text models that share all but their self-attention, momentum encoders and queues."""
    ids = {"pad_token_id": PAD, "bos_token_id": DEC, "eos_token_id": SEP, "sep_token_id": SEP}
    text = {**SIZES, **ids, "encoder_hidden_size": 32, "vocab_size": FIRST + WORDS, "max_position_embeddings": 16}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16)
    return BlipPretraining(config, encoder_token_id=ENC, bos_token_id=DEC, queue_size=16)


def first_stage() -> Blip2Stage1:
    """BLIP-2: one Q-Former for all three objectives."""
    qformer = {
        **SIZES, "encoder_hidden_size": 32, "vocab_size": FIRST + WORDS, "max_position_embeddings": 16,
        "use_qformer_text_input": True,
    }  # fmt: skip
    config = Blip2Config(vision_config=VISION, qformer_config=qformer, num_query_tokens=4, image_text_hidden_size=16)
    retrieval = Blip2ForImageTextRetrieval(config)
    torch.nn.init.normal_(retrieval.query_tokens)  # zeros, as they come, stand for trained ones
    return Blip2Stage1(retrieval, bos_token_id=DEC, eos_token_id=SEP)


def pairs() -> dict[str, torch.Tensor]:
    """Four pictures of noise, and captions of one to four words."""
    ids = torch.full((4, 6), PAD)
    for row in range(4):
        words = [CLS, *(FIRST + (row * 3 + place) % WORDS for place in range(row + 1)), SEP]
        ids[row, : len(words)] = torch.tensor(words)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(4, 3, 16, 16)}


def main() -> int:
    """0 where both verify and learn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    batch, learnt = pairs(), True
    right = batch["input_ids"][:, 1:].tolist()
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    for build in (pretraining, first_stage):
        model = build().eval()
        report = verify(model, {**batch, "negatives": negatives})
        print(report)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
        model.train()
        losses = []
        for _ in range(args.steps):
            loss = model(**batch)["loss"]
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        captioner = model.captioner().generate if isinstance(model, BlipPretraining) else model.generate_text
        captions = captioner(batch["pixel_values"], max_new_tokens=5)[:, 1:].tolist()
        exact = sum(said[: len(row)] == row for said, row in zip(captions, map(until_end, right), strict=True))
        print(
            f"{build.__name__}: the loss fell from {losses[0]:.2f} to {losses[-1]:.2f}; {exact} of 4 captions are exact\n"
        )
        learnt = learnt and report.passed and exact >= 3
    return int(not learnt)


def until_end(ids: list[int]) -> list[int]:
    """A caption's words and [SEP]."""
    return ids[: ids.index(SEP) + 1]


if __name__ == "__main__":
    sys.exit(main())
