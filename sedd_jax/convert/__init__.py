"""Checkpoints to and from the original PyTorch code. Floor 4: up to config and checkpoint.

`convert` recognises what it is given; the other functions are its steps. Nothing is unpickled in
this process: .pth files are read and written by `torch_child`, the only file that imports torch.
"""

import importlib

_PLACES = {
    "Conversion": "conversion",
    "Pretrained": "folder",
    "Tensors": "weights",
    "check_tokenizer": "folder",
    "convert": "conversion",
    "export_run": "run",
    "expected_tensors": "names",
    "from_original": "names",
    "from_original_config": "original_config",
    "import_run": "run",
    "open_tensors": "weights",
    "read_folder": "folder",
    "to_original": "names",
    "to_original_config": "original_config",
    "write_folder": "folder",
    "write_tensors": "weights",
}
__all__ = list(_PLACES)


def __getattr__(name):
    # The child process needs `weights` alone: jax and Orbax come with the first use of the rest.
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
