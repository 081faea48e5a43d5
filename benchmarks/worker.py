"""The process of one side of a benchmark: does what it is told over a pipe, and times it.

Started by measure.Worker. A line of standard input is {"call": NAME, "arguments": {...}}, a line of
standard output {"value": ...} or {"error": ..., "trace": ...}; anything else that the frameworks
print goes to standard error. NAME is one of CALLS, each a function of the side's `Experiment`:
ours.Ours or original.Original, which have the same methods.
"""

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

KINDS = {"ours": ("ours", "Ours"), "original": ("original", "Original")}
MIB = 2**20


def start_training(program, batch_size: int, length: int) -> dict:
    """Make the state, compile, take the first step; what that took and how much it holds."""
    began = time.perf_counter()
    known = program.start_training(batch_size, length)
    loss = program.train(1)
    return {"first_seconds": time.perf_counter() - began, "loss": loss, **known}


def train(program, steps: int) -> dict:
    """Seconds of so many steps, sent off one after the other and waited for at the end."""
    clock = _Clock()
    loss = program.train(steps)
    return {**clock.read(), "loss": loss}


def start_sampling(program, batch_size: int, length: int, steps: int) -> dict:
    """Make the weights, compile, draw one whole sample of so many steps."""
    began = time.perf_counter()
    program.start_sampling(batch_size, length)
    program.sample(steps)
    return {"first_seconds": time.perf_counter() - began}


def sample(program, steps: int) -> dict:
    """Seconds of a whole sample, from all-MASK to clean tokens: steps + 1 network calls."""
    compiles, clock = program.compiles, _Clock()
    masked = program.sample(steps)
    return {**clock.read(), "masked": masked, "compiles": program.compiles - compiles}


def ceilings(program, seconds: float = 0.5) -> dict:
    """Operations a second of large square products, bytes a second of x += 1."""
    side, elements = (8192, 2**28) if program.is_accelerator else (1536, 2**26)
    found = {}
    for dtype in ("float32", "bfloat16"):
        found[f"matmul {dtype}"] = 2 * side**3 / _best(program.product(side, dtype), seconds)
    found["traffic"] = 2 * 4 * elements / _best(program.increment(elements), seconds)
    return found


class _Clock:
    """Seconds since it was made, on the wall and of this process on all its cores."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"seconds": wall, "cpu_seconds": cpu}


def _best(run, least: float) -> float:
    """Seconds of the fastest of several runs in so many seconds; run waits for its result."""
    run()
    found, until = [], time.perf_counter() + least
    while len(found) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def memory(program) -> dict:
    """Bytes held at once since the last `forget_memory`, and now; of the device, or of a CPU's
    process beyond what it held after its imports."""
    found = program.device_memory()
    if found is None:
        found = {"peak": _status("VmHWM"), "now": _status("VmRSS")}
        found = {name: value - program.after_imports for name, value in found.items()}
    return found


def forget_memory(program) -> None:
    """The peak is what is held now, where that can be set (not of jax's device allocator)."""
    program.forget_device_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status; elsewhere the peak stands for both."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def about(program) -> dict:
    """The device and the framework."""
    return program.about()


CALLS = {
    f.__name__: f
    for f in (
        about,
        ceilings,
        forget_memory,
        memory,
        sample,
        start_sampling,
        start_training,
        train,
    )
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the frameworks print is no answer
    spec = json.loads(sys.argv[1])
    if spec["side"]["cores"]:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[-spec["side"]["cores"] :])  # both take a thread for each
    program = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if program is None:
                module, name = KINDS[spec["side"]["kind"]]
                program = getattr(__import__(module), name)(spec["side"], spec["size"])
                program.after_imports = _status("VmRSS")
                forget_memory(program)
            answer = {"value": CALLS[request["call"]](program, **request["arguments"])}
        except (RuntimeError, ValueError) as error:  # any other ends the process and is shown
            answer = {"error": _told(error), "trace": traceback.format_exc()[-4000:]}
        print(json.dumps(answer), file=answers, flush=True)


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:120]


if __name__ == "__main__":
    main()
