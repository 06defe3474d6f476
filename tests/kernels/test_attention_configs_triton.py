"""Launch configurations of attention's Triton kernels: which are chosen, and that all give the same result."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fast.kernels.attention import Mask, MediaRanges, MediaSubsets, configs, triton_launch
from mllm_fast.kernels.attention.configs import Config, Media
from mllm_fast.kernels.attention.settings import settings_of
from mllm_fast.kernels.target import ARCHITECTURES, Arch, arch_of
from tests.kernels.attention_dense import gradients, visible
from tests.kernels.attention_on_triton import check, exact, moved, on_triton, qkv, random
from tests.kernels.test_attention_media import phi
from tests.kernels.triton_device import DEVICE, INTERPRETING, poisoned, require_triton  # noqa: F401

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


def choices(architectures: tuple[Arch, ...], widths: tuple[int, ...], itemsizes: tuple[int, ...], medias: Any) -> Any:
    """All configurations that the functions of `configs` can choose: for forward, dQ, and dK with dV."""
    found: tuple[dict[Config, None], ...] = ({}, {}, {})
    for arch, width, itemsize, media in itertools.product(architectures, widths, itemsizes, medias):
        for rows, burden in itertools.product((1, 16, 17, 32, 33, 64, 65, 4096), (0, 1, 2, 4, 6)):
            for tiles in (1, 1 << 20):
                found[0][configs.forward_config(arch, rows, tiles, width, itemsize, media, burden)] = None
            found[1][configs.query_gradient_config(arch, rows, width, itemsize, media, burden)] = None
            found[2][configs.key_gradient_config(arch, rows, width, itemsize, media, burden)] = None
    return [list(configurations) for configurations in found]


# The interpreter knows neither warps nor stages: a tile is a configuration.
MEDIA = (None, Media(16, 1), Media(64, 1), Media(1601, 1), Media(64, 2))
TILES = [
    sorted({(c.BM, c.BN) for c in configurations})
    for configurations in choices(ARCHITECTURES, (16, 64, 72, 96, 128, 256), (2, 4), MEDIA)
]
PARTS = ((1, 1), (2, 1), (1, 3), (2, 2))
# What is not under test, in few steps.
LARGE = {"config": Config(64, 64, 4, 2), "query_config": Config(64, 64, 4, 2), "key_config": Config(64, 64, 4, 2)}
KINDS = ("causal", "media", "two sources")


def shrunk(kind: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves and further arguments of a small call: beams that share keys, grouped heads, odd lengths."""
    leaves = random((2, 21, 2, 8), *((1, 42, 1, 8),) * 2)
    if kind == "two sources":
        return [*leaves, *random(*((1, 19, 1, 8),) * 2)], {}
    if kind == "media":
        return leaves, {"mask": Mask(media=phi(torch.arange(21)[None].expand(2, -1) % 9 == 3, 2, 21, "mean"))}
    return leaves, {"mask": Mask(causal=True, prefix=5)}


def run(leaves: list[Tensor], settings: dict[str, Any], grad: Tensor, **forced: Any) -> dict[str, Tensor]:
    """The results of the launchers, with some of their choices forced."""
    q, k, v, extra_k, extra_v = [*(x.detach() for x in leaves), None, None][:5]
    flat = settings_of(settings.get("mask"), None, q.shape[3] ** -0.5, 0.0, 0, q.device)
    forward = {name: forced[name] for name in ("config", "splits") if name in forced}
    out, lse = triton_launch.forward(q, k, v, extra_k, extra_v, flat, **forward)
    found = {"out": out}
    if "forward" not in forced:
        backward = {name: forced[name] for name in ("query_config", "key_config", "parts") if name in forced}
        gradients = triton_launch.backward(grad, q, k, v, extra_k, extra_v, out, lse, flat, **backward)
        found |= {str(i): g for i, g in enumerate(gradients) if g is not None}
    return found


