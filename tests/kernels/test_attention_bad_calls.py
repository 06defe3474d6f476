"""What attention and its masks say about arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mllm_fast.kernels.attention import Mask, MediaRanges, MediaSubsets, attention

Z = torch.zeros(2, 3, 4, 8)
ONES = torch.ones(2, 3, dtype=torch.int64)
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "three dims": ({"q": Z[0]}, r"expected \[batch, length, heads, head_dim\]"),
    "v unlike k": ({"v": Z[:, :2]}, "they must have one shape"),
    "head dims": ({"q": Z[..., :4]}, "head_dim 4 and k has 8"),
    "heads": ({"k": Z[:, :, :3], "v": Z[:, :, :3]}, "must be a multiple"),
    "batch": ({"q": torch.zeros(3, 3, 4, 8)}, "kv_index must say"),
    "dtypes": ({"k": Z.half()}, "k is torch.float16, but q is torch.float32; cast"),
    "integers": ({"q": Z.int(), "k": Z.int(), "v": Z.int()}, "expected one of torch.float64"),
    "devices": ({"k": Z.to("meta")}, "move them to one device"),
    "half an extra": ({"extra_k": Z}, "pass both or neither"),
    "extra heads": ({"extra_k": Z[:, :, :2], "extra_v": Z[:, :, :2]}, "expected one shape"),
    "extra batch": ({"extra_k": torch.zeros(3, 1, 4, 8), "extra_v": torch.zeros(3, 1, 4, 8)}, "has 3 batch rows"),
    "extra dtype": ({"extra_k": Z.half(), "extra_v": Z.half()}, "extra_k is torch.float16"),
    "index shape": ({"kv_index": torch.zeros(3, dtype=torch.int64)}, r"expected \[batch=2\]"),
    "index dtype": ({"kv_index": torch.zeros(2)}, "of int32 or int64"),
    "index value": ({"kv_index": torch.tensor([0, 2])}, r"kv_index\[1\] is 2, but k has 2 rows"),
    "lengths": ({"mask": Mask(key_lengths=torch.tensor([1]))}, "1 entries for a batch of 2"),
    "padding": ({"mask": Mask(key_padding=torch.ones(2, 4).bool())}, r"expected \[batch=2, keys=3\]"),
    "prefix": ({"mask": Mask(causal=True, prefix=4)}, "prefix is 4, but there are 3 keys"),
    "media keys": ({"mask": Mask(media=MediaRanges(ONES, ONES, 2, 2))}, "4 keys. But k has 3"),
    "media rows": ({"mask": Mask(media=MediaRanges(ONES[:, :2], ONES[:, :2], 3, 1))}, r"expected its first two sizes"),
    "subset keys": ({"mask": Mask(media=MediaSubsets(ONES[..., None], 2, 2))}, "4 keys. But k has 3"),
    "subset bits": ({"mask": Mask(media=MediaSubsets(ONES[..., None] * 8, 3, 1))}, "shows image 3, but there are 3"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    changes, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        attention(**({"q": Z, "k": Z, "v": Z} | changes))


BAD_MASKS: dict[str, tuple[Any, str]] = {
    "lengths": (lambda: Mask(key_lengths=ONES), r"expected \[batch\]"),
    "lengths dtype": (lambda: Mask(key_lengths=torch.ones(2)), "of int32 or int64"),
    "padding": (lambda: Mask(key_padding=ONES), "of torch.bool"),
    "prefix": (lambda: Mask(prefix=-1), "0 or more"),
    "prefix alone": (lambda: Mask(prefix=1), "without causal=True"),
    "media": (lambda: Mask(media=ONES), "expected MediaRanges or MediaSubsets"),  # type: ignore[arg-type]
    "range dims": (lambda: MediaRanges(ONES[0], ONES[0], 1, 1), r"expected \[batch or 1, length\]"),
    "range shapes": (lambda: MediaRanges(ONES, ONES[:1], 1, 1), "they must have one shape"),
    "range dtype": (lambda: MediaRanges(ONES.float(), ONES.float(), 1, 1), "of int32 or int64"),
    "images": (lambda: MediaRanges(ONES, ONES, -1, 1), "images is -1"),
    "tokens": (lambda: MediaRanges(ONES, ONES, 1, 0), "tokens_per_image is 0"),
    "beyond": (lambda: MediaRanges(ONES, ONES, 1, 1, "nan"), "choose 'zero' or 'mean'"),  # type: ignore[arg-type]
    "word dims": (lambda: MediaSubsets(ONES, 1, 1), "from_mask"),
    "word count": (lambda: MediaSubsets(ONES[..., None], 65, 1), "65 images need 2"),
    "from mask": (lambda: MediaSubsets.from_mask(ONES, 1), "of torch.bool"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks(name: str) -> None:
    make, message = BAD_MASKS[name]
    with pytest.raises(ValueError, match=message):
        make()
