"""Array kernels that know no graph: attention and the reductions over the vocabulary."""