def exactly(leaves: list[Tensor], settings: dict[str, Any], grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = [x.detach().cpu().to(dtype).requires_grad_() for x in leaves]
    out = exact(inputs, **settings)
    return {"out": out} | {str(i): g for i, g in enumerate(gradients(out, inputs, grad.cpu().to(dtype)))}


class TestAllConfigurations:
    """Every configuration gives the same result, up to rounding: here each is held against the exact one."""

    def check(self, kind: str, forced: list[dict[str, Any]]) -> None:
        leaves, settings = shrunk(kind)
        given, grad = [x.to(DEVICE) for x in leaves], torch.randn(leaves[0].shape)
        expected = exactly(leaves, settings, grad, torch.float64)
        for choice in forced:
            for name, found in run(given, settings, grad.to(DEVICE), **choice).items():
                torch.testing.assert_close(
                    found.cpu().double(), expected[name], rtol=1e-4, atol=2e-5, msg=lambda m, c=choice: f"{c}: {m}"
                )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tile", TILES[0], ids=str)
    def test_forward(self, tile: tuple[int, int], kind: str) -> None:
        config = Config(*tile, 4, 2)
        self.check(kind, [{"forward": True, "config": config, "splits": splits} for splits in (1, 2, 4)])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tile", TILES[1], ids=str)
    def test_query_gradient(self, tile: tuple[int, int], kind: str) -> None:
        self.check(kind, [LARGE | {"query_config": Config(*tile, 4, 2)}])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tile", TILES[2], ids=str)
    def test_key_gradients(self, tile: tuple[int, int], kind: str) -> None:
        self.check(kind, [LARGE | {"key_config": Config(*tile, 4, 2), "parts": parts} for parts in PARTS])

    @pytest.mark.gpu
    @pytest.mark.skipif(INTERPRETING, reason="compiles what the interpreter runs otherwise")
    @pytest.mark.parametrize("kind", ["Q-Former", "media", "decode"])
    def test_at_real_shapes(self, kind: str) -> None:
        images, tokens, queries = 33, 64, 1120
        settings: dict[str, Any] = {}
        leaves = random((2, 32, 12, 64), *((2, 257, 12, 64),) * 2)
        if kind == "decode":
            leaves = random((1, 1, 32, 128), *((1, 6404, 8, 128),) * 2)
        if kind == "media":
            leaves = random((1, queries, 8, 64), *((1, images * tokens, 8, 64),) * 2)
            settings = {"mask": Mask(media=phi(torch.arange(queries)[None] % 34 == 3, images, tokens))}
        leaves = [x.bfloat16() for x in leaves]
        grad = torch.randn(leaves[0].shape).bfloat16()
        expected, unfused = (exactly(leaves, settings, grad, t) for t in (torch.float64, torch.bfloat16))
        media = Media(tokens, 1) if kind == "media" else None
        width = leaves[0].shape[3]
        forward, queries_, keys = choices((arch_of(torch.device("cuda", 0)),), (width,), (2,), (media,))
        forced: list[dict[str, Any]] = [{"forward": True, "config": config} for config in forward]
        if kind == "decode":
            forced += [{"forward": True, "splits": splits} for splits in (1, 2, 4)]
        else:
            forced += [{"query_config": config} for config in queries_]
            forced += [{"key_config": config, "parts": parts} for config in keys for parts in PARTS]
        given, grad = [x.cuda() for x in leaves], grad.cuda()
        for choice in forced:
            for name, found in run(given, settings, grad, **choice).items():
                reference = expected[name]
                error, allowed = (x.cpu().double() - reference for x in (found, unfused[name]))
                assert error.norm() <= 2 * allowed.norm(), f"{choice}: {name}"
                assert error.abs().max() <= 2 * allowed.abs().max(), f"{choice}: {name}"

    @pytest.mark.parametrize(
        ("programs", "fold", "tiles", "images", "expected"),
        [
            (8, 64, 2, 0, (32, 1)),
            (8, 1, 35, 1, (1, 8)),
            (1, 4, 60, 0, (4, 8)),
            (264, 64, 9, 0, (1, 1)),
            (16, 1, 3, 0, (1, 1)),
        ],
    )
    def test_choice_of_parts(
        self, programs: int, fold: int, tiles: int, images: int, expected: tuple[int, int]
    ) -> None:
        assert configs.parts_for("sm_90", programs, fold, tiles, images) == expected


@pytest.mark.parametrize(
    ("kind", "rows", "keys"),
    [
        ("plain", 0, [0]),
        ("prefix", 3, [3]),
        ("two sources", 3, [2, 1]),
        ("beyond", 2, [2]),
        ("beyond, two sources", 2, [1, 1]),
    ],
)
def test_what_a_call_has_besides_is_counted(
    kind: str, rows: int, keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[int]] = {}
    for name in ("forward_config", "query_gradient_config", "key_gradient_config"):

        def chosen(*arguments: Any, _name: str = name) -> Config:
            found.setdefault(_name, []).append(arguments[-1])
            return Config(16, 16, 4, 1)

        monkeypatch.setattr(configs, name, chosen)
    leaves = qkv(2, 5, 6)
    settings: dict[str, Any] = {} if kind == "plain" else {"dropout_p": 0.5, "seed": 1}
    if kind == "prefix":
        settings["mask"] = Mask(key_padding=torch.ones(2, 6).bool(), causal=True, prefix=2)
    if kind == "two sources":
        settings["mask"] = Mask(key_lengths=torch.tensor([4, 6]))
    if "beyond" in kind:
        settings["mask"] = Mask(media=phi(torch.eye(5)[:2].bool(), 3, 2, "mean"))
    if "two sources" in kind:
        leaves += random((2, 3, 2, 8), (2, 3, 2, 8))
    on_triton(moved(leaves, torch.float32), **settings).sum().backward()
    assert found == {"forward_config": [rows], "query_gradient_config": [rows], "key_gradient_config": keys}


@pytest.mark.parametrize(
    ("width", "itemsize", "blocks"), [(72, 2, (64, 16)), (72, 4, (64, 32)), (96, 4, (64, 32)), (64, 4, (64, 0))]
)
def test_blocks_of_a_head(width: int, itemsize: int, blocks: tuple[int, int]) -> None:
    assert configs.blocks_of(width, itemsize) == blocks


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


@pytest.mark.skipif(not INTERPRETING, reason="counts the steps of the interpreter")
@pytest.mark.parametrize("causal", [False, True])
def test_padded_text_takes_no_more_steps_than_text_without_padding(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BLIP's rows that see nothing are written as media; that must not narrow the blocks of keys."""
    from mllm_fast.kernels.attention import triton_rows
    from mllm_fast.modules.med import visible_mask

    steps = [0]
    step = triton_rows._step

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps[-1] += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(triton_rows, "_step", counted)
    leaves = moved(qkv(2, 35, 35), torch.float32)
    visible = torch.ones(2, 35).bool()
    for hidden in (0, 3):
        visible[1, :hidden] = False  # padding on the left: causal rows there see nothing
        with torch.no_grad():
            on_triton(leaves, mask=visible_mask(visible, 35, 35, causal=causal))
        steps.append(0)
    without, with_padding, _ = steps
    # A row beyond the image reads all keys, which a causal tile otherwise would not.
    tiles = 2 if causal else 1
    assert 0 < with_padding <= without * tiles
