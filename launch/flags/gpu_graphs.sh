# shellcheck shell=sh
# Sourced before sampling on an NVIDIA GPU, by itself or after gpu.sh. On an H200 (jax 0.11.2) a
# sampling call at batch 1 took 1.53 ms with it and 1.58 without: compare yours before you keep it.
# By default XLA records straight runs of kernels as CUDA graphs, and the host reads the condition of
# every loop whose length depends on data. WHILE and CONDITIONAL record loops and branches too: the
# head's and the draw's loops then wait for no host, 1 read a network call in place of 5 at batch 1.
# They need CUDA 12.4; the XLA of before 2026 crashes at the second run of such a graph.
XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
export XLA_FLAGS
