# shellcheck shell=sh
# Sourced before sedd-train on A100s and H100s; jax 0.7.2, 0.10.2 and 0.12.0 accept every flag.
# XLA's documented level above the default: collectives are made asynchronous, pipelined and moved to
# where computation hides them.
export JAX_OPTIMIZATION_LEVEL=O1
# The default, 0.75, leaves a quarter of the memory unused; cuDNN, NCCL and the driver need the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
# latency_hiding_scheduler: part of O1, named for a jax that knows the flag and not the level.
# combine_threshold, 128 MiB: a message a layer and not one a matrix. A layer's float32 gradients are
# 31 MB in SEDD small and 54 MB in SEDD medium; the thresholds are to be larger than one layer.
XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_enable_latency_hiding_scheduler=true\
 --xla_gpu_all_reduce_combine_threshold_bytes=134217728\
 --xla_gpu_all_gather_combine_threshold_bytes=134217728\
 --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
export XLA_FLAGS
