"""Integer arithmetic for launchers. `triton.cdiv` and `triton.next_power_of_2` also serve inside of kernels, and the
wrapping that this takes costs 6 microseconds a call on the host, a good part of a launch.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 1 for n below 2."""
    return 1 << max(n - 1, 0).bit_length()
