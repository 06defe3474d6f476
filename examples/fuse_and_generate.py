"""Generate with a model as it is, then with our blocks in it: the same words, and how long both took.

    python examples/fuse_and_generate.py --model llava-hf/llava-1.5-7b-hf --image photograph.jpg --prompt "What is this?"

Without arguments it builds a tiny model with random weights, on which there is nothing to gain.
"""

from __future__ import annotations

import argparse
import time

import tiny_model
import torch

import mllm_fast
from mllm_fast.pipeline import drawn_image, load_pipeline, read_image


def main() -> None:
    """Load, generate, fuse, generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the hub; default: a tiny model")
    parser.add_argument("--image", nargs="*", help="image files; default: a drawn one")
    parser.add_argument("--prompt", default="describe the image.")
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    images = [read_image(path) for path in args.image or ()] or [drawn_image()]
    # fp32 where the tiny model is used: in 16 bit two words can be so close that rounding decides.
    dtype = torch.float32 if args.model is None else None
    pipeline = load_pipeline(tiny_model.folder(args.model), fuse=False, dtype=dtype)

    def generate() -> tuple[list[str], float]:
        pipeline.generate(images, args.prompt, max_new_tokens=2)  # warm up
        began = time.perf_counter()
        answers = pipeline.generate(images, args.prompt, max_new_tokens=args.new_tokens, do_sample=False)
        return answers, time.perf_counter() - began

    unfused, before = generate()
    print(mllm_fast.fuse(pipeline.model))
    fused, after = generate()
    print(f"unfused, {before:.3f} s: {unfused}")
    print(f"fused,   {after:.3f} s: {fused}")
    print("the same" if fused == unfused else "not the same: run mllm-fast verify to see whether rounding explains it")


if __name__ == "__main__":
    main()
