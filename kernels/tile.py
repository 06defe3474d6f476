"""Tile maths that the Triton kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl


def split_width(width: int) -> tuple[int, int]:
    """(first, second) block widths that cover `width`: powers of two of at least 16, second 0 where one block will do.

    tl.dot takes powers of two. A head dimension of 80 is then 64 + 16 columns instead of 128.
    """
    if width <= 16:
        return 16, 0
    first = 1 << (width.bit_length() - 1)
    if first == width:
        return first, 0
    second = max(16, 1 << (width - first - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


# Constants stand in functions: Triton compares the global variables that a kernel reads with what they were, at every launch.
@triton.jit
def to_base_2(x):
    """x * log2(e): exp(x) = exp2(to_base_2(x))."""
    return x * 1.4426950408889634


@triton.jit
def to_base_e(x):
    """x * ln(2), the reverse."""
    return x * 0.6931471805599453


@triton.jit
def load_rows(p_base, o_rows, m_rows, START: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Columns START to START + WIDTH (0 from LIMIT on) of the rows at offsets o_rows; 0 where not m_rows (None: all)."""
    o_d = START + tl.arange(0, WIDTH)
    p_block = p_base + o_rows[:, None] + o_d[None, :]
    if START + WIDTH > LIMIT:
        if m_rows is None:
            b_block = tl.load(p_block, mask=(o_d < LIMIT)[None, :], other=0.0)
        else:
            b_block = tl.load(p_block, mask=m_rows[:, None] & (o_d < LIMIT)[None, :], other=0.0)
    else:
        if m_rows is None:
            b_block = tl.load(p_block)
        else:
            b_block = tl.load(p_block, mask=m_rows[:, None], other=0.0)
    return b_block  # [rows, WIDTH]


@triton.jit
def store_rows(p_base, o_rows, m_rows, b_block, START: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """The reverse of `load_rows`, rounded to the dtype of the pointer."""
    o_d = START + tl.arange(0, WIDTH)
    p_block = p_base + o_rows[:, None] + o_d[None, :]
    b_block = b_block.to(p_base.dtype.element_ty)
    if START + WIDTH > LIMIT:
        tl.store(p_block, b_block, mask=m_rows[:, None] & (o_d < LIMIT)[None, :])
    else:
        tl.store(p_block, b_block, mask=m_rows[:, None])


@triton.jit
def row_offsets(o_row, inner, s_outer, s_inner):
    """Where rows o_row of [outer, inner, ...] begin."""
    return (o_row // inner).to(tl.int64) * s_outer + (o_row % inner).to(tl.int64) * s_inner


@triton.jit
def bits_below(n):
    """int64 with the bits 0 to n - 1 set; none for n <= 0, all for n >= 64."""
    n = n.to(tl.int64)
    b_shift = tl.minimum(tl.maximum(n, 0), 63)
    b_some = (tl.full(n.shape, 1, tl.int64) << b_shift) - 1
    return tl.where(n >= 64, -1, b_some)


@triton.jit
def lowest_bit(word):
    """The place of the lowest set bit of an int64 scalar that is not 0."""
    # A power of two is exact in fp32, so that its exponent is the place; bit 63 gives -2^63, the same but for the sign.
    power = (word & -word).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def kept(seed, dropout_p, o_first, o_second):
    """[len(first), len(second)] bool: True with probability 1 - dropout_p, a function of the seed and the two numbers.

    Philox-4x32 with 7 rounds, the fewest that pass TestU01's BigCrush (Salmon et al., SC 2011, table 2). Three of its
    four outputs stay unused: they could only serve the neighbours of a number, and a tile may begin at any (key 257 of
    the second image), so that neighbours are not the same four in every tile.
    """
    b_zero = o_first[:, None] * 0 + o_second[None, :] * 0
    b_random, _, _, _ = tl.philox(seed, o_first[:, None] + b_zero, o_second[None, :] + b_zero, b_zero, b_zero, 7)
    return tl.uint_to_uniform_float(b_random) >= dropout_p


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)) in fp32."""
    return 1.0 / (1.0 + tl.exp2(to_base_2(-b_x)))


@triton.jit
def tanh(b_x):
    """The hyperbolic tangent in fp32, also near 0 accurate to a few units in the last place."""
    b_e = tl.exp2(to_base_2(-2.0 * tl.abs(b_x)))
    b_far = (1.0 - b_e) / (1.0 + b_e)
    b_far = tl.where(b_x < 0.0, -b_far, b_far)
    # Near 0 the difference above cancels; the series errs by less than 1e-8 below 0.25.
    b_s = b_x * b_x
    b_near = b_x * (1.0 + b_s * (-1 / 3 + b_s * (2 / 15 + b_s * (-17 / 315 + b_s * (62 / 2835)))))
    return tl.where(tl.abs(b_x) < 0.25, b_near, b_far)


@triton.jit
def activate(b_x, ACTIVATION: tl.constexpr):
    """The activation of that name in `linear.activations`, in fp32; "swiglu" and "geglu" name the function of their gate."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        b_x = 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        b_x = b_x * sigmoid(1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x))
    elif ACTIVATION == "quick_gelu":
        b_x = b_x * sigmoid(1.702 * b_x)
    elif ACTIVATION == "relu":
        b_x = _relu(b_x)
    elif ACTIVATION == "squared_relu":
        b_x = _relu(b_x)
        b_x = b_x * b_x
    elif ACTIVATION == "silu" or ACTIVATION == "swiglu":
        b_x = b_x * sigmoid(b_x)
    else:
        tl.static_assert(ACTIVATION == "", "an activation that the kernels do not know")
    return b_x


