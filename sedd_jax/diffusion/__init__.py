"""The mathematics of score entropy discrete diffusion; imports jax only."""
