"""A trained model as one object: load it, sample from it, infill with it, score text with it.

model = sedd_jax.load("runs/quickstart")
model.sample(4, steps=128, seed=0)  # list[str]
model.infill("The [MASK:20] statement", steps=128, seed=0)
model.log_likelihood(["The first statement"], seed=0)  # Bound, nats
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from sedd_jax import convert, data
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion import samplers
from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.likelihood import Bound, check_passes
from sedd_jax.diffusion.samplers import Known
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn
from sedd_jax.inference import bounds
from sedd_jax.inference.trajectory import State
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import processes, sharding

SHORTEST = 16  # tokens of the smallest bucket


@dataclasses.dataclass(frozen=True, eq=False)  # eq=False: the object is its own jit cache key
class SEDD:
    """A network with its weights, its process and its tokenizer.

    Batches and lengths are rounded up to powers of two (a batch to no more than batch_size, a
    length to no more than the model's) and filled up with padding that nothing attends to. Each
    such bucket compiles once; another prompt, seed or number of steps does not. A sample depends on
    the seed and its number alone: the first of four is the first of one, up to the rounding of
    matrix products.
    """

    network: Transformer
    params: Any  # the moving average, float32
    graph: Graph
    schedule: Schedule
    tokenizer: Tokenizer
    length: int  # tokens of the blocks it was trained on
    config: Any
    step: int | None  # of training, where it is known
    mesh: Mesh | None = None  # the devices that share a batch and the weights; None: one device
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the model card
    original: Mapping[str, Any] | None = None  # config.json of the original's, kept when saved

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        trained = "" if self.step is None else f", step {self.step}"
        return (
            f"SEDD({count:,} parameters, {self.config.model.dtype}, {self.graph}, {self.schedule}, "
            f"tokenizer {self.tokenizer.name!r}, length {self.length}{trained})"
        )

    @property
    def score_fn(self) -> ScoreFn:
        """(xt [B, L], sigma [B, 1]) -> Scores: the seam that losses and samplers take."""
        return make_score_fn(self.network, self.params, self.graph)

    def with_params(self, params: Any) -> "SEDD":
        """The same network with other weights, placed as these; nothing is compiled again."""
        other = dataclasses.replace(self, params=params)
        for name in ("_sample", "bound_fn"):
            other.__dict__[name] = getattr(self, name)
        return other

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
        [n] at positions [n], any places in any order. Options as in `sample_tokens`.
        """
        known = self._given(template, positions, tokens, length)
        return self.decode(self.sample_tokens(num_samples, known=known, **options))

    def sample_tokens(
        self,
        num_samples: int = 1,
        *,
        length: int | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Samples int32 [num_samples, L], L = length, by default the model's, or that of known.

        known is (tokens int32, is_known bool), tokens to keep: [L] for all, or [num_samples, L].
        batch_size samples are drawn at once. progress shows a bar of network calls.

        Options: steps=128, each a network call, and one more for the denoiser; seed=0;
        predictor="tweedie", "euler" or "none" (the denoiser alone); draw="exact" or
        "float32_gumbel", the original's; grid="uniform" or "cosine", the times of the steps;
        t_min=1e-5, the time of the denoising. ValueError, before any work, for what cannot be
        meant.
        """
        options = _Sampling(**options)
        _check("num_samples", num_samples, 1, 2**31 - 1)
        _check("batch_size", batch_size, 1, 2**31 - 1)
        known = self._known(num_samples, length, known)
        marks = _marks(options.steps, 20) if progress else [options.steps]
        total = -(-num_samples // batch_size) * options.steps
        found, before = [], 0
        with tqdm(desc="sample", unit=" steps", total=total, disable=not progress) as bar:
            for step, x, _ in self._states(known, marks, options, batch_size):
                bar.update(step - before)
                before = step % options.steps  # the next batch begins at 0
                if step == options.steps:
                    found.append(x)
        return np.concatenate(found)

    def stream(
        self,
        template: str | None = None,
        num_samples: int = 1,
        *,
        length: int | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        updates: int = 32,
        batch_size: int = 16,
        **options: Any,
    ) -> Iterator[State]:
        """The samples while they are drawn: the state at t = 1, `updates` more, evenly spaced.

        The last is what `sample_tokens` returns, bit for bit, with the same options. With a
        template, its free places are sampled. At most `steps` states follow the first. More than
        batch_size samples come a batch after the other, each with states of its own.
        """
        options = _Sampling(**options)
        _check("num_samples", num_samples, 1, 2**31 - 1)
        _check("updates", updates, 1, 2**31 - 1)
        _check("batch_size", batch_size, 1, 2**31 - 1)
        if template is not None:
            if known is not None:
                raise ValueError("a template and known both say what to keep; give one of them")
            known = self._given(template, None, None, length)
        known = self._known(num_samples, length, known)

        def states():  # so that bad input is refused at the call, not at the first state
            marks = [0, *_marks(options.steps, updates)]
            for step, x, is_known in self._states(known, marks, options, batch_size):
                yield State(step, options.steps, x, is_known, self.tokenizer)

        return states()

    def _given(self, template, positions, tokens, length) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [L], is_known bool [L]) of infill's arguments."""
        if (template is None) == (positions is None):
            raise ValueError("give a template, or positions and tokens")
        if template is not None:
            if length is not None or tokens is not None:
                raise ValueError("a template says its own tokens and length; leave both out")
            return data.parse_template(template, self.tokenizer, self.length)
        length = self.length if length is None else length
        _check("length", length, 1, self.length)
        positions, tokens = _ids("positions", positions), _ids("tokens", tokens)
        if positions.ndim != 1 or positions.shape != tokens.shape:
            raise ValueError(
                f"positions {positions.shape} and tokens {tokens.shape} must be two lists of one "
                "length; give a token for each position"
            )
        outside = positions[(positions < 0) | (positions >= length)]
        if outside.size or len(set(positions.tolist())) < positions.size:
            wrong = f"position {outside[0]}" if outside.size else "a position given twice"
            raise ValueError(f"{wrong} is not in [0, {length}) once; mend positions or length")
        known = np.zeros(length, np.int64), np.zeros(length, bool)
        known[0][positions], known[1][positions] = tokens, True
        return known

    def _known(self, num_samples: int, length: int | None, known) -> Known:
        """What samples keep, numpy [num_samples, L]."""
        if known is None:
            length = self.length if length is None else length
            _check("length", length, 1, self.length)
            known = np.zeros(length, np.int32), np.zeros(length, bool)
        tokens, is_known = _ids("known tokens", known[0]), np.array(known[1], bool)
        try:
            width = np.broadcast_shapes(tokens.shape, is_known.shape)[-1]
            shape = (num_samples, width)
            tokens, is_known = np.broadcast_to(tokens, shape), np.broadcast_to(is_known, shape)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"known has tokens {tokens.shape} and is_known {is_known.shape}; give [L] for all "
                f"samples or [num_samples, L] = [{num_samples}, L] of each"
            ) from error
        if length is not None and width != length:
            raise ValueError(f"known has {width} positions, not length {length}; leave length out")
        if not 1 <= width <= self.length:
            raise ValueError(
                f"{width} positions are not in [1, {self.length}], the model's length; give text or "
                "shorten it"
            )
        kept = tokens[is_known]
        if kept.size and not 0 <= kept.min() <= kept.max() < self.graph.vocab_size:
            raise ValueError(
                f"known tokens must be in [0, {self.graph.vocab_size}), the mask is none of them; "
                "encode them with the model's tokenizer"
            )
        return Known(np.where(is_known, tokens, 0).astype(np.int32), is_known)

    def _states(
        self, known: Known, marks: Sequence[int], options: "_Sampling", batch_size: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(step, state int32 [N, L], is_known [N, L]) at every mark, batch after batch.

        The last mark is steps: the samples.
        """
        num_samples, length = known.tokens.shape
        for first in range(0, num_samples, batch_size):
            part = jax.tree.map(lambda a, first=first: a[first : first + batch_size], known)
            count = len(part.tokens)
            rows, width = self._rows(count, batch_size), self._width(length)
            batch = (
                np.arange(first, first + rows, dtype=np.int32),  # numbers among all samples
                np.zeros((rows, width), np.int32),
                jax.tree.map(lambda a, rows=rows, width=width: _fill(a, rows, width), part),
                _is_token(rows, [length], width),
            )
            index, x, filled, is_token = self._put(batch)
            for begin, end in pairwise([0, *marks]):
                x = self._sample(
                    self.params,
                    jax.random.key(options.seed),
                    index,
                    x,
                    *(np.int32(n) for n in (begin, end, options.steps)),
                    np.float32(options.t_min),
                    filled,
                    is_token,
                    predictor=options.predictor,
                    draw=options.draw,
                    grid=options.grid,
                )
                yield end, processes.fetch(x)[:count, :length], part.is_known

    @functools.cached_property
    def _sample(self):
        @functools.partial(jax.jit, static_argnames=("predictor", "draw", "grid"))
        def run(
            params,
            key,
            index,
            x,
            begin,
            end,
            steps,
            t_min,
            known,
            is_token,
            *,
            predictor,
            draw,
            grid,
        ):
            return samplers.sample(
                key,
                make_score_fn(self.network, params, self.graph, is_token=is_token),
                self.graph,
                self.schedule,
                x.shape,
                steps=steps,
                predictor=samplers.PREDICTORS[predictor],
                known=known,
                t_min=t_min,
                draw=samplers.DRAWS[draw],
                grid=samplers.GRIDS[grid],
                index=index,
                begin=begin,
                end=end,
                x=x,
            )

        return run

    # --- likelihood

    def log_likelihood(
        self, texts: str | Sequence[str], *, passes: int = 16, batch_size: int = 16, seed: int = 0
    ) -> Bound:
        """An upper bound on -log p of each text, nats: a Bound of float32 [N] arrays.

        `.total` is the bound and `.standard_error` its error from the noise drawn; passes, even,
        and 2 more network calls a text. Nothing is added to a text, before or after. A text's
        times and noise depend on the seed and its place alone.
        """
        _check("batch_size", batch_size, 1, 2**31 - 1)
        _check("seed", seed, 0, 2**32 - 1)
        check_passes(passes)
        rows = [self.tokenizer.encode(t) for t in ([texts] if isinstance(texts, str) else texts)]
        if not rows:
            raise ValueError("no texts; give at least one")
        for number, row in enumerate(rows):
            if not 1 <= len(row) <= self.length:
                raise ValueError(
                    f"text {number} has {len(row)} tokens, not 1 to {self.length}, the model's "
                    "length; cut it, or prepare records and use bound"
                )
        buckets: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            buckets.setdefault(self._width(len(row)), []).append(number)
        key, numbers, found = jax.random.key(seed), [], []
        for width, members in buckets.items():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                count = self._rows(len(part), batch_size)
                filled = [*part, *part[:1] * (count - len(part))]
                tokens = np.concatenate([_fill(rows[n][None], 1, width) for n in filled])
                is_token = _is_token(count, [len(rows[n]) for n in filled], width)
                blocks, index = self._put(
                    (data.Blocks(tokens, is_token), np.array(filled, np.int32))
                )
                drawn = self.bound_fn(self.params, key, blocks, index, passes=passes)
                drawn = processes.fetch(drawn)
                found.append(jax.tree.map(lambda a, part=part: a[: len(part)], drawn))
                numbers += part
        order = np.argsort(numbers)
        return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *found)

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
        block's place alone. With target_standard_error, nats per token, the blocks are gone
        through again, each time with new noise, until the error is there or the next round would
        take more than max_passes.
        """
        _check("seed", seed, 0, 2**32 - 1)
        check_passes(passes)
        if target_standard_error is not None and not target_standard_error > 0.0:
            raise ValueError(
                f"target_standard_error {target_standard_error} is not above 0; give nats per token"
            )
        blocks = blocks if isinstance(blocks, data.Blocks) else data.Blocks(blocks)
        key = jax.random.key(seed)

        def one_round(r: int) -> bounds.CorpusBound:
            return bounds.corpus_bound(
                self.bound_fn,
                self.params,
                jax.random.fold_in(key, r),
                blocks,
                passes=passes,
                batch_size=batch_size,
                t_min=self.config.objective.t_min,
                mesh=self.mesh,
                progress=progress,
            )

        if target_standard_error is None:
            return one_round(0)
        most = max(1, max_passes // max(passes, 1))
        return bounds.bound_until(one_round, target_standard_error, most, tokens=blocks.count)

    @functools.cached_property
    def bound_fn(self) -> bounds.BoundFn:
        """Jitted (params, key, Blocks, index, *, passes) -> Bound, for `bounds.corpus_bound`."""

        def score_fn(params, is_token):
            return make_score_fn(self.network, params, self.graph, is_token=is_token)

        t_min = self.config.objective.t_min
        return bounds.make_bound_fn(score_fn, self.graph, self.schedule, t_min=t_min)

    # --- keeping

    def save_pretrained(self, folder: str | Path, *, name: str | None = None) -> None:
        """Write the folder that `load` and the original's `SEDD.from_pretrained` read.

        config.json, model.safetensors with the original's names, sedd_jax.json (the tokenizer and
        the whole config) and README.md, a model card, in which the model is called `name`, the
        folder's by default. ValueError if folder holds anything else.
        """
        convert.write_folder(
            Path(folder),
            name=name,
            config=self.config,
            vocab_size=self.graph.vocab_size,
            params=jax.device_get(self.params),
            tokenizer=self.tokenizer,
            step=self.step,
            original=self.original,
            about=dict(self.about),
        )

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        token: str | None = None,
        message: str = "Upload a SEDD model",
    ) -> str:
        """`save_pretrained` to owner/name on the Hugging Face hub; returns the commit's address."""
        from sedd_jax import hub

        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            self.save_pretrained(folder, name=name)
            return hub.push(folder, name, private=private, token=token, message=message)

    def decode(self, tokens: jax.Array | np.ndarray) -> list[str]:
        """A text for each row of int32 [B, L]; masked positions show as ░."""
        return [self.tokenizer.decode(row) for row in np.asarray(tokens)]

    def _rows(self, count: int, most: int) -> int:
        """What a batch of count rows is filled up to: no more than `most`, unless the mesh needs it."""
        parts = 1 if self.mesh is None else sharding.batch_parts(self.mesh)
        return -(-min(_power_of_two(count), most) // parts) * parts

    def _width(self, length: int) -> int:
        """What rows of `length` tokens are filled up to."""
        return min(max(SHORTEST, _power_of_two(length)), self.length)

    def _put(self, batch: Any) -> Any:
        """A tree of numpy arrays where the weights are: placed otherwise, jit would compile twice."""
        if self.mesh is not None:
            return sharding.put_whole(batch, self.mesh)
        return jax.device_put(batch, jax.tree.leaves(self.params)[0].sharding)


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """Options of the sampler, checked."""

    steps: int = 128
    seed: int = 0
    predictor: str = "tweedie"
    draw: str = "exact"
    grid: str = "uniform"
    t_min: float = 1e-5

    def __post_init__(self):
        _check("steps", self.steps, 1, 10**6)
        _check("seed", self.seed, 0, 2**32 - 1)
        for name, table in (
            ("predictor", samplers.PREDICTORS),
            ("draw", samplers.DRAWS),
            ("grid", samplers.GRIDS),
        ):
            value = getattr(self, name)
            if value not in table:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(table)}")
        if not 0.0 < self.t_min < 1.0:
            raise ValueError(f"t_min {self.t_min} is not inside (0, 1); 1e-5 is usual")


def _check(name: str, value: int, least: int, most: int) -> None:
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (is_whole and least <= value <= most):
        raise ValueError(f"{name} {value!r} is no whole number in [{least}, {most}]; mend it")


def _ids(name: str, values: Any) -> np.ndarray:
    """values as whole numbers; ValueError for any other kind."""
    found = np.array(() if values is None else values)
    if found.size == 0:
        found = found.astype(np.int64)  # an empty list is float64 to numpy
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} of dtype {found.dtype} are no whole numbers; give integers")
    return found


def _power_of_two(least: int) -> int:
    """The smallest one that is at least this."""
    return 1 << (least - 1).bit_length()


def _marks(steps: int, updates: int) -> list[int]:
    """At most `updates` numbers of steps, evenly spaced, the last of them `steps`."""
    return sorted({-(-steps * j // updates) for j in range(1, updates + 1)})


def _fill(a: np.ndarray, rows: int, width: int) -> np.ndarray:
    """a [N, L] with zeros added up to [rows, width]."""
    return np.pad(a, ((0, rows - a.shape[0]), (0, width - a.shape[1])))


def _is_token(rows: int, lengths: Sequence[int], width: int) -> np.ndarray:
    """bool [rows, width], False at the padding after each row's length, or after that of all."""
    return np.broadcast_to(np.arange(width) < np.reshape(lengths, (-1, 1)), (rows, width))
