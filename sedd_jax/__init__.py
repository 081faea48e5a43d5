"""Score Entropy Discrete Diffusion (Lou, Meng, Ermon, ICML 2024) in JAX."""

__version__ = "0.1.0"
