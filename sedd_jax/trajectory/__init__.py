"""Seeing a text denoise: the states of a sample, and a page that plays them. Numpy and data only.

film = show(model.stream("Hi, my name is [MASK:20]", steps=128, seed=0), path="film.html")
"""

from sedd_jax.trajectory.film import Film, show
from sedd_jax.trajectory.states import State

__all__ = ["Film", "State", "show"]
