"""The devices that jax may use, their peak figures, and the memory that a program needs."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak figures of one device as jax counts them: a TPU chip, a GPU."""

    flops: float  # bfloat16 operations a second, dense
    memory: int  # bytes that a program may use
    bandwidth: float  # bytes a second between memory and compute units
    links: float  # bytes a second to its neighbours, all links together, one direction
    vector: float | None = None  # float32 instructions a second outside matmuls; not of TPUs


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; memory is what libtpu's compiler allows,
# a little less than the chip's 32, 16, 95 and 32 GiB.
# NVIDIA: the data sheets of A100, H100 and H200 (SXM unless named); memory is 0.9 of what the
# driver reports, the share that XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 gives a program: by default
# jax takes 0.75. vector is half of their float32 rate, which counts a fused multiply-add as two.
DEVICES = {
    "TPU v4": Device(275e12, int(30.75 * GIB), 1228e9, 300e9),
    "TPU v5 lite": Device(197e12, int(15.75 * GIB), 819e9, 200e9),
    "TPU v5": Device(459e12, int(95.74 * GIB), 2765e9, 600e9),
    "TPU v6 lite": Device(918e12, int(31.25 * GIB), 1638e9, 400e9),
    "NVIDIA A100-SXM4-40GB": Device(312e12, int(0.9 * 42_298_834_944), 1555e9, 300e9, 9.7e12),
    "NVIDIA A100-SXM4-80GB": Device(312e12, int(0.9 * 85_100_068_864), 2039e9, 300e9, 9.7e12),
    "NVIDIA A100 80GB PCIe": Device(312e12, int(0.9 * 85_100_068_864), 1935e9, 300e9, 9.7e12),
    "NVIDIA H100 80GB HBM3": Device(989e12, int(0.9 * 84_942_979_072), 3352e9, 450e9, 33.5e12),
    "NVIDIA H200": Device(989e12, int(0.9 * 150_754_820_096), 4800e9, 450e9, 33.5e12),
}


EXTRAS = {
    "cuda": "sedd_jax[cuda12] or sedd_jax[cuda13] for an NVIDIA GPU",
    "tpu": "sedd_jax[tpu] for a TPU",
}


def check_platform() -> None:
    """ValueError unless jax can start the platform that its environment names, or any by default.

    The first call starts it, so not before jax.distributed.initialize.
    """
    platforms, name = jax.config.jax_platforms, os.environ.get("JAX_PLATFORM_NAME")
    requested = (platforms or name or "").split(",")
    try:
        if "tpu" in requested and not has_tpu():  # libtpu would write lines of its own
            raise RuntimeError("no TPU is visible")
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where cuda finds no GPU
        reason = " ".join(str(error).split()).partition(" (")[0].rstrip(".")
        if "gpu" in requested:
            reason = "the name is of all kinds of GPU at once, cuda of NVIDIA's"
        settings = {"JAX_PLATFORMS": platforms, "JAX_PLATFORM_NAME": name}
        setting = " ".join(f"{key}={value}" for key, value in settings.items() if value)
        here = {"cpu": True, "cuda": has_gpu(), "tpu": has_tpu()}
        extras = [EXTRAS[kind] for kind in requested if kind in EXTRAS] or EXTRAS.values()
        raise ValueError(
            f"{setting or 'the default platform'} cannot be used here: "
            f"{reason[:200] or 'no NVIDIA GPU is visible'}; this machine has "
            f"{', '.join(kind for kind in here if here[kind])}: set JAX_PLATFORMS to one of these, "
            f"or install {' or '.join(extras)}"
        ) from error


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible, as jax sees it."""
    return any(Path("/dev", name).exists() for name in ("nvidia0", "nvidiactl", "dxg"))


def has_tpu() -> bool:
    """Whether a TPU is visible: its device files, which others may have, and Google's PCI devices.

    Google's network cards are such devices too; a container may hide them all.
    """
    files = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    vendors = [file.read_text().strip() for file in Path("/sys/bus/pci/devices").glob("*/vendor")]
    return bool(files) and ("0x1ae0" in vendors or not vendors)


def can_use_tpu() -> bool:
    """Whether a TPU is visible and the library that drives it is installed."""
    return importlib.util.find_spec("libtpu") is not None and has_tpu()


def device(kind: str) -> Device | None:
    """The row of jax.devices()[0].device_kind; None for what is not in the table, as a CPU."""
    return DEVICES.get(kind)


def format_bytes(size: float) -> str:
    """512 B, 1.5 KiB, 20.3 MiB or 4.29 GiB."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:,.2f} GiB"


def program_bytes(memory: Any) -> int:
    """Bytes a device holds at once for a compiled program: arguments, results, temporaries, code.

    memory is `compiled.memory_analysis()`. Results that replace donated arguments count once.
    """
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arrays = memory.argument_size_in_bytes + new_results + memory.temp_size_in_bytes
    return arrays + memory.generated_code_size_in_bytes
