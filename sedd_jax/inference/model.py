"""A trained model as one object: load it, sample from it, infill with it, score text with it.

model = sedd_jax.load("runs/quickstart")
model.sample(4, steps=128, seed=0)  # list[str]
model.infill("The [MASK:20] statement", steps=128, seed=0)
model.log_likelihood(["The first statement"], seed=0)  # Bound, nats
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sedd_jax import convert, data, hub
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion.draws import make_key
from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.likelihood import Bound, check_passes
from sedd_jax.diffusion.samplers import Known
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import NotFiniteError, ScoreFn
from sedd_jax.files import local_path
from sedd_jax.inference import bounds
from sedd_jax.inference.curve import Curve, checked_curve, fitted_times
from sedd_jax.inference.sampling import (
    FITTED,
    Rows,
    Sampling,
    check_whole,
    known_at_positions,
    known_rows,
    reverse_steps,
)
from sedd_jax.inference.trajectory import State, with_bar
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import processes, sharding

MIN_LENGTH = 16  # tokens of the smallest bucket


@dataclasses.dataclass(frozen=True, eq=False)
class SEDD:
    """A network with its weights, its process and its tokenizer.

    Batches and lengths are rounded up to powers of two (a batch to no more than batch_size, a
    length to no more than the model's) and filled up with padding that nothing attends to. Each
    such bucket compiles once; another prompt, seed or number of steps does not, nor do other
    weights of the same network. A sample depends on the seed and its number alone: the first of
    four is the first of one, up to the rounding of matmuls.
    """

    network: Transformer
    params: Any  # the moving average, float32
    graph: Graph
    schedule: Schedule
    tokenizer: Tokenizer
    length: int  # tokens of the blocks it was trained on
    sampling: Sampling = dataclasses.field(default_factory=Sampling)  # default options
    t_min: float = 1e-3  # where the bound's integral over noise levels begins
    step: int | None = None  # of training, where it is known
    mesh: Mesh | None = None  # the devices that share a batch and the weights; None: one device
    curve: Curve | None = None  # of cross entropy by mask share, which the grid "fitted" needs
    workdir: str | None = None  # of the run that it was loaded from, for messages
    # For an exported folder; nothing here reads them.
    experiment: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its config, as JSON
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the model card
    original: Mapping[str, Any] | None = None  # config.json of the original's

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        trained = "" if self.step is None else f", step {self.step}"
        return (
            f"SEDD({count:,} parameters, {self.dtype}, {self.graph}, {self.schedule}, "
            f"tokenizer {self.tokenizer.name!r}, length {self.length}{trained})"
        )

    @property
    def dtype(self) -> str:
        """The dtype of the network's matmuls, "float32" or "bfloat16"."""
        return np.dtype(self.network.dtype).name

    @property
    def score_fn(self) -> ScoreFn:
        """(xt [B, L], sigma [B, 1]) -> Scores: the seam that losses and samplers take."""
        return make_score_fn(self.network, self.params, self.graph)

    def with_params(self, params: Any) -> "SEDD":
        """The same network with other weights, placed as these; nothing is compiled again."""
        return dataclasses.replace(self, params=params)

    # --- sampling

    def sample(self, num_samples: int = 1, **options: Any) -> list[str]:
        """Texts of `length` tokens; options as in `sample_tokens`."""
        return self.decode(self.sample_tokens(num_samples, **options))

    def infill(
        self,
        template: str | None = None,
        num_samples: int = 1,
        *,
        positions: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
        length: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Texts with "[MASK:n]" in the template replaced by n sampled tokens.

        Or, without a template: texts of `length` tokens (the model's, by default) that hold tokens
        [n] at positions [n], in any order. Options as in `sample_tokens`.
        """
        if (template is None) == (positions is None):
            raise ValueError("give a template, or positions and tokens")
        if template is not None:
            if tokens is not None:
                raise ValueError("a template says its own tokens and length; leave both out")
            known = self._parse(template, length)
        else:
            length = self.length if length is None else length
            check_whole("length", length, 1, self.length)
            known = known_at_positions(positions, tokens, length)
        return self.decode(self.sample_tokens(num_samples, known=known, **options))

    def sample_tokens(
        self,
        num_samples: int = 1,
        *,
        length: int | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        batch_size: int = 16,
        seed: int = 0,
        progress: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Samples int32 [num_samples, L], L = length, by default the model's, or that of known.

        known is (tokens int32, is_known bool), tokens to keep: [L] for all, or [num_samples, L].
        batch_size samples are drawn at once. progress shows a bar of reverse steps. options are
        fields of `Sampling` - steps, predictor, draw, grid, t_min - in place of self.sampling's;
        None is the same as none. ValueError, before any work, for what cannot be meant: `chosen`.
        """
        states = self.stream(
            None,
            num_samples,
            length=length,
            known=known,
            updates=20 if progress else 1,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            **options,
        )
        return np.concatenate([state.tokens for state in states if state.step == state.steps])

    def stream(
        self,
        template: str | None = None,
        num_samples: int = 1,
        *,
        length: int | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        updates: int = 32,
        batch_size: int = 16,
        seed: int = 0,
        progress: bool = False,
        **options: Any,
    ) -> Iterator[State]:
        """The samples while they are drawn: the state at t = 1, `updates` more, evenly spaced.

        The last is what `sample_tokens` returns, bit for bit, with the same options. With a
        template, its free positions are sampled. At most `steps` states follow the first. More
        than batch_size samples come a batch after the other, each with states of its own.
        """
        self._check(num_samples, batch_size, seed)
        check_whole("updates", updates, 1)
        sampling = self.chosen(**options)
        if template is not None:
            if known is not None:
                raise ValueError("a template and known both say what to keep; give one of them")
            known, length = self._parse(template, length), None
        sizes = {"max_length": self.length, "vocab_size": self.graph.vocab_size}
        known = known_rows(known, num_samples, length, **sizes)
        # A generator of its own: bad input is refused at the call, not at the first state.
        states = self._states(known, updates, sampling, seed, batch_size)
        total = -(-num_samples // batch_size) * sampling.steps
        return with_bar(states, total, disable=not progress)

    def chosen(self, **options: Any) -> Sampling:
        """How samples are drawn with these options, as in `sample_tokens`.

        t_min of the grid "fitted" is the last of its times. ValueError for options that cannot be
        meant, and for that grid without a curve: `bound(blocks).curve` is one.
        """
        sampling = self.sampling.replaced(**options)
        times = self._times(sampling)
        if times is None:
            return sampling
        return dataclasses.replace(sampling, t_min=float(times[-1]))

    def _times(self, sampling: Sampling) -> np.ndarray | None:
        """The times of the grid "fitted"; None with another, or where nothing steps over it."""
        if sampling.grid != FITTED or sampling.predictor == "none":
            return None
        curve = checked_curve(self.curve, self.graph, self.workdir)
        return fitted_times(curve, sampling.steps, self.schedule)

    def _check(self, num_samples: int, batch_size: int, seed: int) -> None:
        check_whole("num_samples", num_samples, 1)
        check_whole("batch_size", batch_size, 1)
        check_whole("seed", seed, 0, 2**32 - 1)

    def _parse(self, template: str, length: int | None) -> tuple[np.ndarray, np.ndarray]:
        if length is not None:
            raise ValueError("a template says its own tokens and length; leave both out")
        return data.parse_template(template, self.tokenizer, self.length)

    def _states(
        self, known: Known, updates: int, sampling: Sampling, seed: int, batch_size: int
    ) -> Iterator[State]:
        """The states at t = 1 and at the end of `updates` parts of the steps, batch by batch."""
        key, functions = make_key(seed), sampling.functions(self._times(sampling))
        ends = sorted({-(-sampling.steps * j // updates) for j in range(updates + 1)})
        for first in range(0, len(known.tokens), batch_size):
            part = Known(*(a[first : first + batch_size] for a in known))
            count, length = part.tokens.shape
            shape = self._padded(count, batch_size), self._bucket(length)
            rows = Rows(
                index=np.arange(first, first + shape[0], dtype=np.int32),
                xt=np.zeros(shape, np.int32),
                known=Known(*(_fill(a, *shape) for a in part)),
                is_token=_is_token([length] * shape[0], shape[1]),
            )
            rows = self._put(rows)
            for begin, end in pairwise([0, *ends]):
                process = {"network": self.network, "graph": self.graph, "schedule": self.schedule}
                span = np.int32(begin), np.int32(end)
                xt = reverse_steps(self.params, key, rows, *span, functions, **process)
                rows = rows._replace(xt=xt)
                tokens = processes.fetch(xt)[:count, :length]
                if (tokens < 0).any():
                    raise NotFiniteError(f"by step {end} of {sampling.steps}")
                yield State(end, sampling.steps, tokens, part.is_known, self.tokenizer)

    # --- likelihood

    def log_likelihood(
        self, texts: str | Sequence[str], *, passes: int = 16, batch_size: int = 16, seed: int = 0
    ) -> Bound:
        """An upper bound on -log p of each text, nats: a Bound of float32 [N] arrays.

        `.total` is the bound and `.standard_error` its error from the noise drawn; passes, even,
        and 2 more network calls a text. Nothing is added to a text, before or after. A text's
        times and noise depend on the seed and its number alone.
        """
        self._check(1, batch_size, seed)
        check_passes(passes)
        rows = [self.tokenizer.encode(t) for t in ([texts] if isinstance(texts, str) else texts)]
        if not rows:
            raise ValueError("no texts; give at least one")
        lengths = np.array([len(row) for row in rows])
        for number, length in enumerate(lengths):
            if not 1 <= length <= self.length:
                raise ValueError(
                    f"text {number} has {length} tokens, not 1 to {self.length}, the model's "
                    "length; cut it, or prepare records and use bound"
                )
        buckets = np.array([self._bucket(int(length)) for length in lengths])
        key, numbers, results = make_key(seed), [], []
        for bucket in np.unique(buckets):
            members = np.flatnonzero(buckets == bucket)
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                missing = self._padded(len(part), batch_size) - len(part)
                index = np.pad(part, (0, missing), mode="edge").astype(np.int32)
                tokens = np.concatenate([_fill(rows[n][None], 1, bucket) for n in index])
                blocks = data.Blocks(tokens, _is_token(lengths[index], bucket))
                batch = self._put((blocks, index))
                bound = processes.fetch(self.bound_fn(self.params, key, *batch, passes=passes))
                bounds.check_finite(bound, index, "text")
                results.append(jax.tree.map(lambda a, part=part: a[: len(part)], bound))
                numbers.extend(part)
        order = np.argsort(numbers)
        return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *results)

    def bound(
        self,
        blocks: np.ndarray | data.Blocks,
        *,
        passes: int = 16,
        batch_size: int = 32,
        seed: int = 0,
        target_standard_error: float | None = None,
        max_passes: int = 1024,
        progress: bool = False,
    ) -> bounds.CorpusBound:
        """Upper bound on -log p of int32 [N, L] together, nats: passes + 2 network calls a block.

        passes is even; a call takes batch_size blocks. Times and noise depend on seed and a
        block's number alone. With target_standard_error, nats per token, the blocks are bounded
        round after round, each with new noise, until the mean's error is that small or the next
        round would take more than max_passes.
        """
        check_whole("seed", seed, 0, 2**32 - 1)
        check_passes(passes)
        if target_standard_error is not None and not target_standard_error > 0.0:
            raise ValueError(
                f"target_standard_error {target_standard_error} is not above 0; give nats per token"
            )
        blocks = blocks if isinstance(blocks, data.Blocks) else data.Blocks(blocks)
        key = make_key(seed)

        def one_round(r: int) -> bounds.CorpusBound:
            return bounds.corpus_bound(
                self.bound_fn,
                self.params,
                jax.random.fold_in(key, r),
                blocks,
                passes=passes,
                batch_size=batch_size,
                t_min=self.t_min,
                mesh=self.mesh,
                progress=progress,
            )

        if target_standard_error is None:
            return one_round(0)
        max_rounds = max(1, max_passes // passes)
        return bounds.bound_until(one_round, target_standard_error, max_rounds, tokens=blocks.count)

    @property
    def bound_fn(self) -> bounds.BoundFn:
        """(params, key, Blocks, index, *, passes) -> Bound, jitted, for `bounds.corpus_bound`."""
        return bounds.make_bound_fn(self.network, self.graph, self.schedule, t_min=self.t_min)

    # --- saving

    def save_pretrained(
        self, folder: str | Path, *, name: str | None = None, replace: bool = False
    ) -> None:
        """Write the folder that `load` and the original's `SEDD.from_pretrained` read.

        config.json, model.safetensors with the original's names, sedd_jax.json (the tokenizer and
        the whole config) and README.md, a model card, in which the model is called `name`, the
        folder's by default. ValueError if anything is in folder; with replace, if that is more
        than an earlier export.
        """
        model = convert.Pretrained(
            config=self.experiment,
            vocab_size=self.graph.vocab_size,
            params=jax.device_get(self.params),
            tokenizer=self.tokenizer,
            step=self.step,
            original=self.original,
            about=dict(self.about),
            curve=None if self.curve is None else self.curve.to_dict(),
        )
        convert.write_folder(local_path(folder), model, name=name, replace=replace)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        token: str | None = None,
        message: str = "Upload a SEDD model",
    ) -> str:
        """`save_pretrained` to owner/name on the Hugging Face hub; returns the commit's address."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, name=name)
            return hub.push(folder, name, private=private, token=token, message=message)

    def decode(self, tokens: jax.Array | np.ndarray) -> list[str]:
        """A text for each row of int32 [B, L]; masked positions show as ░."""
        return [self.tokenizer.decode(row) for row in np.asarray(tokens)]

    # --- batches of few shapes

    def _padded(self, count: int, batch_size: int) -> int:
        """Rows of a batch of `count`: a power of two up to batch_size, divisible over the mesh."""
        parts = 1 if self.mesh is None else sharding.batch_parts(self.mesh)
        return -(-min(_power_of_two(count), batch_size) // parts) * parts

    def _bucket(self, length: int) -> int:
        """What rows of `length` tokens are filled up to."""
        return min(max(MIN_LENGTH, _power_of_two(length)), self.length)

    def _put(self, batch: Any) -> Any:
        """A tree of numpy arrays where the weights are: put elsewhere, jit would compile twice."""
        if self.mesh is not None:
            return sharding.put_whole(batch, self.mesh)
        return jax.device_put(batch, jax.tree.leaves(self.params)[0].sharding)


def _power_of_two(low: int) -> int:
    """The smallest power of two that is at least low."""
    return 1 << (low - 1).bit_length()


def _fill(a: np.ndarray, rows: int, length: int) -> np.ndarray:
    """a [N, L] with zeros added up to [rows, length]."""
    return np.pad(a, ((0, rows - a.shape[0]), (0, length - a.shape[1])))


def _is_token(lengths: Sequence[int], length: int) -> np.ndarray:
    """bool [B, length], False at the padding after each row's length."""
    return np.arange(length) < np.reshape(lengths, (-1, 1))
