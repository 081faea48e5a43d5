"""A train step compiled for machines that are absent: whether it fits, what it sends and costs.

`dry_run` compiles the step that training would run, in a child process that has the target's
compiler: libtpu for TPU, the CUDA plug-in for GPU, jax itself for CPU. It needs no accelerator
and allocates nothing.
"""

from sedd_jax.training.dry_run.collectives import Collective
from sedd_jax.training.dry_run.estimate import Estimate, Parameter, describe
from sedd_jax.training.dry_run.launch import dry_run
from sedd_jax.training.dry_run.targets import parse_target

__all__ = ["Collective", "Estimate", "Parameter", "describe", "dry_run", "parse_target"]
