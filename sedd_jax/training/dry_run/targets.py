"""Machines to compile for that need not be present: v5e:4x4, a100:16, cpu:8."""

import dataclasses
import importlib.util
import math
import os
import re
from importlib import metadata, resources
from typing import Any

MAX_CPUS = 512  # devices: threads of one process
GPUS_PER_NODE = 8
GPUS = {"a100": "a100_80gb.textproto", "h100": "h100_80gb.textproto", "h200": "h200.textproto"}


@dataclasses.dataclass(frozen=True)
class Generation:
    """The slices that one generation of TPU has; docs.cloud.google.com/tpu/docs."""

    shapes: tuple[str, ...]  # all there are on a plane; on a torus of three, the small ones
    max_chips: int  # of one slice
    options: tuple[tuple[str, Any], ...] = ()  # of libtpu's topology

    @property
    def rule(self) -> str:
        """The rule for a shape."""
        listed = f"one of {', '.join(self.shapes)}"
        if not self.is_torus:
            return listed
        cubes = "AxBxC with A <= B <= C, each a multiple of 4, and at most"
        return f"{listed}, or {cubes} {self.max_chips} chips"

    @property
    def is_torus(self) -> bool:
        return self.max_chips > 256

    def has(self, shape: str) -> bool:
        """Whether there is a slice of this shape."""
        sides = [int(side) for side in shape.split("x")]
        is_cubes = len(sides) == 3 and sides == sorted(sides) and all(n % 4 == 0 for n in sides)
        large = self.is_torus and is_cubes and math.prod(sides) <= self.max_chips
        return shape in self.shapes or large


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
TPUS = {
    # Both cores of a chip are one device, as on the machines of the cloud.
    "v4": Generation(_TORUS, 4096, (("chip_config_name", "megacore"),)),
    "v5e": Generation(_PLANE, 256),
    "v5p": Generation(_TORUS, 6144),
    "v6e": Generation(_PLANE, 256),
}
# The modules that compile for a platform; of CUDA 12 or 13.
COMPILERS = {
    "tpu": (("libtpu",),),
    "cuda": (("jax_cuda12_plugin", "nvidia.cuda_nvcc"), ("jax_cuda13_plugin", "nvidia.cu13")),
}
EXAMPLES = "v5e:4x4, v5e:16x16*2 (2 slices), v5p:4x8x8, a100:16 (2 nodes of 8), cpu:8"


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine by name; `count` devices on `platform`."""

    name: str
    platform: str  # tpu, cuda or cpu
    kind: str  # v5e, a100, cpu
    shape: str  # 4x4; of GPUs 1xNODESxGPUS
    count: int  # devices of all slices
    slices: int = 1

    def topology(self):
        """jax's description of it, in a process that was started with `environment`."""
        from jax.experimental import topologies

        if self.platform == "cuda":
            text = (resources.files(__package__) / "targets" / GPUS[self.kind]).read_text()
            options = {"target_config": text, "topology": self.shape}
            return topologies.get_topology_desc(platform="cuda", **options)
        options = dict(TPUS[self.kind].options)
        if self.slices > 1:
            options["num_slices"] = self.slices
        if self.shape == "1x1":
            options["chips_per_host_bounds"] = [1, 1, 1]
        name = f"{self.kind}:{self.shape}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)

    @property
    def environment(self) -> dict[str, str]:
        """What must be set before jax starts: no accelerator is looked for, none is needed."""
        cpus = f"--xla_force_host_platform_device_count={self.count}"
        by_platform = {
            "cpu": {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {cpus}"},
            "cuda": {"TF_CPP_MIN_LOG_LEVEL": "3"},
            "tpu": {
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: topology() names the real one
                "TPU_LOG_DIR": "disabled",
                "TPU_STDERR_LOG_LEVEL": "3",
                "TPU_MIN_LOG_LEVEL": "3",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # else its lock file allows one process
            },
        }
        return {"JAX_PLATFORMS": "cpu"} | by_platform[self.platform]

    @property
    def is_installed(self) -> bool:
        """Whether the packages are, which need not mean that they work."""
        return self.platform == "cpu" or any(map(_are_installed, COMPILERS[self.platform]))

    @property
    def packages(self) -> str:
        """What compiling for it needs beside jax, and how to get it; it needs no accelerator."""
        version = metadata.version("jax")
        return {
            "cpu": "jax",
            "tpu": f'libtpu: pip install "jax[tpu]=={version}"',
            "cuda": "jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12, or those of "
            f'CUDA 13: pip install "jax[cuda12]=={version}"',
        }[self.platform]


def _are_installed(modules: tuple[str, ...]) -> bool:
    try:
        return all(map(importlib.util.find_spec, modules))
    except ModuleNotFoundError:  # the package above a module
        return False


def parse_target(text: str) -> Target:
    """The machine named v5e:4x4, v5e:16x16*2, a100:16 or cpu:8; ValueError if there is none."""
    kind, colon, rest = text.partition(":")
    known = ("cpu", *GPUS, *TPUS)
    if kind not in known or not colon:
        raise ValueError(
            f"unknown target {text!r}; give one of {', '.join(known)} with its size: {EXAMPLES}"
        )
    if kind in TPUS:
        return _tpu(text, kind, rest)
    if not re.fullmatch("[1-9][0-9]{0,4}", rest):
        raise ValueError(f"target {text!r}: {rest!r} is not a number of devices, like {kind}:8")
    count = int(rest)
    if kind == "cpu":
        if count > MAX_CPUS:
            raise ValueError(f"target {text!r}: at most {MAX_CPUS} CPU devices")
        return Target(text, "cpu", kind, str(count), count)
    if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
        raise ValueError(
            f"target {text!r}: {count} GPUs are not a whole number of nodes of {GPUS_PER_NODE}; "
            f"give 1 to {GPUS_PER_NODE}, or a multiple of {GPUS_PER_NODE}"
        )
    nodes = -(-count // GPUS_PER_NODE)
    return Target(text, "cuda", kind, f"1x{nodes}x{min(count, GPUS_PER_NODE)}", count)


def _tpu(text: str, kind: str, rest: str) -> Target:
    match = re.fullmatch(r"([1-9]\d{0,3}(?:x[1-9]\d{0,3})+)(?:\*([1-9]\d{0,2}))?", rest)
    if match is None or not TPUS[kind].has(match[1]):
        # libtpu itself accepts shapes that no machine has.
        raise ValueError(
            f"target {text!r}: {kind} has no slice {rest!r}; give {TPUS[kind].rule}; "
            "several slices as SHAPE*2"
        )
    shape, slices = match[1], int(match[2] or 1)
    chips = math.prod(int(side) for side in shape.split("x"))
    return Target(text, "tpu", kind, shape, chips * slices, slices)
