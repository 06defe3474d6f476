"""Replay the image side of a model as CUDA graphs: recorded the second time a shape is met. Needs a GPU to record.

python examples/cuda_graphs.py --model llava-hf/llava-1.5-7b-hf
"""

from __future__ import annotations

import argparse

import tiny_model

import mllm_fast
from mllm_fast.pipeline import drawn_image, load_pipeline


def main() -> None:
    """Fuse with graphs, generate three times, and say what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the hub; default: a tiny model")
    args = parser.parse_args()
    pipeline = load_pipeline(tiny_model.folder(args.model), fuse=False)
    mllm_fast.fuse(pipeline.model, cuda_graphs=True)
    for _ in range(3):
        answers = pipeline.generate([drawn_image()], max_new_tokens=4, do_sample=False)
    print(answers)
    # Fusing again with the same options changes nothing, and tells how things stand.
    for row in mllm_fast.fuse(pipeline.model, cuda_graphs=True).graphs:
        print(f"{row.path or 'the model itself'}: {row.status}")


if __name__ == "__main__":
    main()
