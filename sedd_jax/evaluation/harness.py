"""The models of this package for lm-evaluation-harness, which has the tasks and the metrics.

    import lm_eval
    from sedd_jax.evaluation.harness import SeddLM
    lm_eval.simple_evaluate(model=SeddLM(workdir="runs/mine"), tasks=["hellaswag"])

It needs lm_eval, pip install "sedd_jax[eval]", and only `sedd-eval harness` imports it.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sedd_jax.diffusion.samplers import Known
from sedd_jax.evaluation.choices import AT_ONCE, Pair, check_scorable, encoded_pair, pair_bounds
from sedd_jax.host.console import progress_bar
from sedd_jax.inference.batches import Texts
from sedd_jax.inference.bounds import check_noise
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.options import Call
from sedd_jax.inference.pretrained import load
from sedd_jax.inference.states import states_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
try:
    from lm_eval.api.model import LM
except ImportError as error:  # what SeddLM then says when it is made
    LM, MISSING = object, error
else:
    MISSING = None

NAME = "sedd"  # of the model in the harness's command line
MAX_GENERATED = 256  # tokens, where a task names no number; the harness's own default


class Job(NamedTuple):
    """A text that is to be written."""

    tokens: np.ndarray  # int [n], the context's
    free: int  # positions after it
    options: dict[str, Any]  # of sampling
    until: Sequence[str]  # strings that end it


class SeddLM(LM):
    """A model as the harness asks it: log p(text | context), log p(text) and texts.

    Of a diffusion model a log-likelihood is minus the upper bound on -log p, a lower bound on log p
    estimated with `passes` noise levels; of an autoregressive model it is exact. sampling are
    options of `SEDD.sample_tokens`, as steps. The harness calls it in one process.
    """

    def __init__(
        self,
        model: SEDD | None = None,
        *,
        workdir: str | None = None,
        step: int | None = None,
        dtype: str | None = None,
        tokenizer: str | None = None,
        imports: str = "",
        passes: int = 16,
        batch_size: int | str | None = None,
        seed: int = 0,
        max_batch_size: Any = None,
        device: Any = None,
        **sampling: Any,
    ):
        """A model, or what `sedd_jax.load` takes as workdir; batch_size "auto" or None is 16.
        imports is one module or file; sampling are options of `SEDD.sample`.

        max_batch_size and device, PyTorch's, are not read: the harness gives its own to any model.
        """
        if MISSING is not None:
            raise ValueError(f'SeddLM needs lm_eval ({MISSING}); pip install "sedd_jax[eval]"')
        super().__init__()
        if (model is None) == (workdir is None):
            raise ValueError("give a model, or workdir, in a command --model_args workdir=DIR")
        is_auto = batch_size is None or str(batch_size).startswith("auto")  # auto:4 too
        self.batch_size = 16 if is_auto else int(batch_size)
        check_noise(passes, self.batch_size, seed)
        if model is None:
            how = {"step": step, "dtype": dtype, "tokenizer": tokenizer}
            model = load(workdir, **how, imports=imports or ())
        self.model = model
        check_scorable(self.model)
        try:
            self.model.chosen(**sampling)
        except TypeError as error:  # of a command line's --model_args too, which has no keywords
            raise ValueError(str(error)) from error
        self.passes, self.seed, self.sampling = passes, seed, sampling

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        model = self.model
        return {
            "model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
            "model_dtype": model.dtype,
            "model_objective": model.objective.title,
            "model_step": model.step,
            "likelihood": "exact" if model.objective.is_causal else f"bound, {self.passes} passes",
        }

    # --- what the harness calls

    def loglikelihood(
        self, requests: list["Instance"], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether the model's greedy text is the continuation) of
        each request.

        The latter is computed where the task reads it: for documents with one request. Those of
        several choices get False.
        """
        pairs = [self._pair(request) for request in requests]
        different = {id(request): request for request in requests}.values()  # some are repeated
        count = Counter(_document(request) for request in different)
        results: list[tuple[float, bool]] = []
        for part in self._parts(len(pairs), "loglikelihood", disable_tqdm):
            # The choices of a document share their noise.
            nats = self._nats(pairs[part], [request.doc_id for request in requests[part]])
            alone = [i for i, r in enumerate(requests[part]) if count[_document(r)] == 1]
            is_greedy = np.zeros(len(nats), bool)
            is_greedy[alone] = self._is_greedy([pairs[part][i] for i in alone])
            for request, *one in zip(requests[part], -nats, is_greedy, strict=True):
                results.append((float(one[0]), bool(one[1])))
                self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(
        self, requests: list["Instance"], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each whole text, as the sum over `windows`."""
        parts = [windows(self.model, request.args[0]) for request in requests]
        pairs = [pair for part in parts for pair in part]
        nats: list[float] = []
        for batch in self._parts(len(pairs), "loglikelihood_rolling", disable_tqdm):
            nats.extend(self._nats(pairs[batch], range(len(pairs))[batch]))
        totals, left = [], iter(nats)
        for request, part in zip(requests, parts, strict=True):
            totals.append(-float(sum(itertools.islice(left, len(part)))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """A text after each context, drawn at once in max_gen_toks free positions, and cut before
        the first stop string. Without do_sample only the likeliest tokens are drawn."""
        jobs = [self._job(*request.args) for request in requests]
        texts: list[str] = [""] * len(jobs)
        # Of one length after the other, so that a batch has little padding.
        left = sorted(range(len(jobs)), key=lambda i: len(jobs[i].tokens) + jobs[i].free)
        with progress_bar(
            total=len(jobs), desc="generate_until", unit="text", is_shown=not disable_tqdm
        ) as bar:
            while left:
                same = [i for i in left if jobs[i].options == jobs[left[0]].options]
                left = [i for i in left if jobs[i].options != jobs[same[0]].options]
                drawn = self._drawn([jobs[i] for i in same], jobs[same[0]].options)
                for i, tokens in zip(same, drawn, strict=True):
                    texts[i] = _cut(self.model.tokenizer.decode(tokens), jobs[i].until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(1)
        return texts

    # --- parts of them

    def _pair(self, request: "Instance") -> Pair:
        try:
            return encoded_pair(self.model, *request.args)
        except ValueError as error:
            where = f"document {request.doc_id} of {request.task_name}"
            raise ValueError(f"{where}: {error}; leave it out with samples or limit") from error

    def _parts(self, count: int, name: str, disable_tqdm: bool) -> Iterator[slice]:
        size = AT_ONCE * self.batch_size
        with progress_bar(total=count, desc=name, unit="text", is_shown=not disable_tqdm) as bar:
            for start in range(0, count, size):
                yield slice(start, start + size)
                bar.update(min(size, count - start))

    def _nats(self, pairs: Sequence[Pair], index: Sequence[int]) -> np.ndarray:
        how = {"passes": self.passes, "batch_size": self.batch_size, "seed": self.seed}
        return np.float64(pair_bounds(self.model, pairs, index, **how).total)

    def _is_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether the likeliest tokens after each prompt are the text's."""
        if not pairs:
            return []
        jobs = [Job(pair.prompt, len(pair.text), {}, ()) for pair in pairs]
        drawn = self._drawn(jobs, {"top_k": 1})
        return [np.array_equal(a, pair.text) for a, pair in zip(drawn, pairs, strict=True)]

    def _job(self, context: str, arguments: dict[str, Any]) -> Job:
        from lm_eval.models.utils import normalize_gen_kwargs

        chosen = dict(normalize_gen_kwargs(arguments, MAX_GENERATED))
        until, count = chosen.pop("until"), int(chosen.pop("max_gen_toks"))
        length = self.model.length
        if count >= length:  # a context must fit too
            count = -(-length // 2)
        options = {"top_k": 1}
        if chosen.pop("do_sample", False):
            options = {name: chosen.get(name) for name in ("temperature", "top_p", "top_k")}
            options["top_k"] = options["top_k"] or None  # 0: no limit
        tokens = self.model.tokenizer.encode(context)
        return Job(tokens[max(0, len(tokens) + count - length) :], count, options, until)

    def _drawn(self, jobs: Sequence[Job], options: dict[str, Any]) -> Iterator[np.ndarray]:
        """The tokens drawn in the free positions of each job, batch by batch."""
        lengths = np.array([len(job.tokens) + job.free for job in jobs])
        shape = len(jobs), int(lengths.max())
        known = Known(np.zeros(shape, np.int32), np.zeros(shape, bool))
        for i, job in enumerate(jobs):
            known.tokens[i, : len(job.tokens)] = job.tokens
            known.is_known[i, : len(job.tokens)] = True
        texts = Texts(known, lengths)
        sampling = self.model.chosen(**{**self.sampling, **options})
        call = Call(sampling, seed=self.seed, batch_size=self.batch_size)
        states = states_of(self.model, texts, 1, call)
        rows = (row for state in states if state.step == state.steps for row in state.tokens)
        for job, row in zip(jobs, rows, strict=True):
            yield row[len(job.tokens) : len(job.tokens) + job.free]


def windows(model: SEDD, text: str) -> list[Pair]:
    """A text of any length in parts that the model can score, each token in one of them.

    As the harness cuts texts: the first part follows a document's end, the separator; the others
    follow the one token before them, but the last, which follows as many as fit.
    """
    before = np.array(model.tokenizer.separator, np.int32)
    tokens = np.concatenate([before, model.tokenizer.encode(text)])
    start, pairs = len(before), []
    while start < len(tokens):
        stop = min(start + model.length - min(start, 1), len(tokens))
        pairs.append(Pair(tokens[max(0, stop - model.length) : start], tokens[start:stop]))
        start = stop
    return pairs


def _document(request: "Instance") -> tuple:
    return request.task_name, request.doc_id


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def run_command(argv: Sequence[str]) -> None:
    """The harness's own command line, `lm-eval run`, whose model is "sedd"."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model(NAME)(SeddLM)
    before, sys.argv = sys.argv, ["lm-eval", "run", "--model", NAME, *argv]  # what it reads
    try:
        cli_evaluate()
    finally:
        sys.argv = before