@triton.jit
def _relu(b_x):
    # NaN stays NaN, as in torch; tl.maximum would make it 0.
    return tl.where(b_x < 0.0, 0.0, b_x)


@triton.jit
def activation_gradient(b_x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at x, in fp32."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        b_density = 0.3989422804014327 * tl.exp2(to_base_2(-0.5 * b_x * b_x))
        b_d = 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476)) + b_x * b_density
    elif ACTIVATION == "gelu_tanh":
        b_inner = 1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x)
        b_s = sigmoid(b_inner)
        b_d = b_s + b_x * b_s * (1.0 - b_s) * (1.5957691216057308 * (1.0 + 0.134145 * b_x * b_x))
    elif ACTIVATION == "quick_gelu":
        b_s = sigmoid(1.702 * b_x)
        b_d = b_s + 1.702 * b_x * b_s * (1.0 - b_s)
    elif ACTIVATION == "relu":
        b_d = tl.where(b_x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "squared_relu":
        b_d = 2.0 * _relu(b_x)
    else:
        tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "swiglu", "an activation that the kernels do not know")
        b_s = sigmoid(b_x)
        b_d = b_s + b_x * b_s * (1.0 - b_s)
    return b_d


@triton.jit
def row_statistics(
    p_base, o_rows, m_rows, width, eps, RMS: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr
):
    """(mean [ROWS], rstd [ROWS]) in fp32 of rows at offsets o_rows, `width` elements each, BC at a time.

    Layer norm: rstd = rsqrt(variance + eps). RMS: the mean is 0, and rstd = rsqrt(mean square + eps). Each of the BC
    lanes of a row keeps the mean and the squared deviations of its own elements (Welford 1962), and the lanes are merged
    at the end (Chan et al. 1983): nothing cancels, however far the mean is from 0. Rows that are not m_rows count as 0.
    """
    o_c = tl.arange(0, BC)
    b_mean = tl.zeros([ROWS, BC], tl.float32)
    b_m2 = tl.zeros([ROWS, BC], tl.float32)
    for c in tl.range(0, width, BC, num_stages=STAGES):
        m_c = c + o_c < width
        b_x = tl.load(p_base + o_rows[:, None] + (c + o_c)[None, :], mask=m_rows[:, None] & m_c[None, :], other=0.0)
        b_x = b_x.to(tl.float32)
        if RMS:
            b_m2 += b_x * b_x
        else:
            b_d = b_x - b_mean
            # A lane past the end keeps what it has.
            b_step = tl.where(m_c, 1.0 / (c // BC + 1), 0.0)  # [BC]
            b_mean += b_d * b_step[None, :]
            b_m2 += tl.where(m_c[None, :], b_d * (b_x - b_mean), 0.0)
    if RMS:
        b_row = tl.zeros([ROWS], tl.float32)
        b_square = tl.sum(b_m2, 1) / width
    else:
        b_count = ((width - o_c + BC - 1) // BC).to(tl.float32)  # [BC] elements of each lane
        b_row = tl.sum(b_mean * b_count[None, :], 1) / width
        b_d = b_mean - b_row[:, None]
        b_square = (tl.sum(b_m2, 1) + tl.sum(b_d * b_d * b_count[None, :], 1)) / width
    return b_row, tl.rsqrt(b_square + eps)
