"""What a compiler makes of a program: bytes, operations, collectives.

Only in a process that was started with the target's environment.
"""

import math
import re
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sedd_jax import experiment
from sedd_jax.parallel import sharding
from sedd_jax.training.dry_run import hlo
from sedd_jax.training.dry_run.targets import Target

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure(
    config: ConfigDict, target: Target, vocab_size: int, text_file: Path | None = None
) -> dict[str, Any]:
    """What the target's compiler makes of the config's train step, as JSON may hold it.

    text_file is where the compiled text is to be written. ValueError for what does not compile.
    """
    devices = jax.devices() if target.platform == "cpu" else _topology(target).devices
    if len(devices) != target.count:
        raise ValueError(f"target {target.name!r} has {len(devices)} devices, not {target.count}")
    mesh = experiment.make_mesh(config, devices)
    program = experiment.make_experiment(config, vocab_size, mesh)
    found = {
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "parameters": _placed(program.shape.params),
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
        found["compile_seconds"] = time.perf_counter() - began
        return found | _out_of_memory(str(error))
    found["compile_seconds"] = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if text_file is not None:
        text_file.write_text(text, encoding="utf-8")
    return found | {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": [vars(one) for one in hlo.collectives(text, mesh.shape)],
    }


def _topology(target: Target):
    try:
        return target.topology()
    except Exception as error:  # each plug-in has errors of its own, RuntimeError to ImportError
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot compile for {target.name!r}: {reason or type(error).__name__}; it needs "
            f"{target.packages}: {target.command}"
        ) from error


def _placed(params: Any) -> list[dict[str, Any]]:
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
        "needed_bytes": int(float(needed) * UNITS[unit]),
        "available_bytes": int(float(available) * UNITS[unit_available]),
    }
