"""Where the time of a program goes on its device: kernels of a jax profile, by what they do.

Imports no framework: it reads planes, lines and events as jax.profiler.ProfileData has them.
"""

import collections
import re
from collections.abc import Iterable, Iterator
from typing import Any

# The first kind whose pattern is in a kernel's name; any other is elementwise or a reduction.
KINDS = {
    "attention": r"sdpa|fmha|flash|attention|dot_do_o",  # cuDNN's, and its backward pass's dot
    "matmuls": r"gemm|nvjet|cutlass|xmma|cublas|splitk|matmul|(^|_)dot|^ynn_",
    "copies": r"memcpy|memset|copy|transpose",
}
OTHERS = "elementwise, reductions"
CONTAINERS = re.compile(
    r"(while|call|cond|conditional)(\.\d+)?$"
)  # of a CPU; what they run is there


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHERS)


def kernels(profile: Any) -> Iterator[tuple[str, float, float]]:
    """Name, start and end in ns of what ran: a GPU's streams, or the thunks of a CPU."""
    for plane in profile.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:") and "Stream" in line.name:
                yield from ((event.name, event.start_ns, event.end_ns) for event in line.events)
            elif plane.name == "/host:CPU" and not line.name.startswith("python"):
                for event in line.events:
                    is_thunk = any(key == "hlo_op" for key, _ in event.stats)
                    if is_thunk and not CONTAINERS.match(event.name):
                        yield event.name, event.start_ns, event.end_ns


def summary(events: Iterable[tuple[str, float, float]], calls: int, top: int = 20) -> dict:
    """Milliseconds and kernels of each kind in one of so many calls, and the longest kernels.

    idle_ms is the time between the first kernel and the last in which none ran. ValueError if
    nothing ran.
    """
    events = sorted(events, key=lambda event: event[1])
    if not events:
        raise ValueError("the profile has no kernels")
    by_name: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    idle, busy_until = 0.0, events[0][1]
    for name, start, end in events:
        by_name[name][0] += (end - start) / calls / 1e6
        by_name[name][1] += 1 / calls
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    kinds = {kind: [0.0, 0.0] for kind in (*KINDS, OTHERS)}
    for name, (ms, count) in by_name.items():
        kinds[kind_of(name)][0] += ms
        kinds[kind_of(name)][1] += count
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:top]
    return {
        "kinds": {kind: {"ms": ms, "kernels": count} for kind, (ms, count) in kinds.items()},
        "idle_ms": idle / calls / 1e6,
        "span_ms": (busy_until - events[0][1]) / calls / 1e6,
        "kernels": len(events) / calls,
        "longest": [{"name": name, "ms": ms, "count": count} for name, (ms, count) in longest],
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A line of the table: milliseconds of a call."""
    if "skipped" in row:
        return {"in all": row["skipped"]}
    times = {kind: value["ms"] for kind, value in row["kinds"].items()}
    times = {"in all": row["span_ms"], **times, "idle": row["idle_ms"]}
    return {
        **{name: f"{ms:.3f}" for name, ms in times.items()},
        "kernels": f"{row['kernels']:,.0f}",
    }
