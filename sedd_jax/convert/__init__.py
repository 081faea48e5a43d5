"""Checkpoints to and from the original PyTorch code; layer 6, above runs and below inference.

The order inside, each importing only what stands before it: weights (safetensors), names (of
tensors), original_config; torch_files with torch_child; card, folder (of the hub); run (of the
original); conversion. Nothing is unpickled in this process: .pth files are read and written by
torch_child, the only module that imports torch.
"""

import importlib

_MODULES = {
    "Conversion": "conversion",
    "Pretrained": "folder",
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
__all__ = list(_MODULES)


def __getattr__(name):
    # The child process needs `weights` alone: jax and Orbax come with the first use of the rest.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
