"""The process of one side of a benchmark: does what is called for over a pipe, and times it.

Started by measure.Worker. A line of standard input is {"call": NAME, "arguments": {...}}, a line of
standard output {"value": ...} or {"error": ..., "trace": ...}; anything else that the frameworks
print goes to standard error. NAME is one of CALLS, each a function of the side's `program`:
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


def about(program) -> dict:
    """The device and the framework."""
    return program.about()


def forward_flops(program, length: int) -> int:
    """Operations of the matmuls of one network call for one sequence; only ours can count them."""
    return program.forward_flops(length)


def start_training(program, batch_size: int, length: int) -> dict:
    """Make the state, compile, take the first step; what that took and how much it holds."""
    began = time.perf_counter()
    sizes = program.start_training(batch_size, length)
    loss = program.train(1)
    return {"first_seconds": time.perf_counter() - began, "loss": loss, **sizes}


def train(program, steps: int) -> dict:
    """Times of so many steps, dispatched one after the other and waited for at the end."""
    return _timed(program, lambda: {"loss": program.train(steps)})


def start_sampling(program, batch_size: int, length: int, steps: int) -> dict:
    """Make the weights, compile, draw one whole sample of so many steps."""
    began = time.perf_counter()
    sizes = program.start_sampling(batch_size, length)
    program.sample(steps)
    return {"first_seconds": time.perf_counter() - began, **sizes}


def sample(program, steps: int) -> dict:
    """Times of a whole sample, from all-MASK to clean tokens: steps + 1 network calls."""
    return _timed(program, lambda: {"masked": program.sample(steps)})


def _timed(program, fn) -> dict:
    """fn's answer with seconds on the wall and of this process on all cores, and compilations."""
    compiles, wall, cpu = program.compiles, time.perf_counter(), time.process_time()
    answer = fn()
    times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return answer | times | {"compiles": program.compiles - compiles}


def ceilings(program, seconds: float = 0.5) -> dict:
    """Operations a second of large square matmuls, bytes a second of x += 1."""
    side, elements = (8192, 2**28) if program.is_accelerator else (1536, 2**26)
    rates = {}
    for dtype in ("float32", "bfloat16"):
        rates[f"matmul {dtype}"] = 2 * side**3 / _fastest(program.matmul(side, dtype), seconds)
    rates["traffic"] = 2 * 4 * elements / _fastest(program.increment(elements), seconds)
    return rates


def _fastest(run, least: float) -> float:
    """Seconds of the fastest of several runs in so many seconds; run waits for its result."""
    run()
    times, until = [], time.perf_counter() + least
    while len(times) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def memory(program) -> dict:
    """Bytes held at once since the last `forget_memory`, and now; of the device, or of a CPU's
    process beyond what it held after its imports."""
    held = program.device_memory()
    if held is None:
        held = {"peak": _status("VmHWM"), "now": _status("VmRSS")}
        held = {name: value - program.after_imports for name, value in held.items()}
    return held


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


CALLS = (about, forward_flops, start_training, train, start_sampling, sample, ceilings, memory)
CALLS = {fn.__name__: fn for fn in (*CALLS, forget_memory)}


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
            answer = {"error": _message(error), "trace": traceback.format_exc()[-4000:]}
        print(json.dumps(answer), file=answers, flush=True)


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:120]


if __name__ == "__main__":
    main()
