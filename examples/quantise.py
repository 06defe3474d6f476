"""Quantise the language model of a model to 4 or 8 bits, generate, save it, and load the same bytes back.

python examples/quantise.py --model Salesforce/blip2-opt-2.7b --llm nf4 --out blip2-nf4
"""

from __future__ import annotations

import argparse
import tempfile

import tiny_model
import torch

import mllm_fast
from mllm_fast.pipeline import drawn_image, load_pipeline


def main() -> None:
    """Load quantised, report, generate, save, load again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the hub; default: a tiny model")
    parser.add_argument("--llm", choices=("nf4", "fp4", "int8"), default="nf4")
    parser.add_argument("--out", help="folder for the quantised model; default: a temporary one")
    args = parser.parse_args()

    # Each weight is quantised as it is read, so that the whole model is never in memory in 16 bit.
    pipeline = load_pipeline(tiny_model.folder(args.model), llm=args.llm)
    print(mllm_fast.quantization_report(pipeline.model))
    print(pipeline.generate([drawn_image()], max_new_tokens=8, do_sample=False))

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or temporary
        pipeline.model.save_pretrained(folder)
        again = mllm_fast.load(folder, dtype=None)
    pairs = zip(pipeline.model.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a.cpu(), b.cpu()) for (name, a), (other, b) in pairs)
    print("saved and loaded: every byte is the same")


if __name__ == "__main__":
    main()
