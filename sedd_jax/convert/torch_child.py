"""The child process that reads and writes torch's files; the only file that imports torch.

python -m sedd_jax.convert.torch_child read FILE FOLDER PARTS
python -m sedd_jax.convert.torch_child write FOLDER FILE

PARTS, such as model,ema, are those of a checkpoint that are wanted: nothing is said about others.
FOLDER is private to the caller and holds tensors.safetensors and facts.json; what went wrong is
the "error" of FOLDER/answer.json. A file is read with weights_only: no global but those that the
original's checkpoints need is ever looked up, so nothing in a file is run.
"""

import json
import os
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

TENSORS, FACTS, ANSWER = "tensors.safetensors", "facts.json", "answer.json"
TORCH = (2, 10)  # weights_only could be got round before: CVE-2025-32434, CVE-2026-24747
_REMEDY = "give a checkpoint of the original code"


def main(argv: list[str]) -> None:
    """Read or write; always leaves an answer."""
    work, first, second, *parts = argv
    folder = Path(second if work == "read" else first)
    try:
        _import_torch()
        if work == "read":
            facts = _read(Path(first), folder, parts[0].split(","))
        else:
            facts = _write(folder, Path(second))
        answer = {"facts": facts}
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        answer = {"error": " ".join(str(error).split())[:600] or type(error).__name__}
    (folder / ANSWER).write_text(json.dumps(answer), encoding="utf-8")


def _import_torch() -> None:
    remedy = "run pip install 'sedd_jax[torch]'"
    try:
        import torch
    except ImportError as error:
        raise ValueError(f".pth and .bin files need torch, which is not installed; {remedy}") from (
            error
        )
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH:
        raise ValueError(
            f"torch {torch.__version__} is too old to read files safely, at least "
            f"{'.'.join(map(str, TORCH))} is needed; {remedy}"
        )


def _load(file: Path) -> Any:
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
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise ValueError(
                f"{str(file)!r} wants the global {wanted[1]}, which no checkpoint of the original "
                f"needs: it was not run; {_REMEDY}"
            ) from error
        raise ValueError(f"{str(file)!r} holds what is not allowed; {_REMEDY}") from error
    except Exception as error:  # whatever a broken pickle or archive makes torch raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"cannot read {str(file)!r}: {reason}; {_REMEDY}") from error


def _read(file: Path, folder: Path, parts: list[str]) -> dict[str, Any]:
    """Write the file's tensors to the folder; returns the facts beside them."""
    from sedd_jax.convert.weights import write_tensors

    state = _load(file)
    kind = type(state).__name__
    if kind not in ("dict", "OrderedDict"):
        raise ValueError(f"{str(file)!r} holds a {kind}, not a dict; {_REMEDY}")
    facts: dict[str, Any]
    if "model" in state and "ema" in state:
        tensors, facts = _checkpoint(state, parts)
    else:
        tensors, facts = _model(state), {}
    most, total, arrays = file.stat().st_size, 0, {}
    for name, tensor in tensors.items():
        arrays[name] = _array(name, tensor)
        total += tensor.numel() * tensor.element_size()
        if total > most:  # many names, or strides of 0, over one small piece of the file
            raise ValueError(f"the tensors of {str(file)!r} are larger than it is; {_REMEDY}")
    write_tensors(folder / TENSORS, {name: _Lazy(tensor) for name, tensor in arrays.items()})
    return facts


class _Lazy:
    """A tensor that becomes an array when it is written: one at a time is widened to float32."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def __array__(self, dtype=None, copy=None):
        array = self.tensor.detach().float().contiguous().numpy()
        return array if dtype is None else array.astype(dtype, copy=False)


def _array(name: Any, tensor: Any):
    import torch

    shown = str(name)[:60] if str(name).isprintable() else repr(name)[:60]
    is_tensor = isinstance(name, str) and isinstance(tensor, torch.Tensor)
    if not is_tensor:
        raise ValueError(f"{shown} is a {type(tensor).__name__}, not a tensor; {_REMEDY}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{shown} is {tensor.dtype}; known: float32, float16, bfloat16")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{shown} is not a plain tensor in memory; {_REMEDY}")
    return tensor


def _model(state: dict) -> dict[str, Any]:
    """The state dict's tensors, without the prefix that DistributedDataParallel gives them all."""
    prefix = "module." if all(str(name).startswith("module.") for name in state) else ""
    return {f"model/{str(name).removeprefix(prefix)}": value for name, value in state.items()}


def _checkpoint(state: dict, parts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, facts) of what the original's save_checkpoint writes."""
    try:
        tensors = _model(state["model"])
        ema = state["ema"]
        shadow = list(ema["shadow_params"])
        tensors |= {f"ema/{i}": value for i, value in enumerate(shadow)}
        facts = {
            "step": int(state["step"]),
            "ema_decay": float(ema["decay"]),
            "ema_updates": None if ema["num_updates"] is None else int(ema["num_updates"]),
            "averages": len(shadow),
        }
        held = _moments(state["optimizer"]) if "exp_avg" in parts else {}
        tensors |= {f"exp_avg/{i}": row["exp_avg"] for i, row in held.items()}
        tensors |= {f"exp_avg_sq/{i}": row["exp_avg_sq"] for i, row in held.items()}
        counts = {int(row["step"]) for row in held.values()}
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
    tensors = {name: value for name, value in tensors.items() if name.split("/")[0] in parts}
    return tensors, {**facts, "moments": len(held), "count": max(counts, default=0)}


def _moments(optimizer: dict) -> dict[int, dict]:
    """Position in the group -> state: the indices themselves are torch's to choose."""
    (group,) = optimizer["param_groups"]
    state = optimizer["state"]
    return {i: state[key] for i, key in enumerate(group["params"]) if key in state}


def _write(folder: Path, target: Path) -> dict[str, Any]:
    """Write the folder's tensors and facts as the original's save_checkpoint would."""
    import torch

    from sedd_jax.convert.weights import open_tensors

    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    shapes = {name: tuple(shape) for name, shape in facts["shapes"].items()}
    stored = open_tensors(folder / TENSORS, shapes)

    def tensor(name: str):
        return torch.from_numpy(stored[name])

    count, order = facts["count"], range(facts["averages"])
    moments = {
        i: {
            "step": torch.tensor(float(count)),
            "exp_avg": tensor(f"exp_avg/{i}"),
            "exp_avg_sq": tensor(f"exp_avg_sq/{i}"),
        }
        for i in (order if count else ())
    }
    group = {
        **facts["group"],
        "betas": tuple(facts["group"]["betas"]),
        # One more than the model has: the parameter of the original's noise, which never moves.
        "params": [*order, len(order)],
    }
    state = {
        "optimizer": {"state": moments, "param_groups": [group]},
        "model": OrderedDict((name, tensor(f"model/{name}")) for name in facts["model"]),
        "ema": {
            "decay": facts["ema_decay"],
            "num_updates": facts["ema_updates"],
            "shadow_params": [tensor(f"ema/{i}") for i in order],
        },
        "step": facts["step"],
    }
    with target.open("xb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    return {}


if __name__ == "__main__":
    main(sys.argv[1:])
