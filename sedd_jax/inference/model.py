"""A trained model as one object: load it, sample, infill and revise with it, score text with it.

model = sedd_jax.load("runs/quickstart")
model.sample(4, steps=128, seed=0)  # list[str]
model.infill("The [MASK:20] statement", steps=128, seed=0)
model.revise("The first statement", steps=128, strength=0.5, seed=0)
model.log_likelihood(["The first statement"], seed=0)  # Bound, nats
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from sedd_jax import convert, data
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion.draws import make_key
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.likelihood import Bound
from sedd_jax.diffusion.objectives import Dwdse, Objective
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn
from sedd_jax.host import hub
from sedd_jax.host.files import local_path
from sedd_jax.inference import batches, bounds, revision
from sedd_jax.inference.batches import Texts
from sedd_jax.inference.curve import Curve, checked_curve, fitted_times
from sedd_jax.inference.options import Call, CallOptions, OnStep, SamplingOptions, shows_options
from sedd_jax.inference.sampling import (
    FITTED,
    KnownTokens,
    Sampling,
    check_whole,
    known_at_positions,
    known_rows,
)
from sedd_jax.inference.states import last_states, sampler_of, states_of
from sedd_jax.inference.trajectory import State
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import processes, sharding


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
    objective: Objective = dataclasses.field(default_factory=Dwdse)  # which has its bound
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
            f"{self.objective.title}({count:,} parameters, {self.dtype}, {self.graph}, "
            f"{self.schedule}, "
            f"tokenizer {self.tokenizer.name!r}, length {self.length}{trained})"
        )

    @property
    def dtype(self) -> str:
        """The dtype of the network's matmuls, "float32" or "bfloat16"."""
        return np.dtype(self.network.dtype).name

    @property
    def score_fn(self) -> ScoreFn:
        """(xt [B, L], sigma [B, 1]) -> Scores: the seam that losses and samplers take; ValueError
        for an autoregressive or a PLAID model."""
        if not self.objective.has_scores:
            raise ValueError(
                f"a model of {self.objective.title} has no scores of noised tokens; use "
                "log_likelihood, bound and sample"
            )
        return make_score_fn(self.network, self.params, self.graph)

    def with_params(self, params: Any) -> "SEDD":
        """The same network with other weights, placed as these; nothing is compiled again."""
        return dataclasses.replace(self, params=params)

    # --- sampling

    @shows_options
    def sample(
        self,
        num_samples: int = 1,
        *,
        length: int | None = None,
        known: KnownTokens | None = None,
        on_step: OnStep | None = None,
        **options: Unpack[CallOptions],
    ) -> list[str]:
        """Texts of `length` tokens, those of `sample_tokens`."""
        how = {"length": length, "known": known, "on_step": on_step}
        return self.decode(self.sample_tokens(num_samples, **how, **options))

    @shows_options
    def infill(
        self,
        template: str | None = None,
        num_samples: int = 1,
        *,
        positions: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
        length: int | None = None,
        on_step: OnStep | None = None,
        **options: Unpack[CallOptions],
    ) -> list[str]:
        """Texts with "[MASK:n]" in the template replaced by n sampled tokens.

        Or, without a template: texts of `length` tokens (the model's, by default) that hold tokens
        [n] at positions [n], in any order. on_step as in `sample_tokens`.
        """
        if (template is None) == (positions is None):
            raise ValueError("give a template, or positions and tokens")
        if template is not None:
            if tokens is not None:
                raise ValueError("a template says its own tokens and length; leave both out")
            known = self._parse(template, length)
        else:
            known = known_at_positions(positions, tokens, length, self.length)
        how = {"known": known, "on_step": on_step}
        return self.decode(self.sample_tokens(num_samples, **how, **options))

    @shows_options
    def sample_tokens(
        self,
        num_samples: int = 1,
        *,
        length: int | None = None,
        known: KnownTokens | None = None,
        on_step: OnStep | None = None,
        **options: Unpack[CallOptions],
    ) -> np.ndarray:
        """Samples int32 [num_samples, L], L = length, by default the model's, or that of known.

        known is (tokens int32, is_known bool), tokens to keep: [L] for all, or [num_samples, L].
        on_step is called with the State of noise and with that after each step, batch by batch, as
        `stream` yields them. ValueError, before any work, for what cannot be meant.
        """
        stream = functools.partial(self.stream, None, num_samples, length=length, known=known)
        states = last_states(stream, on_step, **options)
        return np.concatenate([state.tokens for state in states])

    @shows_options
    def stream(
        self,
        template: str | None = None,
        num_samples: int = 1,
        *,
        length: int | None = None,
        known: KnownTokens | None = None,
        updates: int = 32,
        **options: Unpack[CallOptions],
    ) -> Iterator[State]:
        """The samples while they are drawn: the state at t = 1, `updates` more, evenly spaced.

        The last is what `sample_tokens` returns, bit for bit, with the same options. With a
        template, its free positions are sampled. At most `steps` states follow the first. More
        than batch_size samples come a batch after the other, each with states of its own.
        """
        call = self._call(num_samples, updates, options)
        if template is not None:
            if known is not None:
                raise ValueError("a template and known both say what to keep; give one of them")
            known, length = self._parse(template, length), None
        sizes = {"max_length": self.length, "vocab_size": self.graph.vocab_size}
        known = known_rows(known, num_samples, length, **sizes)
        sampler_of(self).check_known(known)
        texts = Texts(known, np.full(num_samples, known.tokens.shape[1]))
        return states_of(self, texts, updates, call)

    @shows_options
    def revise(
        self,
        drafts: str | Sequence[str],
        num_samples: int = 1,
        *,
        strength: float = revision.STRENGTH,
        keep: str | Sequence[str | int] = (),
        on_step: OnStep | None = None,
        **options: Unpack[CallOptions],
    ) -> list[str]:
        """num_samples revisions of each draft, those of the first first.

        model.revise(text, steps=128, strength=0.5, keep=["Alice"]): strength and keep as in
        `stream_revisions`, on_step as in `sample_tokens`.
        """
        how = {"strength": strength, "keep": keep}
        stream = functools.partial(self.stream_revisions, drafts, num_samples, **how)
        return [text for state in last_states(stream, on_step, **options) for text in state.texts]

    @shows_options
    def stream_revisions(
        self,
        drafts: str | Sequence[str],
        num_samples: int = 1,
        *,
        strength: float = revision.STRENGTH,
        keep: str | Sequence[str | int] = (),
        updates: int = 32,
        **options: Unpack[CallOptions],
    ) -> Iterator[State]:
        """As `stream`, from drafts: each is noised to the time `strength` and sampled from there.

        strength 0 returns the drafts and costs nothing; 1 gives the samples of their lengths that
        `sample_tokens` draws. Between them a draft is noised by the forward process to t, the last
        time of the grid that is at least strength, and the reverse steps from t on are taken. On
        the uniform grid those are ceil(strength * steps) steps, with a network call each (two of
        some predictors), and the denoiser, one more. The first state is the noised draft.

        keep: texts, all of whose occurrences stay in every draft, and positions of tokens. Drafts
        may differ in length, `state.lengths`.
        """
        call = self._call(num_samples, updates, options)
        start = revision.start_of(strength, call.sampling, self.times_of(call.sampling))
        texts = revision.drafts(drafts, keep, num_samples, self.tokenizer, self.length)
        texts = texts._replace(begin=start.step, time=start.time)
        return states_of(self, texts, updates, call)

    @shows_options
    def chosen(self, **options: Unpack[SamplingOptions]) -> Sampling:
        """How samples are drawn with these options.

        t_min of the grid "fitted" is the last of its times. ValueError for options that cannot be
        meant, and for that grid without a curve: `bound(blocks).curve` is one.
        """
        sampling = sampler_of(self).chosen(**options)
        times = self.times_of(sampling)
        return sampling if times is None else dataclasses.replace(sampling, t_min=float(times[-1]))

    def times_of(self, sampling: Sampling) -> np.ndarray | None:
        """The times of the grid "fitted"; None with another, or where nothing steps over it."""
        if sampling.grid != FITTED or sampling.predictor == "none":
            return None
        curve = checked_curve(self.curve, self.graph, self.objective, self.workdir, self.step)
        return fitted_times(curve, sampling.steps, self.schedule)

    def _call(self, num_samples: int, updates: int, options: Mapping[str, Any]) -> Call:
        check_whole("num_samples", num_samples, 1)
        check_whole("updates", updates, 1)
        return Call.of(self.chosen, options)

    def _parse(self, template: str, length: int | None) -> KnownTokens:
        if length is not None:
            raise ValueError("a template says its own tokens and length; leave both out")
        return data.parse_template(template, self.tokenizer, self.length)

    # --- likelihood

    def log_likelihood(
        self,
        texts: batches.Text | Sequence[batches.Text],
        *,
        given: batches.Text | Sequence[batches.Text] | None = None,
        index: Sequence[int] | None = None,
        passes: int = 16,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Bound:
        """An upper bound on -log p of each text or its tokens, nats: a Bound of float32 [N] arrays.

        `.total` is the bound, `.standard_error` its error from the noise drawn and `.by_token` what
        each token has of it, 0 at what is given. SEDD's takes passes, even, and 2 more network
        calls a text. Nothing is added to a text, before or after. A text's times and noise depend
        on the seed and its number alone, or the number in index: texts of one number have the same
        times, and are masked at the same positions.

        given: what comes before the texts, one for all or one for each; then the bound is on
        -log p(text | given), and given stays clean. Both are encoded by themselves. With uniform
        noise, whose scores are not told which tokens are clean, it is looser.
        """
        bounds.check_noise(passes, batch_size, seed)
        if given is not None and self.objective.is_continuous:
            raise ValueError("a PLAID model bounds whole texts alone; leave given out")
        rows = batches.texts_after(given, texts, self.tokenizer, self.length)
        index = batches.check_index(index, len(rows.tokens))
        key = make_key(seed)
        return bounds.text_bounds(
            lambda batch: self.bound_fn(self.params, key, *self.put(batch), passes=passes),
            batches.by_bucket(rows, index, batch_size, self.length, self.mesh),
        )

    def log_likelihood_ratio(
        self,
        a: batches.Text | Sequence[batches.Text],
        b: batches.Text | Sequence[batches.Text],
        *,
        given: batches.Text | Sequence[batches.Text] | None = None,
        passes: int = 16,
        batch_size: int = 16,
        seed: int = 0,
    ) -> bounds.LogRatio:
        """log p(a) / p(b) for each pair of texts, nats, estimated from the bounds of both.

        Both are noised at the same times and masked at the same positions, so the noise of what
        they share cancels in the difference; most of it where they differ in a word of as many
        tokens. given, passes, batch_size and seed as in `log_likelihood`.
        """
        a, b = batches.listed(a), batches.listed(b)
        if len(a) != len(b):
            raise ValueError(f"{len(a)} texts are compared with {len(b)}; give as many of both")
        given = given if given is None else batches.prompts_of(given, len(a)) * 2
        how = {"passes": passes, "batch_size": batch_size, "seed": seed}
        both = self.log_likelihood(a + b, given=given, index=[*range(len(a))] * 2, **how)
        return bounds.LogRatio.of_halves(both)

    def bound(
        self,
        blocks: np.ndarray | data.Blocks,
        *,
        passes: int = 16,
        batch_size: int = 32,
        seed: int = 0,
        target_standard_error: float | None = None,
        max_passes: int = 1024,
        by_token: bool = False,
        progress: bool = False,
    ) -> bounds.CorpusBound:
        """Upper bound on -log p of int32 [N, L] together, nats: passes + 2 network calls a block.

        passes is even; a call takes batch_size blocks. Times and noise depend on seed and a
        block's number alone. With target_standard_error, nats per token, the blocks are bounded
        round after round, each with new noise, until the mean's error is that small or the next
        round would take more than max_passes. by_token keeps the bound of each token, [N, L].
        """
        bounds.check_noise(passes, batch_size, seed)
        blocks = blocks if isinstance(blocks, data.Blocks) else data.Blocks(blocks)
        blocks = jax.tree.map(np.asarray, blocks)
        batches.check_blocks(blocks, self.graph.vocab_size, self.length)
        how = {"passes": passes, "batch_size": batch_size, "by_token": by_token}
        how |= {"t_min": self.objective.t_min, "mesh": self.mesh, "progress": progress}

        def one_round(r: int) -> bounds.CorpusBound:
            key = jax.random.fold_in(make_key(seed), r)
            return bounds.corpus_bound(self.bound_fn, self.params, key, blocks, **how)

        max_rounds = max(1, max_passes // passes)
        return bounds.bound_until(one_round, target_standard_error, max_rounds, blocks.count)

    @property
    def bound_fn(self) -> bounds.BoundFn:
        """(params, key, Blocks, index, *, passes) -> Bound, jitted, for `bounds.corpus_bound`."""
        return bounds.make_bound_fn(self.network, self.graph, self.schedule, self.objective)

    # --- saving

    def save_pretrained(
        self, folder: str | Path, *, name: str | None = None, replace: bool = False
    ) -> None:
        """Write the folder that `load` and the original's `SEDD.from_pretrained` read.

        config.json, model.safetensors with the original's names, sedd_jax.json (the tokenizer and
        the whole config) and README.md, a model card, in which the model is called `name`, the
        folder's by default. ValueError if anything is in folder; with replace, if that is more
        than an earlier export. Of several processes that share the model all call it, and process 0
        writes.
        """
        model = convert.Pretrained(
            config=self.experiment,
            vocab_size=self.graph.vocab_size,
            params=processes.fetch(self.params),
            tokenizer=self.tokenizer,
            step=self.step,
            original=self.original,
            about=dict(self.about),
            curve=None if self.curve is None else self.curve.to_dict(),
        )
        folder = local_path(folder)
        how = {"name": name, "replace": replace}
        processes.once(self.mesh, lambda: convert.write_folder(folder, model, **how))

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
            how = {"private": private, "token": token, "message": message}
            return processes.once(self.mesh, lambda: hub.push(folder, name, **how))

    def decode(self, tokens: jax.Array | np.ndarray) -> list[str]:
        """A text for each row of int32 [B, L]; masked positions show as ░."""
        return [self.tokenizer.decode(row) for row in np.asarray(tokens)]

    def put(self, batch: Any) -> Any:
        """A tree of numpy arrays where the weights are."""
        return sharding.put_beside(self.params, batch, self.mesh)
