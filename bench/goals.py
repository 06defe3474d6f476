"""What our peers are to reach in a row, and whether they did.

Every goal about speed comes down to the longest time that a call may take: a share of another peer's, the bytes over a
share of memory's bandwidth, or milliseconds. Only what names a time, a ratio or a share in a row is read here, so a result
file can be judged anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goals:
    """What was set out for a row.

    Attributes:
        speedup: peer -> how many times faster than it. 1 means: not slower, as far as the noise can tell.
        max_ms: the longest that a call may take.
        bandwidth_share: of the bytes a second that this machine was measured to read, for the row's own bytes.
        max_memory_ratio: of the baseline's peak extra memory.
    """

    speedup: Mapping[str, float] = field(default_factory=dict)
    max_ms: float | None = None
    bandwidth_share: float | None = None
    max_memory_ratio: float | None = None

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __or__(self, others: Goals) -> Goals:
        """These and others; where both say something of the same, the others count."""
        said = {name: value for name, value in vars(others).items() if value}
        return Goals(**{**vars(self), **said, "speedup": {**self.speedup, **others.speedup}})


NO_GOALS = Goals()


@dataclass(frozen=True)
class Verdict:
    """One goal, judged.

    Attributes:
        goal: for people.
        reached: the same quantity as measured, for people.
        met: None where the peer to compare with was not measured.
        reliable: whether all samples that it rests on were undisturbed.
        limit_ms: the longest time that meets it; None for a goal about memory, and where `met` is.
    """

    goal: str
    reached: str
    met: bool | None
    reliable: bool
    limit_ms: float | None = None


def read(row: Row) -> Goals:
    """The goals of a row of a result file. Older files know one speed-up, over the first peer."""
    stored = dict(row.get("goals", {}))
    if "min_speedup" in stored:
        least, baseline = stored.pop("min_speedup"), next(iter(row["peers"]), None)
        stored["speedup"] = {} if least is None or baseline is None else {baseline: least}
    return Goals(**stored)


def verdicts(row: Row, name: str) -> list[Verdict]:
    """Every goal of a row, judged by one of its peers."""
    goals, peers = read(row), row["peers"]
    p, found = peers[name], []
    for other, least in goals.speedup.items():
        q, goal = peers.get(other), f"{least:g}x {other}"
        if q is None:
            found.append(Verdict(goal, "not measured", None, False))
            continue
        # As in a comparison of two runs: slower is only what is slower by more than the quartiles are apart.
        level = least == 1 and p["low_ms"] <= q["high_ms"]
        limit = q["median_ms"] / least
        met = p["median_ms"] <= limit or level
        reliable = p["reliable"] and q["reliable"]
        found.append(Verdict(goal, f"{q['median_ms'] / p['median_ms']:.2f}x", met, reliable, limit))
    limits = []
    if goals.max_ms is not None:
        limits.append((f"{goals.max_ms:g} ms", f"{p['median_ms']:.3f} ms", goals.max_ms))
    if goals.bandwidth_share is not None:
        least_ms = row["bytes"] / row["limits"]["bytes_per_s"] * 1e3
        reached = f"{least_ms / p['median_ms']:.0%}"
        limits.append((f"{goals.bandwidth_share:.0%} of bandwidth", reached, least_ms / goals.bandwidth_share))
    found += [Verdict(goal, got, p["median_ms"] <= most, p["reliable"], most) for goal, got, most in limits]
    if goals.max_memory_ratio is not None:
        ratio, most = p["memory_ratio"], goals.max_memory_ratio
        # Memory does not depend on who else runs.
        found.append(Verdict(f"{most:g}x memory", f"{ratio:.2f}x", ratio <= most, True))
    return found


def needed_speedup(row: Row, judged: Sequence[Verdict]) -> float | None:
    """The speed-up over the baseline that meets all goals about speed, if there are any that were measured."""
    limits = [verdict.limit_ms for verdict in judged if verdict.limit_ms is not None]
    return next(iter(row["peers"].values()))["median_ms"] / min(limits) if limits else None
