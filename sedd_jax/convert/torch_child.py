"""The child process that reads and writes torch's files; the only module that imports torch.

Run as a script, it imports nothing of the package. One JSON object from stdin is the request, the
last line of stdout the answer; numbers travel in a safetensors file in a folder private to both:

    {"work": "read", "file": FILE, "tensors": FILE, "parts": [...]} -> {"facts": {...}}
    {"work": "write", "file": FILE, "tensors": FILE, "facts": {...}} -> {"facts": {}}

What went wrong is the answer's "error". parts are those of a checkpoint that are needed ("model",
"ema", "exp_avg", "exp_avg_sq"): nothing is said about others. A file is read with weights_only: no
global but those that the original's checkpoints need is ever looked up, so nothing in it is run.
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
    install = "run pip install 'sedd_jax[torch]'"
    try:
        from torch import __version__ as version
    except ImportError as error:
        fault = f".pth and .bin files need torch, which is not installed; {install}"
        raise ValueError(fault) from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH:
        raise ValueError(
            f"torch {version} is too old to read files safely, at least "
            f"{'.'.join(map(str, TORCH))} is needed; {install}"
        )


def _load(file: str) -> Any:
    import pickle

    import numpy as np
    import torch

    scalar = np.float64(0.0).__reduce__()[0]  # the original's learning rate is a numpy scalar
    allowed = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    allowed += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{file!r} wants the global {refused[1]}, which no checkpoint of the original "
                f"needs: it was not run; {_REMEDY}"
            ) from error
        raise ValueError(f"{file!r} holds what is not allowed; {_REMEDY}") from error
    except Exception as error:  # whatever a broken pickle or archive makes torch raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"cannot read {file!r}: {reason}; {_REMEDY}") from error


def _read(file: str, tensors: str, parts: list[str]) -> dict[str, Any]:
    """Write the file's parts to `tensors`, as float32; returns the facts beside them."""
    from safetensors.numpy import save_file

    state = _load(file)
    kind = type(state).__name__
    if kind not in ("dict", "OrderedDict"):
        raise ValueError(f"{file!r} holds a {kind}, not a dict; {_REMEDY}")
    is_checkpoint = "model" in state and "ema" in state
    arrays, facts = _checkpoint(state, parts) if is_checkpoint else (_model(state), {})
    for name, tensor in arrays.items():
        _check_tensor(name, tensor)
    # Many names, or strides of 0, over one small piece of the file.
    if sum(t.numel() * t.element_size() for t in arrays.values()) > os.path.getsize(file):
        raise ValueError(f"the tensors of {file!r} are larger than it is; {_REMEDY}")
    save_file({n: t.detach().float().contiguous().numpy() for n, t in arrays.items()}, tensors)
    return facts


def _check_tensor(name: str, tensor: Any) -> None:
    import torch

    shown = name[:60] if name.isprintable() else repr(name)[:60]
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{shown} is a {type(tensor).__name__}, not a tensor; {_REMEDY}")  # noqa: TRY004
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{shown} is {tensor.dtype}; known: float32, float16, bfloat16")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{shown} is not a plain tensor in memory; {_REMEDY}")


def _model(state: dict) -> dict[str, Any]:
    """The state dict's tensors, without the prefix that DistributedDataParallel gives them all."""
    prefix = "module." if all(str(name).startswith("module.") for name in state) else ""
    return {f"model/{str(name).removeprefix(prefix)}": value for name, value in state.items()}


def _checkpoint(state: dict, parts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, facts) of what the original's save_checkpoint writes."""
    try:
        ema = state["ema"]
        average = list(ema["shadow_params"])
        moments = _moments(state["optimizer"]) if "exp_avg" in parts else {}
        counts = {int(row["step"]) for row in moments.values()}
        tensors = _model(state["model"])
        tensors |= {f"ema/{i}": value for i, value in enumerate(average)}
        for part in ("exp_avg", "exp_avg_sq"):
            tensors |= {f"{part}/{i}": row[part] for i, row in moments.items()}
        facts = {
            "step": int(state["step"]),
            "ema_decay": float(ema["decay"]),
            "ema_updates": None if ema["num_updates"] is None else int(ema["num_updates"]),
            "averages": len(average),
            "moments": len(moments),
            "count": max(counts, default=0),
        }
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the checkpoint is not as the original saves it ({type(error).__name__}: {error}); "
            f"{_REMEDY}"
        ) from error
    if len(counts) > 1:
        raise ValueError(
            f"the optimizer has made from {min(counts)} to {max(counts)} steps, not the same for "
            "every parameter; add --fresh_optimizer"
        )
    return {name: t for name, t in tensors.items() if name.split("/")[0] in parts}, facts


def _moments(optimizer: dict) -> dict[int, dict]:
    """Position in the group -> state: the indices themselves are torch's to choose."""
    (group,) = optimizer["param_groups"]
    state = optimizer["state"]
    return {i: state[key] for i, key in enumerate(group["params"]) if key in state}


def _write(file: str, tensors: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the tensors and facts as the original's save_checkpoint would."""
    import torch
    from safetensors.numpy import load_file

    stored = {name: torch.from_numpy(array) for name, array in load_file(tensors).items()}
    order, count = range(facts["averages"]), facts["count"]
    # One parameter more than the model has: that of the original's noise, which never moves.
    parameters = [torch.zeros(()) for _ in range(len(order) + 1)]
    settings = {**facts["optimizer"], "betas": tuple(facts["optimizer"]["betas"])}
    optimizer = torch.optim.AdamW(parameters, **settings).state_dict()
    if count:
        optimizer["state"] = {
            i: {
                "step": torch.tensor(float(count)),
                "exp_avg": stored[f"exp_avg/{i}"],
                "exp_avg_sq": stored[f"exp_avg_sq/{i}"],
            }
            for i in order
        }
    state = {
        "optimizer": optimizer,
        "model": OrderedDict((name, stored[f"model/{name}"]) for name in facts["model"]),
        "ema": {
            "decay": facts["ema_decay"],
            "num_updates": facts["ema_updates"],
            "shadow_params": [stored[f"ema/{i}"] for i in order],
        },
        "step": facts["step"],
    }
    with open(file, "xb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    return {}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(json.load(sys.stdin))))
