"""The child process that reads and writes torch's files; the only module that imports torch.

Run as a script, it imports nothing of the package. One JSON object from stdin is the request, the
last line of stdout the answer; numbers travel in a folder private to both, in PART.safetensors of
the parts "model", "ema", "exp_avg" and "exp_avg_sq":

    {"work": "read", "file": FILE, "folder": FOLDER, "names": [...], "parts": [...]}
    {"work": "write", "file": FILE, "folder": FOLDER, "names": [...], "facts": {...}}
    -> {"facts": {...}}, or {"error": one line}

names are the model's parameters in the original's order. The model's tensors have the names of the
file's state dict, the other parts' have `names`; of parts not requested nothing is said.
A file is read with weights_only: no global but those that the original's checkpoints need is ever
looked up, so nothing in it is run.
"""

import json
import os
import re
import sys
from collections import OrderedDict
from typing import Any

TORCH = (2, 10)  # weights_only could be got round before: CVE-2025-32434, CVE-2026-24747
_REMEDY = "give a checkpoint of the original code"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"facts": ...}, or {"error": one line}."""
    work = {"read": _read, "write": _write}[request.pop("work")]
    try:
        _check_torch()
        return {"facts": work(**request)}
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return {"error": " ".join(str(error).split())[:600] or type(error).__name__}


def _check_torch() -> None:
    try:
        from torch import __version__ as version
    except ImportError:
        version = "none"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH:
        raise ValueError(
            f".pth and .bin files need torch >= {'.'.join(map(str, TORCH))}, which reads them "
            f"safely; {version} is installed; run pip install 'sedd_jax[torch]'"
        )


def _load(file: str) -> Any:
    import numpy as np
    import torch

    scalar = np.float64(0.0).__reduce__()[0]  # the original's learning rate is a numpy scalar
    allowed = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    allowed += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken pickle or archive makes torch raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it wants the global {refused[1]}, which none needs: it was not run"
        raise ValueError(f"cannot read {file!r}: {reason}; {_REMEDY}") from error


def _read(file: str, folder: str, names: list[str], parts: list[str]) -> dict[str, Any]:
    """Write the file's parts into `folder`, as float32; returns the facts beside them."""
    import torch
    from safetensors.numpy import save_file

    state = _load(file)
    try:
        if "ema" in state:
            arrays, facts = _checkpoint(state, names, parts)
        else:
            arrays, facts = {"model": _named(state)}, {}
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{file!r} holds a {type(state).__name__} that is not as the original saves it "
            f"({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    floats = (torch.float32, torch.float16, torch.bfloat16)
    tensors = [(name, tensor) for part in arrays.values() for name, tensor in part.items()]
    for name, tensor in tensors:
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        if kind not in floats or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"{name[:60]!r} in {file!r} is {kind}, no tensor in memory of float32, float16 or "
                f"bfloat16; {_REMEDY}"
            )
    # Many names, or strides of 0, over one small piece of the file.
    if sum(t.numel() * t.element_size() for _, t in tensors) > os.path.getsize(file):
        raise ValueError(f"the tensors of {file!r} are larger than it is; {_REMEDY}")
    for part, named in arrays.items():
        converted = {n: t.detach().float().contiguous().numpy() for n, t in named.items()}
        save_file(converted, f"{folder}/{part}.safetensors")
    return facts


def _named(state: dict) -> dict[str, Any]:
    return {str(name): value for name, value in state.items()}


def _checkpoint(state: dict, names: list[str], parts: list[str]) -> tuple[dict, dict[str, Any]]:
    """(tensors by part and name, facts) of what the original's save_checkpoint writes."""
    ema, arrays = state["ema"], {"model": _named(state["model"])}
    columns = {"ema": list(ema["shadow_params"])} if "ema" in parts else {}
    rows = []
    if "exp_avg" in parts and (by_key := state["optimizer"]["state"]):
        # The keys are torch's to choose; the group has the parameters in their order.
        (group,) = state["optimizer"]["param_groups"]
        rows = [by_key[key] for key in group["params"] if key in by_key]
        columns |= {part: [row[part] for row in rows] for part in ("exp_avg", "exp_avg_sq")}
    for part, values in columns.items():
        if len(values) != len(names):
            raise ValueError(
                f"{part} of {len(values)} parameters, its config gives {len(names)}: both must be "
                "of one run"
            )
        arrays[part] = dict(zip(names, values))
    facts = {
        "step": int(state["step"]),
        "ema_decay": float(ema["decay"]),
        "ema_updates": None if ema["num_updates"] is None else int(ema["num_updates"]),
        "counts": sorted({int(row["step"]) for row in rows}),  # AdamW's updates; [] without moments
    }
    return {part: named for part, named in arrays.items() if part in parts}, facts


def _write(file: str, folder: str, names: list[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Write the tensors and facts as the original's save_checkpoint would."""
    import torch
    from safetensors.numpy import load_file

    def stored(part: str) -> dict[str, torch.Tensor]:
        arrays = load_file(f"{folder}/{part}.safetensors")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    # One parameter more than the model has: that of the original's noise, which never moves.
    parameters = [torch.zeros(()) for _ in range(len(names) + 1)]
    settings = {**facts["optimizer"], "betas": tuple(facts["optimizer"]["betas"])}
    optimizer = torch.optim.AdamW(parameters, **settings).state_dict()
    for count in facts["counts"]:
        first, second = stored("exp_avg"), stored("exp_avg_sq")
        optimizer["state"] = {
            i: {
                "step": torch.tensor(float(count)),
                "exp_avg": first[name],
                "exp_avg_sq": second[name],
            }
            for i, name in enumerate(names)
        }
    model, ema = stored("model"), stored("ema")
    state = {
        "optimizer": optimizer,
        "model": OrderedDict((name, model[name]) for name in facts["model"]),
        "ema": {
            "decay": facts["ema_decay"],
            "num_updates": facts["ema_updates"],
            "shadow_params": [ema[name] for name in names],
        },
        "step": facts["step"],
    }
    with open(file, "xb") as out:
        torch.save(state, out)
    return {}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(json.load(sys.stdin))))
