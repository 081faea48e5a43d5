# shellcheck shell=sh
# Sourced before sedd-train on TPU v4, v5e, v5p and v6e; libtpu 0.0.42, jax 0.10.2's, accepts every flag.
# TPU flags belong in LIBTPU_INIT_ARGS: in XLA_FLAGS jaxlib does not know them and aborts.
# data_parallel_all_reduce_opt, different_sized_ops: gradients are summed while the backward pass of
#   the scanned blocks goes on, also where their sizes differ from what the loop stacks.
# async_collective_fusion, its all_gather and multiple_steps, overlap_compute_collective_tc: fsdp's
#   gathers run beside the matrix products of the same core.
LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:+$LIBTPU_INIT_ARGS }--xla_tpu_enable_data_parallel_all_reduce_opt=true\
 --xla_tpu_data_parallel_opt_different_sized_ops=true\
 --xla_tpu_enable_async_collective_fusion=true\
 --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true\
 --xla_tpu_enable_async_collective_fusion_multiple_steps=true\
 --xla_tpu_overlap_compute_collective_tc=true\
 --xla_enable_async_all_gather=true"
export LIBTPU_INIT_ARGS
