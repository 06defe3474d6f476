"""Does fusing change what a model computes? Its errors against a wider dtype, unfused and fused, as a table and as JSON.

    python examples/verify_model.py --model Salesforce/instructblip-flan-t5-xl --out report.json

`mllm-fast verify MODEL` does the same.
"""

from __future__ import annotations

import argparse
import sys

import tiny_model

from mllm_fast.pipeline import drawn_image, load_pipeline
from mllm_fast.verification import verify


def main() -> int:
    """0: fusing changed nothing but rounding; 1: it did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the hub; default: a tiny model")
    parser.add_argument("--out", help="write the report as JSON")
    args = parser.parse_args()
    pipeline = load_pipeline(tiny_model.folder(args.model), fuse=False)
    report = verify(pipeline.model, pipeline.inputs([drawn_image()], "describe the image."), new_tokens=4)
    print(report)
    if args.out:
        print(f"written to {report.save(args.out)}")
    return int(not report.passed)


if __name__ == "__main__":
    sys.exit(main())
