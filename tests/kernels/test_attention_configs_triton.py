"""Launch configurations of attention's Triton kernels: which are chosen, and that all give the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mllm_fast.kernels.attention import Mask, MediaRanges, MediaSubsets, configs
from tests.kernels.attention_dense import visible
from tests.kernels.attention_on_triton import check, moved, on_triton, qkv, random
from tests.kernels.test_attention_media import phi
from tests.kernels.triton_device import INTERPRETING, poisoned, require_triton  # noqa: F401

require_triton()
pytestmark = pytest.mark.usefixtures("poisoned")


class TestSplits:
    """Decode: few rows, whose keys are split over programs and merged in a second pass."""

    @pytest.mark.parametrize("kind", ["all", "causal", "lengths", "ranges", "beyond", "subsets", "two sources"])
    @pytest.mark.parametrize("splits", [2, 8])
    def test_any_number_of_splits(self, kind: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(configs, "splits_for", lambda *_: splits)
        images, tokens = 66, 3
        keys = images * tokens
        leaves = [*random((2, 2, 2, 8), (1, keys, 1, 8), (1, keys, 1, 8))]
        mask = None
        if kind == "causal":
            mask = Mask(causal=True)
        if kind == "lengths":
            mask = Mask(key_lengths=torch.tensor([0, keys]))
        if kind in ("ranges", "beyond"):
            first, last = torch.tensor([[0, 3]]), torch.tensor([[0, 9]])
            if kind == "beyond":
                first, last = torch.tensor([[images, 60]]), torch.tensor([[images + 1, images]])
            mask = Mask(media=MediaRanges(first, last, images, tokens, "mean"))
        if kind == "subsets":
            mask = Mask(media=MediaSubsets.from_mask(torch.rand(2, 2, images) < 0.1, tokens))
        if kind == "two sources":
            leaves += random(*((1, 40, 1, 8),) * 2)
            mask = Mask(key_lengths=torch.tensor([3, keys]))
        check(leaves, mask=mask)

    @pytest.mark.parametrize(
        ("programs", "keys", "images", "expected"),
        [(1, 6404, 4, 16), (64, 6404, 4, 4), (8, 64, 0, 1), (8, 33 * 64, 33, 1)],
    )
    def test_choice(self, programs: int, keys: int, images: int, expected: int) -> None:
        assert configs.splits_for("sm_90", programs, keys, images, 64) == expected


@pytest.mark.parametrize("BM", [16, 32, 64])
@pytest.mark.parametrize("BN", [16, 64])
@pytest.mark.parametrize("kind", ["causal", "media"])
def test_all_configurations_give_the_same_result(BM: int, BN: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward_config", "query_gradient_config", "key_gradient_config"):
        monkeypatch.setattr(configs, name, lambda *_: configs.Config(BM, BN, 4, 2))
    mask = Mask(causal=True, prefix=5)
    if kind == "media":
        mask = Mask(media=phi(torch.arange(41)[None] % 11 == 3, 3, 21, "mean"))
    check(qkv(2, 41, 63, heads=4), mask=mask)


@pytest.mark.skipif(not INTERPRETING, reason="counts the steps of the interpreter")
@pytest.mark.parametrize("kind", ["ranges", "subsets", "causal"])
def test_exactly_the_key_blocks_that_a_tile_sees_are_visited(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_fast.kernels.attention import triton_keys, triton_rows

    BM, BN, images, tokens, queries = 16, 16, 9, 32, 40
    for name in ("forward_config", "query_gradient_config", "key_gradient_config"):
        monkeypatch.setattr(configs, name, lambda *_: configs.Config(BM, BN, 4, 2))
    counts = {"rows": 0, "keys": 0}
    for name, module in (("rows", triton_rows), ("keys", triton_keys)):

        def counted(*args: Any, _name: str = name, _step: Any = module._step, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _step(*args, **kwargs)

        monkeypatch.setattr(module, "_step", counted)
    first = torch.randint(0, images, (2, queries))
    first[:, 16:] = first[:, 16:17]  # all but the first tile see one range
    media: Any = MediaRanges(first, first + torch.randint(0, 3, (2, queries)), images, tokens)
    mask = Mask(media=media)
    if kind == "subsets":
        mask = Mask(media=MediaSubsets.from_mask(torch.rand(2, queries, images) < 0.02, tokens))
    if kind == "causal":
        mask = Mask(causal=True, prefix=40)
    leaves = moved(qkv(2, queries, images * tokens), torch.float32)
    out = on_triton(leaves, mask=mask)
    seen = visible(mask, 2, queries, images * tokens)
    seen = torch.nn.functional.pad(seen, (0, 0, 0, -queries % BM))
    blocks = int(seen.view(2, -1, BM, images * tokens // BN, BN).any(-1).any(2).sum()) * 2  # two heads
    assert counts["rows"] == blocks
    out.sum().backward()
    assert counts == {"rows": 2 * blocks, "keys": blocks}
