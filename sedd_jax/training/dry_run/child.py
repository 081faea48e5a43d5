"""The child process of `dry_run`: compiles, and says what the compiler made of the program.

Reads a request as JSON from standard input and writes the answer to standard output; whatever
else is written there goes to standard error. A process by itself, since the compilers for TPU and
GPU read the environment when jax starts and may abort.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import experiment
from sedd_jax.parallel import sharding
from sedd_jax.parallel.devices import device, program_bytes
from sedd_jax.training.dry_run.collectives import collectives
from sedd_jax.training.dry_run.costs import costs
from sedd_jax.training.dry_run.hlo import parse
from sedd_jax.training.dry_run.kernels import program_kernels
from sedd_jax.training.dry_run.targets import Target, parse_target

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main() -> None:
    """{"config", "vocab_size", "target", "text_file"} to a measurement, or to {"error"}."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        config = configuration.from_json(json.dumps(request["config"]))
        configuration.check(config)  # which runs the modules of config.imports
        answer = measure(
            config,
            parse_target(request["target"]),
            request["vocab_size"],
            request["text_file"] and Path(request["text_file"]),
        )
    except ValueError as error:
        answer = {"error": str(error)}
    with output:
        json.dump(answer, output)


def measure(
    config: ConfigDict, target: Target, vocab_size: int, text_file: Path | None = None
) -> dict[str, Any]:
    """What the target's compiler makes of the config's train step, as JSON may hold it.

    The compiled text is written to text_file. ValueError for what does not compile.
    """
    devices = jax.devices() if target.platform == "cpu" else _topology(target).devices
    if len(devices) != target.count:
        raise ValueError(f"target {target.name!r} has {len(devices)} devices, not {target.count}")
    mesh = experiment.make_mesh(config, devices)
    program = experiment.make_experiment(config, vocab_size, mesh)
    answer = {
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "parameters": _parameters(program.shape.params),
        "parameter_bytes": _bytes(program.shape.params),
        "ema_bytes": _bytes(program.shape.ema),
        "optimizer_bytes": _bytes(program.shape.opt_state),
        "flops": program.flops,
        "tokens": config.train.batch_size * config.data.length,
    }
    lowered = program.lower()
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        answer |= _out_of_memory(str(error))
        return answer
    finally:
        answer["compile_seconds"] = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if text_file is not None:
        text_file.write_text(text, encoding="utf-8")
    peaks, parsed = device(devices[0].device_kind), parse(text)
    kernels = program_kernels(parsed, program.evaluated)
    return answer | {
        "argument_bytes": memory.argument_size_in_bytes,
        "total_bytes": program_bytes(memory),
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": [vars(one) for one in collectives(parsed, mesh.shape)],
        "costs": [vars(one) for one in costs(kernels, peaks)] if peaks else [],
    }


def _topology(target: Target):
    try:
        return target.topology()
    except Exception as error:  # each plug-in has its errors, RuntimeError to ImportError
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot compile for {target.name!r}: {reason or type(error).__name__}; it needs "
            f"{target.packages}"
        ) from error


def _parameters(params: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": sharding.path_name(path),
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "spec": str(leaf.sharding.spec),
            "bytes": _bytes(leaf),
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def _bytes(tree: Any) -> int:
    """On one device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _out_of_memory(message: str) -> dict[str, Any]:
    """The numbers of a compiler's refusal; ValueError if it refused for another reason."""
    line = " ".join(message.split())[:300]
    if "RESOURCE_EXHAUSTED" not in message:
        raise ValueError(f"the compiler refused the program: {line}")
    sizes = re.findall(
        r"([\d.]+)([BKMGT]?)\)? (?:exceeds available HBM|of) \(?([\d.]+)([BKMGT]?)", line
    )
    if not sizes:
        raise ValueError(f"the program does not fit: {line}")
    needed, unit, available, unit_available = sizes[0]
    return {
        "total_bytes": int(float(needed) * UNITS[unit]),
        "available_bytes": int(float(available) * UNITS[unit_available]),
    }


if __name__ == "__main__":
    main()
