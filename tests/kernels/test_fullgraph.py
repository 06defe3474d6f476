"""Every op in one graph: torch.compile(fullgraph=True) of it, inference and training, equals the eager call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fast import ops
from mllm_fast.kernels import runtime
from mllm_fast.kernels.attention import registered
from mllm_fast.kernels.attention.settings import settings_of
from mllm_fast.kernels.linear import pack_weight, packed_linear

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(call: Call, *tensors: Tensor, backend: str = "aot_eager", exact: bool = True) -> None:
    """One graph each for training and inference; results and gradients as without.

    `exact`: bit by bit. A traced linear layer does not choose between GEMM libraries, and so may round otherwise.
    """

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        # Something before and after, so that the op is not the whole graph.
        return tuple(x + 1 for x in outputs(call(*(x * 2 if x.is_floating_point() else x for x in given))))

    close = (
        torch.equal
        if exact
        else lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=4e-3 * float(b.detach().abs().max()))
    )
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    expected, found = step(*tensors), compiled(*tensors)
    assert len(expected) == len(found)
    assert all(map(close, expected, found))
    leaves = [x for x in tensors if x.requires_grad]
    grads = [torch.randn_like(x) for x in expected]
    wanted, got = (torch.autograd.grad(x, leaves, grads, allow_unused=True) for x in (expected, found))
    for leaf, *both in zip(leaves, got, wanted, strict=True):
        # Where there is no path, a traced op may say 0 instead of nothing.
        assert close(*(torch.zeros_like(leaf) if x is None else x for x in both))
    with torch.no_grad():
        expected = step(*tensors)
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        assert all(map(close, expected, compiled(*tensors)))


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


BATCH, QUERIES, IMAGES, TOKENS = 2, 5, 3, 4
KEYS = IMAGES * TOKENS
FIRST = torch.tensor([[0, 0, 1, 2, 3], [1, 1, 0, 0, 4]])
MASKS: dict[str, Callable[[], ops.Mask | None]] = {
    "none": lambda: None,
    "empty": lambda: ops.Mask(),
    "lengths": lambda: ops.Mask(key_lengths=torch.tensor([7, 0])),
    "padding": lambda: ops.Mask(key_padding=torch.arange(BATCH * KEYS).view(BATCH, KEYS) % 3 > 0),
    "causal": lambda: ops.Mask(causal=True),
    "prefix": lambda: ops.Mask(causal=True, prefix=9, key_padding=torch.ones(BATCH, KEYS).bool()),
    "ranges": lambda: ops.Mask(media=ops.MediaRanges(FIRST, FIRST + 1, IMAGES, TOKENS)),
    "mean beyond": lambda: ops.Mask(media=ops.MediaRanges(FIRST, FIRST + 1, IMAGES, TOKENS, "mean")),
    "nothing seen": lambda: ops.Mask(media=ops.MediaRanges(FIRST, FIRST, IMAGES, TOKENS)),
    "subsets": lambda: ops.Mask(media=ops.MediaSubsets((FIRST.unsqueeze(-1) * 5) % 8, IMAGES, TOKENS)),
    "made inside, causal": lambda: ops.Mask(
        key_lengths=torch.tensor([7, 3]),
        causal=True,
        media=ops.MediaSubsets.from_mask(FIRST.unsqueeze(-1) >= torch.arange(IMAGES), TOKENS),
    ),
}


class TestAttention:
    @pytest.mark.parametrize("inside", [False, True], ids=["given", "made in the graph"])
    @pytest.mark.parametrize("kind", MASKS)
    def test_every_mask(self, kind: str, inside: bool) -> None:
        made = MASKS[kind]()
        check(
            lambda q, k, v: ops.attention(q, k, v, mask=MASKS[kind]() if inside else made),
            *random((BATCH, QUERIES, 4, 8), *((BATCH, KEYS, 2, 8),) * 2),
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("forced", ["auto", "torch"])
    def test_dtypes_and_two_sources(self, dtype: torch.dtype, forced: str) -> None:
        mask, index = MASKS["ranges"](), torch.tensor([1, 0])
        leaves = random((BATCH, QUERIES, 4, 8), *((2, KEYS, 2, 8),) * 2, *((1, 3, 2, 8),) * 2, dtype=dtype)
        with runtime.backend(forced):
            check(
                lambda q, k, v, *e: ops.attention(q, k, v, extra_k=e[0], extra_v=e[1], mask=mask, kv_index=index),
                *leaves,
            )

    def test_shared_rows_and_odd_strides(self) -> None:
        q, k, v = random((1, QUERIES, 4, 8), (1, 2, 8, KEYS), (1, 2, KEYS, 8))
        check(lambda q, k, v: ops.attention(q.expand(3, -1, -1, -1), k.permute(0, 3, 1, 2), v.transpose(1, 2)), q, k, v)

    def test_autocast(self) -> None:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return ops.attention(q, k, v, mask=MASKS["lengths"]())

        check(call, *random((BATCH, QUERIES, 4, 8), *((BATCH, KEYS, 2, 8),) * 2))

    def test_dropout(self) -> None:
        leaves = random((BATCH, QUERIES, 4, 8), *((BATCH, KEYS, 2, 8),) * 2)
        check(lambda q, k, v: ops.attention(q, k, v, dropout_p=0.4, seed=7), *leaves)
        drawn = torch.compile(lambda q, k, v: ops.attention(q, k, v, dropout_p=0.4), fullgraph=True)
        assert not torch.equal(drawn(*leaves), drawn(*leaves))

    def test_any_length_is_one_graph(self) -> None:
        compiled = torch.compile(
            lambda q, k, v: ops.attention(q, k, v, mask=ops.Mask(causal=True)),
            backend="aot_eager", fullgraph=True, dynamic=True,
        )  # fmt: skip
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (5, 6, 9):
                leaves = random(*((2, length, 2, 8),) * 3)
                assert torch.equal(compiled(*leaves), ops.attention(*leaves, mask=ops.Mask(causal=True)))

    def test_masks_that_change_their_values(self) -> None:
        """What a mask says is read in each call, also where a tensor was written to without a trace."""
        compiled = torch.compile(
            lambda lengths, *qkv: ops.attention(*qkv, mask=ops.Mask(key_lengths=lengths)),
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        leaves, lengths = random((BATCH, QUERIES, 4, 8), *((BATCH, KEYS, 2, 8),) * 2), torch.tensor([7, 3])
        for value in (7, 2, 7, 12):
            lengths.numpy()[0] = value
            expected = ops.attention(*leaves, mask=ops.Mask(key_lengths=torch.tensor([value, 3])))
            assert torch.equal(compiled(lengths, *leaves), expected)

    def test_inductor(self) -> None:
        mask = MASKS["made inside, causal"]()
        leaves = random((BATCH, QUERIES, 4, 8), *((BATCH, KEYS, 2, 8),) * 2)
        check(lambda q, k, v: ops.attention(q, k, v, mask=mask), *leaves, backend="inductor", exact=False)

    def test_a_wrong_mask_is_refused(self) -> None:
        leaves = random((BATCH, QUERIES, 4, 8), *((BATCH, KEYS, 2, 8),) * 2)
        words = torch.full((BATCH, QUERIES, 1), 1 << IMAGES)
        mask = ops.Mask(media=ops.MediaSubsets(words, IMAGES, TOKENS))
        compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v, mask=mask), backend="aot_eager", fullgraph=True)
        with pytest.raises(ValueError, match="there are 3 images"):
            compiled(*leaves)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["none", "lengths", "mean beyond", "nothing seen", "subsets"])
    def test_opcheck(self, kind: str, dtype: torch.dtype, training: bool) -> None:
        leaves = random((BATCH, QUERIES, 4, 8), *((BATCH, KEYS, 2, 8),) * 2, dtype=dtype)
        if kind == "lengths":
            leaves += random(*((1, 3, 2, 8),) * 2, dtype=dtype)
        inputs = [*leaves, None, None][:5]
        if not training:
            inputs = [x if x is None else x.detach() for x in inputs]
        s = settings_of(MASKS[kind](), None, 0.3, 0.2, 0, torch.device("cpu"))
        numbers = (s.causal, s.prefix, s.images, s.tokens, s.beyond_mean, s.scale, s.dropout_p, False, training)
        torch.library.opcheck(registered.attention_op, (*inputs, *s.tensors, torch.tensor(7), *numbers))


@pytest.mark.parametrize("padded", [False, True])
def test_absorbed_attention(padded: bool) -> None:
    visible = torch.arange(7) < torch.tensor([[7], [3]])
    leaves = random((2, 3, 2, 8), (2, 7, 12), (16, 12), (16, 12), (16,))
    check(lambda *x: ops.absorbed_attention(*x, key_padding=visible if padded else None), *leaves)
    check(lambda q, *x: ops.absorbed_attention(q[:1].expand(2, -1, -1, -1), *x), *leaves)


# Large enough for the GEMMs that go to oneDNN.
ROWS, WIDTH = 64, 160


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestLinear:
    @pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", None])
    @pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
    def test_norm_linear(self, kind: Any, activation: str | None, dtype: torch.dtype) -> None:
        def call(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
            norm = None if kind is None else ops.Norm(kind, scale)
            gated = {"gate_weight": gate} if activation == "swiglu" else {}
            return ops.norm_linear(x, weight, bias, norm=norm, activation=activation, **gated)

        check(
            call, *random((ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH,), (WIDTH,), (WIDTH, WIDTH), dtype=dtype), exact=False
        )

    @pytest.mark.parametrize("kind", ["plain", "gated", "post-norm"])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_linear_residual(self, kind: str, dropout_p: float, dtype: torch.dtype) -> None:
        def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
            more: dict[str, Any] = {}
            if kind == "gated":
                more = {"gate": gate, "row_mask": torch.arange(ROWS) % 3 > 0}
            if kind == "post-norm":
                more = {"norm": ops.Norm("layer_norm", bias, bias)}
            return ops.linear_residual(x, weight, bias, residual=residual, dropout_p=dropout_p, seed=3, **more)

        check(call, *random((ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH,), (ROWS, WIDTH), (1,), dtype=dtype), exact=False)

    def test_stacked(self, dtype: torch.dtype) -> None:
        def call(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            norm = ops.Norm("layer_norm", scale, shift)
            stacked = ops.stack_weights([first, second], norms=[norm, None])
            return ops.stacked_linear(x, stacked, norm=ops.Norm("layer_norm"))

        check(call, *random((ROWS, WIDTH), (WIDTH, WIDTH), (40, WIDTH), (WIDTH,), (WIDTH,), dtype=dtype), exact=False)

    def test_grouped(self, dtype: torch.dtype) -> None:
        def call(x: Tensor, w0: Tensor, w1: Tensor, bias: Tensor) -> Tensor:
            given = {"sizes": (ROWS - 9, 9), "biases": [bias, None]}
            hidden = ops.grouped_linear(x, [w0, w1], activation="gelu", **given)
            norms = [ops.Norm("layer_norm", bias, bias), None]
            return ops.grouped_linear(
                hidden, [w1, w0], residual=x, norms=norms, dropout_p=0.2, seed=5, **given
            )  # fmt: skip

        check(call, *random((2, ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,), dtype=dtype), exact=False)

    def test_packed(self, dtype: torch.dtype) -> None:
        x, weight, bias = (t.detach() for t in random((ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH,), dtype=dtype))
        packed = pack_weight(weight)
        for backend in ("aot_eager", "inductor"):
            compiled = torch.compile(lambda x: packed_linear(x, packed, bias) + 1, backend=backend, fullgraph=True)
            torch.testing.assert_close(compiled(x), packed_linear(x, packed, bias) + 1)


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm])
def test_norms(op: Call, residual: bool, seed: int | None) -> None:
    def call(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
        more: dict[str, Any] = {"residual": other, "dropout_p": 0.3, "seed": seed} if residual else {}
        return op(x, weight, **more) if seed is not None or not residual else op(x, weight, residual=other)

    check(call, *random((ROWS, WIDTH), (WIDTH,), (ROWS, WIDTH)))


@pytest.mark.parametrize("size", [1, WIDTH])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_residual(size: int, masked: bool) -> None:
    mask = torch.arange(ROWS) % 4 > 0 if masked else None
    check(
        lambda residual, branch, gate: ops.gated_residual(residual, branch, gate, mask),
        *random((ROWS, WIDTH), (ROWS, WIDTH), (size,)),
    )
