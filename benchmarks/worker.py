"""The process of one side of a benchmark: does what is called for over a pipe, and times it.

Started by measure.Worker. Receives (name, arguments) and sends {"value": ...} or {"error": ...}.
A name is one of CALLS, each a function of the side's `program`, or a method of it: ours.Ours and
original.Original have the same methods.
"""

import contextlib
import importlib
import math
import os
import resource
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

KINDS = {"ours": "Ours", "original": "Original"}  # modules, and their classes


def start_training(program, batch_size: int, length: int) -> dict:
    """Make the state, compile, take the first step; what that took and how much it holds."""
    began = time.perf_counter()
    sizes = program.start_training(batch_size, length)
    loss = program.train(1)
    return {"first_seconds": time.perf_counter() - began, "loss": loss, **sizes}


def train(program, steps: int) -> dict:
    """Times of so many steps, dispatched one after the other and waited for at the end."""
    times, loss = _timed(program, program.train, steps)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return times


def start_sampling(program, batch_size: int, length: int, steps: int) -> dict:
    """Make the weights, compile, draw one whole sample of so many steps."""
    began = time.perf_counter()
    sizes = program.start_sampling(batch_size, length)
    program.sample(steps)
    return {"first_seconds": time.perf_counter() - began, **sizes}


def sample(program, steps: int) -> dict:
    """Times of a whole sample, from all-MASK to clean tokens: steps + 1 network calls."""
    times, masked = _timed(program, program.sample, steps)
    if masked:
        raise ValueError(f"{masked} tokens are still masked")
    return times


def _timed(program, run, steps: int) -> tuple[dict, float]:
    """Seconds on the wall and of this process on all cores, compilations; and run's answer."""
    compiles, wall, cpu = program.compiles, time.perf_counter(), time.process_time()
    answer = run(steps)
    times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return times | {"compiles": program.compiles - compiles}, answer


def matmul_rates(program, seconds: float = 0.5) -> dict:
    """Operations a second of large square matmuls, by dtype."""
    side = 8192 if program.is_accelerator else 1536
    return {
        dtype: 2 * side**3 / _fastest(program.matmul(side, dtype), seconds)
        for dtype in ("float32", "bfloat16")
    }


def _fastest(run, least: float) -> float:
    """Seconds of the fastest of several runs in so many seconds; run waits for its result."""
    run()
    times, until = [], time.perf_counter() + least
    while len(times) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def peak(program) -> int:
    """Bytes held at once since the last `forget_memory`, of the device, or of a CPU's process
    beyond what it held after its imports."""
    held = program.device_peak()
    return _status("VmHWM") - program.after_imports if held is None else held


def forget_memory(program) -> None:
    """The peak is what is held now, where that can be set (not of jax's device allocator)."""
    program.forget_device_peak()
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


CALLS = (start_training, train, start_sampling, sample, matmul_rates, peak, forget_memory)
CALLS = {fn.__name__: fn for fn in CALLS}


def serve(calls: Connection, side: dict[str, Any], size: dict[str, Any]) -> None:
    """Answers calls until there are no more; side and size are of measure.Side and Size."""
    os.dup2(2, 1)  # the table alone is written to standard output
    os.environ.update(side["environment"])
    if side["cores"]:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[-side["cores"] :])  # both take a thread for each
    program = None
    while True:
        try:
            name, arguments = calls.recv()
            if program is None:
                module = importlib.import_module(side["kind"])
                program = getattr(module, KINDS[side["kind"]])(side, size)
                program.after_imports = _status("VmRSS")
                forget_memory(program)
            if name in CALLS:
                calls.send({"value": CALLS[name](program, **arguments)})
            else:
                calls.send({"value": getattr(program, name)(**arguments)})
        except (EOFError, BrokenPipeError):
            return
        except (RuntimeError, ValueError) as error:  # any other ends the process and is shown
            traceback.print_exc()
            calls.send({"error": _message(error)})


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:120]
