"""Checkpoints to and from the original PyTorch code; layer 6, above runs and below inference.

The order inside, each importing only what stands before it: weights (safetensors), names (of
tensors), original_config, sisters (MDLM and others); torch_files with torch_child; card, folder (of
the hub); original_run; conversion. Nothing is unpickled in this process: .pth files are read and
written by torch_child, a process of its own and the only module that imports torch.
"""

from sedd_jax.convert.conversion import convert, read_workdir, recognise
from sedd_jax.convert.folder import (
    Pretrained,
    check_tokenizer,
    fitted,
    open_folder,
    read_folder,
    read_params,
    write_folder,
)

__all__ = [
    "Pretrained",
    "check_tokenizer",
    "convert",
    "fitted",
    "open_folder",
    "read_folder",
    "read_params",
    "read_workdir",
    "recognise",
    "write_folder",
]
