"""The states of sampling, batch by batch: what every call that samples yields."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.diffusion.draws import make_key
from sedd_jax.diffusion.objectives import Autoregressive, Plaid
from sedd_jax.diffusion.samplers import Known
from sedd_jax.diffusion.scores import NotFiniteError
from sedd_jax.host.console import progress_bar, ticking
from sedd_jax.inference import batches, revision
from sedd_jax.inference.autoregressive import AutoregressiveSampler
from sedd_jax.inference.batches import Texts
from sedd_jax.inference.options import Call, OnStep
from sedd_jax.inference.plaid import PlaidSampler
from sedd_jax.inference.sampling import Rows, Sampling, reverse_steps
from sedd_jax.inference.trajectory import State
from sedd_jax.parallel import processes


class Sampler(Protocol):
    """How the texts of a model are drawn: in steps, of which any part can be taken at a time."""

    def chosen(self, **options: Any) -> Sampling:
        """The model's options with these in their place; ValueError for what has no meaning."""

    def check_known(self, known: Known) -> None:
        """ValueError for tokens that a sample cannot keep; numpy [N, L]."""

    def steps(self, texts: Texts, sampling: Sampling) -> int:
        """How many steps a sample takes."""

    def start(self, key: jax.Array, rows: Rows, texts: Texts) -> Rows:
        """Rows before their first step."""

    def advance(
        self, key: jax.Array, rows: Rows, begin: np.int32, end: np.int32, sampling: Sampling
    ) -> Rows:
        """The rows after the steps begin <= i < end; sampling holds functions, not their names."""

    def noise_levels(self, steps: np.ndarray, sampling: Sampling) -> np.ndarray | None:
        """`State.noise_level` after so many steps, float [N]; None where the mask shows it."""


@dataclasses.dataclass(frozen=True)
class DiffusionSampler:
    """Reverse steps and a denoiser."""

    model: Any  # a SEDD

    def chosen(self, **options: Any) -> Sampling:
        usual = self.model.sampling
        chosen = usual.replaced(**options).checked_for(self.model.graph)
        given = [k for k, v in options.items() if v is not None and v != getattr(usual, k)]
        chosen.warn_of_unread(given)
        return chosen

    def check_known(self, known: Known) -> None:
        pass  # any token may be kept

    def steps(self, texts: Texts, sampling: Sampling) -> int:
        return sampling.steps

    def start(self, key: jax.Array, rows: Rows, texts: Texts) -> Rows:
        if texts.begin == 0:
            return rows
        process = {"graph": self.model.graph, "schedule": self.model.schedule}
        return revision.noised(key, rows, texts.time, **process)

    def advance(
        self, key: jax.Array, rows: Rows, begin: np.int32, end: np.int32, sampling: Sampling
    ) -> Rows:
        model = self.model
        how = {"network": model.network, "graph": model.graph, "schedule": model.schedule}
        chain = reverse_steps(model.params, key, rows, begin, end, sampling, **how)
        return rows._replace(chain=chain)

    def noise_levels(self, steps: np.ndarray, sampling: Sampling) -> np.ndarray | None:
        if self.model.graph.mask is not None:
            return None
        times = jnp.asarray(sampling.grid(steps, sampling.steps, sampling.t_min))
        noised = -jnp.expm1(-self.model.schedule.sigma(times))
        return np.where(steps < sampling.steps, noised, 0.0)  # the denoiser comes with the last


EVERY_STEP = 2**31 - 1  # updates, of which no more are made than there are steps

# By objective; of all others reverse steps of tokens.
SAMPLERS = {Autoregressive: AutoregressiveSampler, Plaid: PlaidSampler}


def sampler_of(model: Any) -> Sampler:
    """The sampler of a SEDD."""
    return SAMPLERS.get(type(model.objective), DiffusionSampler)(model)


def states_of(model: Any, texts: Texts, updates: int, call: Call) -> Iterator[State]:
    """The first state and those at the end of `updates` parts of the steps, batch by batch.

    model is a SEDD. A generator, so its callers refuse bad input at the call and not at the first
    state.
    """
    key, sampler = make_key(call.seed), sampler_of(model)
    steps = sampler.steps(texts, call.sampling)
    left = steps - texts.begin
    functions = call.sampling.functions(model.times_of(call.sampling))
    if left < 0:  # nothing is noised
        yield State(steps, steps, *texts.known, model.tokenizer, texts.lengths)
        return
    updates = min(updates, max(left, 1))
    ends = sorted({texts.begin - (-left * j // updates) for j in range(updates + 1)})
    levels = sampler.noise_levels(np.array(ends), functions)
    levels = dict(zip(ends, [None] * len(ends) if levels is None else levels.tolist()))
    total = left * -(-len(texts.lengths) // call.batch_size)
    shows = processes.shows(call.progress)
    with progress_bar(desc="sample", total=total, unit=" steps", is_shown=shows) as bar:
        bar.set_postfix_str("compiling ...")
        for part in texts.parts(call.batch_size):
            shape = batches.shape(part.lengths, call.batch_size, model.length, model.mesh)
            rows = sampler.start(key, model.put(part.rows(shape)), part)
            for begin, end in pairwise([part.begin, *ends]):
                with ticking(bar):
                    rows = sampler.advance(key, rows, np.int32(begin), np.int32(end), functions)
                    xt, calls = processes.fetch((rows.chain.tokens, rows.chain.calls))
                tokens, count = part.tokens(xt), len(part.lengths)
                if (tokens < 0).any():
                    raise NotFiniteError(f"by step {end} of {steps}")
                bar.set_postfix_str("", refresh=False)
                bar.update(end - begin)
                texts = tokens, part.known.is_known, model.tokenizer, part.lengths
                yield State(end, steps, *texts, calls[:count], levels[end])


def last_states(
    stream: Callable[..., Iterator[State]], on_step: OnStep | None, **options: Any
) -> Iterator[State]:
    """The last state of each batch of stream(updates=..., **options); on_step gets every state.

    Without on_step the steps are cut into parts for nothing but the bar.
    """
    updates = EVERY_STEP if on_step is not None else 20 if options.get("progress") else 1
    for state in stream(updates=updates, **options):
        if on_step is not None:
            on_step(state)
        if state.step == state.steps:
            yield state
