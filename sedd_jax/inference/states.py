"""The states of sampling, batch by batch: what every call that samples yields."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sedd_jax.diffusion.draws import make_key
from sedd_jax.diffusion.scores import NotFiniteError
from sedd_jax.inference import batches, revision
from sedd_jax.inference.batches import Texts
from sedd_jax.inference.sampling import Sampling, reverse_steps
from sedd_jax.inference.trajectory import State
from sedd_jax.parallel import processes


def states_of(
    model: Any,
    texts: Texts,
    updates: int,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Iterator[State]:
    """The first state and those at the end of `updates` parts of the steps, batch by batch.

    model is a SEDD. A generator, so its callers refuse bad input at the call and not at the first
    state.
    """
    key, steps, left = make_key(seed), sampling.steps, sampling.steps - texts.begin
    functions = sampling.functions(model.times_of(sampling))
    process = {"graph": model.graph, "schedule": model.schedule}
    if left < 0:  # nothing is noised
        yield State(steps, steps, *texts.known, model.tokenizer, texts.lengths)
        return
    ends = sorted({texts.begin - (-left * j // updates) for j in range(updates + 1)})
    total = left * -(-len(texts.lengths) // batch_size)
    with tqdm(desc="sample", unit=" steps", total=total, disable=not progress) as bar:
        for part in texts.parts(batch_size):
            shape = batches.shape(part.lengths, batch_size, model.length, model.mesh)
            rows = model.put(part.rows(shape))
            if part.begin > 0:
                rows = revision.noised(key, rows, part.time, **process)
            for begin, end in pairwise([part.begin, *ends]):
                span, how = (np.int32(begin), np.int32(end)), {"network": model.network, **process}
                chain = reverse_steps(model.params, key, rows, *span, functions, **how)
                rows = rows._replace(chain=chain)
                xt, calls = processes.fetch((chain.tokens, chain.calls))
                tokens, count = part.tokens(xt), len(part.lengths)
                if (tokens < 0).any():
                    raise NotFiniteError(f"by step {end} of {steps}")
                bar.update(end - begin)
                texts = tokens, part.known.is_known, model.tokenizer, part.lengths
                yield State(end, steps, *texts, calls[:count])
