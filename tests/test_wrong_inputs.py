"""Wrong inputs of every kind, through the installed commands: one line that helps, nothing written.

Each row of CASES is a command line, what the line on standard error must show of the value, and
the words of its remedy. {name} is something in the folder of `inputs`; every command runs in an
empty folder, which must be empty afterwards, and `inputs` must be as it was.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
from conftest import REPOSITORY

TINY = (
    "--config.data.tokenizer=characters --config.data.tokenizer_path= "
    "--config.data.length=16 --config.model.hidden_size=16 --config.model.blocks=1 "
    "--config.model.heads=2 --config.model.cond_dim=8 --config.train.steps=1 "
    "--config.train.batch_size=4"
)
TRAIN = f"train --config=quickstart --workdir=run {TINY}"
TEXT = f"{TRAIN} --config.data.corpus=text --config.data.path="
PREPARE = "prepare --dataset=text --tokenizer=bytes --length=16 --out=records --manual_dir="
LONG = "x" * 300
TOO_LONG = ("...' is too long for a path", "give a shorter one")
COMPARE = f"compare --config=quickstart {TINY} --out="
TOKENS = "prepare --dataset=text --manual_dir={text} --length=16 --out=records"


class Case(NamedTuple):
    line: str  # the command without "sedd-", and its arguments
    value: str  # in the message
    remedy: str  # in the message
    env: Mapping[str, str] = MappingProxyType({})


CASES = [
    # --- the command line itself
    Case("train", "--config", "for example sedd-train"),
    Case("train --config=quickstart", "--workdir", "for example"),
    Case("train --config=nope --workdir=run", "'nope'", "quickstart"),
    Case("train --config=quickstart:v9 --workdir=run", "'v9'", "quickstart"),
    Case("train --config=openwebtext_small:v9 --workdir=run", "'v9'", "v5e-64"),
    Case("train --config={broken}/a_name.py --workdir=run", "a_name.py", "STEPS"),
    Case("train --config={broken}/a_syntax.py --workdir=run", "a_syntax.py", "line 2"),
    Case("train --config={broken}/an_import.py --workdir=run", "an_import.py", "no_such_package"),
    Case("train --config={broken}/no_function.py --workdir=run", "no_function.py", "get_config"),
    Case("train --config={broken}/a_type.py --workdir=run", "a_type.py", "ConfigDict"),
    Case("train --config={broken}/an_argument.py:x --workdir=run", "an_argument.py", "argument"),
    Case("train --config={broken}/an_exit.py --workdir=run", "an_exit.py", "line"),
    Case("train --config={broken} --workdir=run", "{broken}", "path"),
    Case("train --config={broken}/a_name.py:x --workdir=run", "a_name.py", "no argument"),
    Case("train --config= --workdir=run", "--config", "example"),
    Case(f"{TRAIN} --cofnig.seed=1", "cofnig", "--"),
    Case(f"{TRAIN} --config.train.stepz=1", "train.stepz", "train.steps"),
    Case(f"{TRAIN} --config.train.steps=many", "many", "train.steps"),
    Case(f"{TRAIN} --config.train.steps=1e6x", "1e6x", "train.steps"),
    Case(f"{TRAIN} --config.train.steps=0", "0", ">= 1"),
    Case(f"{TRAIN} --config.train.steps=2.5", "2.5", "train.steps"),
    Case(f"{TRAIN} --config.train.steps=", "train.steps", "whole number"),
    Case(f"{TRAIN} --config.optimizer.learning_rate=-1", "-1", "learning_rate"),
    Case(f"{TRAIN} --config.optimizer.learning_rate=nan", "nan", "learning_rate"),
    Case(f"{TRAIN} --config.optimizer.learning_rate=3e-4x", "3e-4x", "learning_rate"),
    Case(f"{TRAIN} --config.optimizer.b1=1", "1", "b1"),
    Case(f"{TRAIN} --config.optimizer.decay_fraction=2", "2", "[0, 1]"),
    Case(f"{TRAIN} --config.data.path={{text}}", "{text}", "the corpus 'text'"),
    Case(f"{TRAIN} --config.optimizer.mu_dtype=float16", "float16", "bfloat16"),
    Case(f"{TRAIN} --config.model.heads=3", "3", "heads"),
    Case(f"{TRAIN} --config.model.dtype=float64", "float64", "bfloat16"),
    Case(f"{TRAIN} --config.model.dropout=1.5", "1.5", "dropout"),
    Case(f"{TRAIN} --config.model.remat=all", "all", "blocks"),
    Case(f"{TRAIN} --config.model.attention=flash", "flash", "cudnn"),
    Case(f"{TRAIN} --config.graph.name=absorb", "absorb", "absorbing"),
    Case(f"{TRAIN} --config.graph.scale_by_sigma=maybe", "maybe", "scale_by_sigma"),
    Case(f"{TRAIN} --config.schedule.name=linear", "linear", "log_linear"),
    Case(f"{TRAIN} --config.schedule.eps=2", "2", "eps"),
    Case(f"{TRAIN} --config.objective.name=elbo", "elbo", "dwdse"),
    Case(f"{TRAIN} --config.objective.t_min=0", "0", "t_min"),
    Case(f"{TRAIN} --config.objective.times=grid", "grid", "stratified"),
    Case(f"{TRAIN} --config.sample.predictor=ddim", "ddim", "tweedie"),
    Case(f"{TRAIN} --config.sample.grid=karras", "karras", "cosine"),
    Case(f"{TRAIN} --config.data.form=ragged", "ragged", "packed"),
    Case(f"{TRAIN} --config.data.windows=any", "any", "random"),
    Case(f"{TRAIN} --config.data.windows=random --config.data.form=padded", "random", "aligned"),
    Case(f"{TRAIN} --config.data.corpus=wikitext", "wikitext", "wikitext103"),
    Case(f"{TRAIN} --config.data.tokenizer=tiktoken", "tiktoken", "gpt2"),
    Case(f"{TRAIN} --config.data.heldout_fraction=1", "1", "heldout_fraction"),
    Case(f"{TRAIN} --config.train.microbatches=3", "3", "batch_size"),
    Case(f"{TRAIN} --config.mesh.fsdp=3", "3", "fsdp"),
    Case(f"{TRAIN} --config.mesh.tensor=5", "5", "tensor"),
    Case(f"{TRAIN} --config.checkpoint.keep=0", "0", "keep"),
    Case(f"{TRAIN} --config.evaluate.passes=3", "3", "even"),
    Case(f"{TRAIN} --config.seed=-1", "-1", "seed"),
    Case(f"{TRAIN} --dry_run", "--dry_run", "--target=v5e:4x4"),
    Case("train --config=quickstart --dry_run --target=v9:4", "v9", "v5e"),
    Case("train --config=quickstart --dry_run --target=v5e:4x", "v5e:4x", "4x4"),
    Case("train --config=quickstart --dry_run --target=a100:0", "a100:0", "a100"),
    Case(f"{TRAIN} --requeue_status=300", "300", "255"),
    Case(f"{TRAIN} --join_timeout=0", "0", "seconds"),
    Case(f"{TRAIN} --coordinator=here", "'here'", "process_count"),
    Case(f"{TRAIN} --coordinator=here --process_count=2 --process_index=0", "'here'", "HOST:PORT"),
    Case(f"{TRAIN} --coordinator=a:1 --process_count=2 --process_index=2", "2", "number"),
    Case(f"{TRAIN} --process_count=2", "2", "process_index"),
    Case(f"{TRAIN} --process_count=two", "two", "process_count"),
    Case(f"{TRAIN} extra", "'extra'", "--config.key=value"),
    Case("prepare", "--dataset", "--help"),
    Case("prepare --dataset=text --out=records --nonsense=1", "--nonsense", "--help"),
    Case("prepare --dataset=bookcorpus --out=records", "'bookcorpus'", "wikitext2"),
    Case(TOKENS + " --tokenizer=words", "'words'", "bytes"),
    Case(TOKENS + " --tokenizer=bytes --form=loose", "'loose'", "packed"),
    Case(TOKENS + " --tokenizer=bytes --workers=0", "0", "workers"),
    Case(TOKENS + " --tokenizer=bytes --length=0", "0", "length"),
    Case(TOKENS + " --tokenizer=bytes --length=long", "long", "--help"),
    Case(TOKENS + " --tokenizer=bytes --heldout_fraction=2", "2", "heldout_fraction"),
    Case(TOKENS + " --tokenizer=bytes --detokenizer=moses", "'moses'", "none"),
    Case(TOKENS + " --tokenizer=bytes --documents=words", "'words'", "leave it out"),
    Case("sample", "--workdir", "--model"),
    Case("sample --workdir={run} --model={hub}", "--model", "--workdir"),
    Case("sample --workdir={run} --steps=0", "0", "steps"),
    Case("sample --workdir={run} --steps=few", "few", "--help"),
    Case("sample --workdir={run} --num_samples=0", "0", "num_samples"),
    Case("sample --workdir={run} --batch_size=0", "0", "batch_size"),
    Case("sample --workdir={run} --length=0", "0", "length"),
    Case("sample --workdir={run} --length=9999", "9999", "length"),
    Case("sample --workdir={run} --predictor=ddim", "'ddim'", "tweedie"),
    Case("sample --workdir={run} --draw=fast", "'fast'", "exact"),
    Case("sample --workdir={run} --grid=log", "'log'", "cosine"),
    Case("sample --workdir={run} --format=xml", "'xml'", "jsonl"),
    Case("sample --workdir={run} --seed=-1", "-1", "seed"),
    Case("sample --workdir={run} --template=abc", "'abc'", "[MASK"),
    Case("sample --workdir={run} --template=a[MASK:0]", "[MASK:0]", "1"),
    Case("sample --workdir={run} --template=a[mask:3]", "[mask:3]", "[MASK:3]"),
    Case("sample --workdir={run} --template=a[MASK][Mask]", "[Mask]", "[MASK:3]"),
    Case("sample --workdir={run} --template=a[MASKED]", "[MASKED]", "[MASK"),
    Case("sample --workdir={run} --template=a[MASK:999]", "999", "length"),
    Case("sample --workdir={run} --prefix=a --template=b[MASK]", "--template", "--prefix"),
    Case("sample --workdir={run} --revise=none.txt", "none.txt", "draft"),
    Case("sample --workdir={run} --revise={text}", "{text}", "draft"),
    Case("sample --workdir={run} --revise={text}/a.txt --template=a[MASK]", "--revise", "draft"),
    Case("sample --workdir={run} --revise={text}/a.txt --prefix=a", "--prefix", "draft"),
    Case("sample --workdir={run} --revise={text}/a.txt --suffix=a", "--suffix", "draft"),
    Case("sample --workdir={run} --revise={text}/a.txt --length=9", "--length", "draft"),
    Case("sample --workdir={run} --revise={corpora}/blank/b.txt", "blank/b.txt", "write text"),
    Case("sample --workdir={run} --revise={drafts}/long.txt", "draft 0 has 100 tokens", "in parts"),
    Case("sample --workdir={run} --revise={drafts}/two.jsonl", "draft 1 of", "write text"),
    Case("sample --workdir={run} --revise={drafts}/short.txt --keep=zzz", "'zzz'", "copy"),
    Case("sample --workdir={run} --revise={text}/a.txt --strength=2", "2.0", "[0, 1]"),
    Case("sample --workdir={run} --revise={text}/a.txt --strength=half", "half", "--help"),
    Case("sample --workdir={run} --strength=0.5", "--strength", "--revise"),
    Case("sample --workdir={run} --keep=a", "--keep", "--revise"),
    Case("sample --workdir={run} --out={text}/a.txt", "a.txt", "new"),
    Case("sample --workdir={run} --out=none/a.txt", "none/a.txt", "folder"),
    Case("sample --workdir={run} --html=none/a.html", "none/a.html", "folder"),
    Case("eval", "''", "likelihood"),
    Case("eval fid --workdir={run}", "'fid'", "mauve"),
    Case("eval likelihood", "--workdir", "--gpt2"),
    Case("eval likelihood --workdir={hub}", "hub_absorbing", "--records"),
    Case("eval likelihood --workdir={run} --split=dev", "'dev'", "validation"),
    Case(
        "eval likelihood --workdir={hub} --records={text}", "{text}", "name the folder of records"
    ),
    Case("eval likelihood --workdir={run} --passes=3", "3", "even"),
    Case("eval likelihood --workdir={run} --blocks=0", "0", "1 or more"),
    Case("eval likelihood --workdir={run} --batch_size=0", "0", "batch_size"),
    Case("eval likelihood --workdir={run} --seed=-1", "-1", "seed"),
    Case("eval likelihood --workdir={run} --target_standard_error=0", "0", "standard_error"),
    Case("eval likelihood --workdir={run} --json=none/a.json", "none/a.json", "folder"),
    Case("eval likelihood --gpt2={hub}", "--gpt2", "--records"),
    Case("eval likelihood --gpt2={hub} --records={records}", "hub_absorbing", "GPT-2"),
    Case("eval generative_perplexity --workdir={run} --scorer=gpt5", "'gpt5'", "gpt2-large"),
    Case("eval generative_perplexity --workdir={run} --scorer={hub}", "hub_absorbing", "GPT-2"),
    Case(
        "eval generative_perplexity --workdir={run} --scorer=gpt2 --scorer_dtype=int8",
        "'int8'",
        "bfloat16",
    ),
    Case("eval generative_perplexity --workdir={run} --scorer=gpt2 --length=1", "1", "length"),
    Case("eval frontier --workdir={run} --scorer=gpt2 --steps=4,x", "4,x", "--help"),
    Case("report", "--workdir", "--help"),
    Case("report --workdir={hub}", "hub_absorbing", "run"),
    Case("report --workdir={run} --passes=3", "3", "even"),
    Case("report --workdir={run} --template=none", "'none'", "[MASK"),
    Case("convert --from={hub}", "--to", "--help"),
    Case("convert --from={hub} --to=out --form=onnx", "'onnx'", "original"),
    Case("convert --from={run} --to=out --weights=best", "'best'", "ema"),
    Case("convert --from={text} --to=out", "{text}", "give"),
    Case("convert --from={hub} --to={text}", "{text}", "new folder"),
    Case("convert --from={hub} --to=out --form=workdir --config.no.key=1", "no.key", "known"),
    # --- paths
    Case("train --config=quickstart --workdir=gs://bucket/run", "gs://bucket/run", "mount"),
    Case(f"train --config=quickstart {TINY} --workdir={{text}}", "{text}", "new folder"),
    Case(f"train --config=quickstart {TINY} --workdir={{text}}/a.txt", "a.txt", "new folder"),
    Case("train --workdir=nowhere", "--config", "example"),
    Case(f"{TRAIN} --config.data.records=s3://b/records", "s3://b/records", "mount"),
    Case(f"{TEXT}gs://bucket/text", "gs://bucket/text", "mount"),
    Case(f"{TEXT}nowhere", "nowhere", "folder"),
    Case(f"{TEXT}{{empty}}", "{empty}", ".txt"),
    Case(f"{PREPARE}hdfs://host/text", "hdfs://host/text", "mount"),
    Case(
        "prepare --dataset=text --manual_dir={text} --tokenizer=bytes --out=gs://b/r",
        "gs://b/r",
        "mount",
    ),
    Case("sample --workdir=gs://bucket/run", "gs://bucket/run", "mount"),
    Case("sample --workdir={run} --out=s3://b/out.txt", "s3://b/out.txt", "mount"),
    Case("sample --workdir=nowhere", "'nowhere'", "give"),
    Case("sample --model=nowhere", "'nowhere'", "hub"),
    Case("eval likelihood --workdir=gs://b/run", "gs://b/run", "mount"),
    Case("eval likelihood --workdir={run} --json=gs://b/x.json", "gs://b/x.json", "mount"),
    Case("eval likelihood --workdir={run} --records=gs://b/r", "gs://b/r", "mount"),
    Case("report --workdir=s3://b/run", "s3://b/run", "mount"),
    Case("convert --from=gs://b/run --to=out", "gs://b/run", "mount"),
    Case("convert --from={hub} --to=gs://b/out", "gs://b/out", "mount"),
    Case("train --config=gs://b/config.py --workdir=run", "gs://b/config.py", "mount"),
    Case(f"{TRAIN} --config.data.tokenizer_path=gs://b/tk", "gs://b/tk", "mount"),
    Case("train --config quickstart --workdir gs://b/run", "gs://b/run", "mount"),
    Case("train --workdir=abfs://c@account/run", "abfs://c@account/run", "mount"),
    Case("prepare --dataset=wikitext2 --data_dir=gs://b/d --out=records", "gs://b/d", "mount"),
    Case(f"{TOKENS} --tokenizer=gs://b/tokenizer.json", "gs://b/tokenizer.json", "mount"),
    Case(f"{TOKENS} --tokenizer=gpt2 --tokenizer_path=s3://b/tk", "s3://b/tk", "mount"),
    Case("sample --model=gs://bucket/model", "gs://bucket/model", "mount"),
    Case("sample --workdir={run} --html=gs://b/a.html", "gs://b/a.html", "mount"),
    Case("eval likelihood --gpt2=gs://b/gpt2 --records={records}", "gs://b/gpt2", "mount"),
    Case("eval frontier --workdir={run} --scorer=s3://b/gpt2", "s3://b/gpt2", "mount"),
    Case("eval frontier --workdir={run} --picture=s3://b/a.png", "s3://b/a.png", "mount"),
    Case(
        "convert --from={hub} --to=out --form=workdir --config.data.records gs://b/r",
        "gs://b/r",
        "mount",
    ),
    Case("convert --from={hub} --to=out --tokenizer=gpt2:gs://b/tk", "gs://b/tk", "mount"),
    Case("convert --from={hub} --to=~nobody-of-this-name/out", "~nobody", "path"),
    Case("convert --from={run} --to={hub}", "{hub}", "--replace"),
    Case("sample --workdir={run} --step=7", "7", "steps there: 8"),
    Case("sample --model={hub} --step=8", "8", "leave"),
    Case("eval likelihood --workdir={run} --step=-1", "-1", "steps there: 8"),
    Case("eval frontier --workdir={run} --step=seven", "seven", "--help"),
    Case("sample --workdir=~nobody-of-this-name/run", "~nobody", "path"),
    Case("sample --workdir=", "''", "path"),
    # --- corpora
    Case(f"{PREPARE}{{corpora}}/none", "none", "folder"),
    Case(f"{PREPARE}{{empty}}", "{empty}", ".txt"),
    Case(f"{PREPARE}{{corpora}}/blank", "blank", "text"),
    Case(f"{PREPARE}{{corpora}}/latin1", "a.txt", "UTF-8"),
    Case(f"{PREPARE}{{corpora}}/utf16", "a.txt", "UTF-8"),
    Case(f"{PREPARE}{{corpora}}/pdf", "a.pdf", ".txt"),
    Case(f"{PREPARE}{{corpora}}/broken_json", "a.jsonl:2", "not JSON; give"),
    Case(f"{PREPARE}{{corpora}}/no_text", "a.jsonl", '"text"'),
    Case(f"{PREPARE}{{corpora}}/two_splits", "valid", "train"),
    Case(f"{PREPARE}{{corpora}}/broken_gz", "a.txt.gz", "again"),
    Case(f"{PREPARE}{{corpora}}/pipe", "a.txt", "file"),
    Case(f"{PREPARE}{{corpora}}/zip", "a.zip", "unpack"),
    Case(f"{PREPARE}{{corpora}}/strays", "more.txt", "folders train"),
    Case(f"{PREPARE}{{corpora}}/one_column", "a.csv", 'column "text"'),
    Case(f"{PREPARE}{{corpora}}/pipe/a.txt", "a.txt", "file"),
    Case(f"{PREPARE}/dev/null", "/dev/null", "as a file"),
    Case(f"{PREPARE}{{corpora}}/splits --heldout_fraction=1", "train, validation", "leave"),
    Case(f"{TEXT}{{corpora}}/train_and_test", "'validation'", "heldout_split"),
    Case(
        "prepare --dataset=tfds:lm1b --data_dir={empty} --tokenizer=bytes --out=records",
        "lm1b",
        "tfds build",
    ),
    Case("prepare --dataset=tfds: --out=records", "'tfds:'", "NAME"),
    Case(f"{TRAIN} --config.data.corpus=tfds:", "tfds:", "NAME"),
    Case(f"{TRAIN} --config.data.corpus=tfds:nope --config.data.path={{empty}}", "nope", "build"),
    Case("prepare --dataset=text --tokenizer=bytes --out=records", "--manual_dir", "text"),
    Case(
        "prepare --dataset=ptb --manual_dir={empty} --tokenizer=bytes --out=records",
        "{empty}",
        "ptb",
    ),
    Case(
        "prepare --dataset=text --manual_dir={text} --tokenizer=bytes --length=16 --out={text}",
        "{text}",
        "another",
    ),
    Case(
        "prepare --dataset=text --manual_dir={text} --tokenizer=bytes --length=99 --out={records}",
        "99",
        "another",
    ),
    # --- tokenizers
    Case(f"{TOKENS} --tokenizer=gpt2 --tokenizer_path=nowhere", "nowhere", "tokenizer.json"),
    Case(f"{TOKENS} --tokenizer=gpt2 --tokenizer_path={{empty}}", "{empty}", "tokenizer.json"),
    Case(f"{TOKENS} --tokenizer=gpt2 --tokenizer_path={{tk}}/broken.json", "broken.json", "again"),
    Case(f"{TOKENS} --tokenizer=gpt2 --tokenizer_path={{tk}}/lfs.json", "lfs.json", "git lfs pull"),
    Case(f"{TOKENS} --tokenizer=sentencepiece", "sentencepiece", "train:"),
    Case(
        f"{TOKENS} --tokenizer=sentencepiece --tokenizer_path={{tk}}/broken.json",
        "broken.json",
        ".model",
    ),
    Case(f"{TOKENS} --tokenizer=sentencepiece --tokenizer_path=train:x", "train:x", "train:8000"),
    Case(f"{TOKENS} --tokenizer=bytes --tokenizer_path={{tk}}", "tokenizer_path", "bytes"),
    Case(f"{TOKENS} --tokenizer={{tk}}/broken.json", "broken.json", "again"),
    Case(f"{TOKENS} --tokenizer=text8", "text8", "bytes"),
    Case(f"{TOKENS} --tokenizer=json", "'json'", "--tokenizer_path"),
    Case(f"{TOKENS} --tokenizer={{tk}}/lfs.json", "lfs.json", "git lfs pull"),
    Case(
        f"{TOKENS} --tokenizer=sentencepiece --tokenizer_path={{tk}}/lfs.json",
        "lfs.json",
        "git lfs pull",
    ),
    Case("sample --workdir={run} --tokenizer_path={tk}", "--tokenizer_path", "--tokenizer,"),
    Case("sample --workdir={run} --tokenizer=bytes", "{run}", "leave tokenizer out"),
    # --- model folders and runs
    Case("sample --model={models}/lfs", "model.safetensors", "git lfs pull"),
    Case("sample --model={models}/lfs_config", "config.json", "git lfs pull"),
    Case("sample --workdir={models}/lfs_run", "config.json", "git lfs pull"),
    Case("convert --from={models}/lfs.pth --to=out", "lfs.pth", "git lfs pull"),
    Case("convert --from={models}/lfs --to=out", "model.safetensors", "git lfs pull"),
    Case(f"{PREPARE}{{corpora}}/lfs", "a.txt", "git lfs pull"),
    Case("convert --from={models}/lost_shard --to=out", "two.safetensors", "get this file"),
    Case("sample --model={models}/far_shard", "'../x.safetensors'", "beside it"),
    Case("convert --from={hub} --to=out --form=workdir --config.model.blocks=9", "9", "leave"),
    Case(
        "convert --from={hub} --to=out --form=workdir --tokenizer=bytes",
        "'bytes'",
        "give the tokenizer",
    ),
    Case("sample --model=owner/name", "token", "unset HF_TOKEN", {"HF_TOKEN": "hf_odd token"}),
    Case("sample --model={models}/torn", "model.safetensors", "again"),
    Case("sample --model={models}/no_weights", "no_weights", "model.safetensors"),
    Case("sample --model={models}/no_config", "no_config", "config.json"),
    Case("sample --model={models}/bad_config", "config.json", "JSON"),
    Case("sample --model={models}/other_names", "other_names", "encoder"),
    Case("sample --model={models}/other_shape", "model.safetensors", "shape"),
    Case("sample --workdir={models}/no_checkpoint", "no_checkpoint", "checkpoint"),
    Case("sample --workdir={models}/bad_run_config", "config.json", "JSON"),
    Case("sample --workdir={models}/damaged_ema", "checkpoint", "damaged"),
    Case("sample --model=owner/name@main", "main", "unset it"),
    Case("sample --model=a/b/c", "a/b/c", "owner/name"),
    Case("convert --from={models}/bad.pth --to=out", "bad.pth", "torch"),
    # --- paths that are too long, and addresses of other kinds
    Case(f"train --config=quickstart {TINY} --workdir={LONG}", *TOO_LONG),
    Case(f"train --config={LONG} --workdir=run", *TOO_LONG),
    Case(f"{TRAIN} --config.data.records={LONG}", *TOO_LONG),
    Case(f"{TEXT}{LONG}", *TOO_LONG),
    Case(f"{PREPARE}{LONG}", *TOO_LONG),
    Case(f"{PREPARE}{'a/' * 2100}", "/a...' is too long for a path", "give a shorter one"),
    Case(f"{TOKENS} --tokenizer={LONG}", *TOO_LONG),
    Case(f"{TOKENS} --tokenizer=gpt2 --tokenizer_path={LONG}", *TOO_LONG),
    Case(f"prepare --dataset=text --manual_dir={{text}} --tokenizer=bytes --out={LONG}", *TOO_LONG),
    Case(f"sample --workdir={LONG}", *TOO_LONG),
    Case(f"sample --model={LONG}", *TOO_LONG),
    Case(f"sample --workdir={{run}} --out={LONG}", *TOO_LONG),
    Case(f"eval likelihood --workdir={{run}} --json={LONG}", *TOO_LONG),
    Case(f"eval frontier --workdir={{run}} --scorer={LONG}", *TOO_LONG),
    Case(f"report --workdir={LONG}", *TOO_LONG),
    Case(f"convert --from={{hub}} --to={LONG}", *TOO_LONG),
    Case(f"convert --from={{hub}} --to={'x' * 250}", *TOO_LONG),
    Case("sample --model=https://huggingface.co/a/b", "https://huggingface.co/a/b", "local folder"),
    Case("train --config=quickstart --workdir=file:///tmp/run", "file:///tmp/run", "local folder"),
    Case("report --workdir=hf://a/b", "hf://a/b", "local folder"),
    Case("prepare --dataset=ptb --manual_dir=dbfs:/ptb --out=records", "dbfs:/ptb", "local folder"),
    Case("eval mauve --workdir={run} --records=hf://datasets/a", "hf://datasets/a", "local folder"),
    Case(f"{TRAIN} --config.data.path=hf://datasets/a", "hf://datasets/a", "mount"),
    Case("convert --from=r2://b/run --to=out", "r2://b/run", "local folder"),
    # --- a space in place of =, numbers of another kind, a flag without a value
    Case("sample --workdir {run} --steps 0", "0", "steps"),
    Case("sample --workdir={run} --steps=2.5", "2.5", "--help"),
    Case("sample --workdir={run} --num_samples=1e1", "1e1", "--help"),
    Case("sample --workdir={run} --seed 4294967296", "4294967296", "4294967295"),
    Case("sample --workdir", "--workdir", "--help"),
    Case("eval likelihood --workdir {run} --passes 3", "3", "even"),
    Case("eval likelihood --workdir={run} --batch_size=2.5", "2.5", "--help"),
    Case("eval likelihood --workdir={run} --split=held-out", "'held-out'", "validation"),
    Case(TOKENS.replace("16", "1e2") + " --tokenizer=bytes", "1e2", "--help"),
    Case(f"{TRAIN} --config.train.steps 1.5", "1.5", "whole number"),
    Case(f"{TRAIN} --config.train.steps=1_0x", "1_0x", "whole number"),
    Case(f"{TRAIN} --config.seed=1e30", "1e30", "seed"),
    Case("train --workdir", "workdir", "value"),
    Case(f"{TRAIN} --config.mesh.data=0", "0", "mesh.data"),
    Case(f"{TRAIN} --config.optimizer.clip_norm=inf", "inf", "finite"),
    # --- mistakes in a config file
    Case("train --config={broken}/a_key.py --workdir=run", "trian", "train"),
    Case("train --config={broken}/a_section.py --workdir=run", "optimizer", "configs/base.py"),
    Case("train --config={broken}/a_string.py --workdir=run", "'100'", "whole number"),
    Case("train --config={broken}/a_lookup.py --workdir=run", "a_lookup.py', line 3", "correct"),
    Case("train --config={broken}/a_dict.py --workdir=run", "dict", "ConfigDict"),
    # --- comparisons
    Case("compare --out=out", "--config", "--help lists the arguments"),
    Case(f"{COMPARE}out --methods=sedd_absorbing,sed_uniform", "'sed_uniform'", "sedd_uniform?"),
    Case(f"{COMPARE}out --methods=", "''", "known: sedd_absorbing"),
    Case(f"{COMPARE}out --seeds=0", "--seeds 0", "choose one"),
    Case(f"{COMPARE}out --passes=3", "--passes 3", "even number"),
    Case(f"{COMPARE}out --steps=3", "flag --steps", "did you mean --seeds?"),
    Case(f"{COMPARE}out --config.graph.name=uniform", "config.graph.name", "leave"),
    Case(f"{COMPARE}out --config.train.stepz=1", "train.stepz", "train.steps"),
    Case(f"{COMPARE}out --config.data.length=3", "length 3", "at least 4"),
    Case(f"{COMPARE}out --config.data.corpus=text --config.data.path=no", "'no'", "path"),
    Case(f"{COMPARE}{{drafts}}/short.txt", "short.txt", "give a new folder as --out"),
    Case(f"{COMPARE}{{run}}", "holds no comparison", "give a new folder as --out"),
    # --- corpora of other kinds
    Case(f"{PREPARE}{{corpora}}/open_quote", "a.csv:3", "a quote that nothing closes; give"),
    Case(f"{PREPARE}{{corpora}}/ragged", "a.tsv:3", "3 fields in a row, 2 columns; quote"),
    Case(f"{PREPARE}{{corpora}}/nul", "a.csv:2", "UTF-8 text"),
    Case(f"{PREPARE}{{corpora}}/two_texts", 'two columns "text"', "name one so"),
    Case(f"{PREPARE}{{corpora}}/other_keys", "a.jsonl:2", "move the file"),
    Case(f"{PREPARE}{{corpora}}/log", "run.log", "call it .txt if it is a document"),
    Case(f"{PREPARE}{{corpora}}/html", "page.html", "move it elsewhere"),
    Case(f"{PREPARE}{{corpora}}/tar_gz", "a.tar.gz", "unpack"),
    Case(f"{PREPARE}{{corpora}}/tar_xz", "a.tar.xz", "unpack"),
    Case(f"{PREPARE}{{corpora}}/bare_bz2", "part-0.bz2", "unpack"),
    Case(f"{PREPARE}{{corpora}}/broken_xz", "a.txt.xz", "again"),
    Case(f"{PREPARE}{{corpora}}/hidden", "hidden", ".txt"),
    Case(f"{PREPARE}{{corpora}}/dangling", "a.txt", "link to nothing"),
    Case(f"{PREPARE}{{corpora}}/eval_and_dev", "dev.txt", "one of the folders"),
    Case(f"{PREPARE}{{corpora}}/held_out", "more.txt", "rename it"),
    # --- model folders and tokenizers of other kinds
    Case("sample --model={models}/pickled", "pytorch_model.bin.index.json", "safe_serialization"),
    Case("convert --from={models}/pickled --to=out", "index.json", "safe_serialization"),
    Case("sample --workdir={models}/bad_remat", "'most'", "blocks"),
    Case("train --workdir={models}/bad_remat", "'most'", "blocks"),
    Case("eval likelihood --workdir={models}/bad_remat", "'most'", "blocks"),
    Case(f"{TOKENS} --tokenizer={{tk}}/list.json", "list.json", "object"),
    Case(f"{TOKENS} --tokenizer={{tk}}/unknown.json", "unknown.json", "give another"),
    Case(f"{TOKENS} --tokenizer=bert --tokenizer_path={{tk}}/vocab.txt", "vocab.txt", "again"),
    # --- the environment
    Case(TRAIN, "rocm", "cpu", {"JAX_PLATFORMS": "rocm"}),
    Case(TRAIN, "CUDA", "cpu", {"JAX_PLATFORMS": "CUDA"}),
    Case("convert --from={run} --to=out", "tpu", "cpu", {"JAX_PLATFORMS": "tpu,cpu"}),
    Case("report --workdir={run}", "metal", "cpu", {"JAX_PLATFORMS": "metal"}),
    Case("sample --model=owner/name", "token", "unset HF_TOKEN", {"HF_TOKEN": "Bearer hf_abc"}),
    Case("sample --model=owner/name", "token", "unset HF_TOKEN", {"HF_TOKEN": "'hf_abc'"}),
    Case("sample --model=owner/name", "token", "unset HF_TOKEN", {"HF_TOKEN": "hf_caf\u00e9"}),
    Case(TRAIN, "JAX_COORDINATOR_ADDRESS", "one process", {"JAX_COORDINATOR_ADDRESS": "a:1"}),
    Case(TRAIN, "OMPI_COMM_WORLD_SIZE=2", "--coordinator", {"OMPI_COMM_WORLD_SIZE": "2"}),
    Case(TRAIN, "PMI_SIZE=4", "--process_index=$PMI_RANK", {"PMI_SIZE": "4"}),
    Case(TRAIN, "JAX_COORDINATOR_PORT", "correct it", {"JAX_COORDINATOR_PORT": "http"}),
    Case(TRAIN, "cuda", "sedd_jax[cuda", {"JAX_PLATFORMS": "cuda"}),
    Case(TRAIN, "tpu", "sedd_jax[tpu]", {"JAX_PLATFORMS": "tpu"}),
    Case(TRAIN, "gpu", "JAX_PLATFORMS", {"JAX_PLATFORMS": "gpu"}),
    Case("sample --workdir={run}", "cuda", "sedd_jax[cuda", {"JAX_PLATFORMS": "cuda"}),
    Case("eval likelihood --workdir={run}", "quantum", "cpu", {"JAX_PLATFORMS": "quantum"}),
    Case(TRAIN, "JAX_ENABLE_X64", "unset", {"JAX_ENABLE_X64": "1"}),
    Case("sample --workdir={run}", "JAX_ENABLE_X64", "unset", {"JAX_ENABLE_X64": "1"}),
    Case("sample --model={hub}", "JAX_ENABLE_X64", "unset", {"JAX_ENABLE_X64": "1"}),
    Case("convert --from={run} --to=out", "JAX_ENABLE_X64", "unset", {"JAX_ENABLE_X64": "1"}),
    Case(TRAIN, "JAX_RANDOM_SEED_OFFSET", "unset", {"JAX_RANDOM_SEED_OFFSET": "3"}),
    Case(TRAIN, "JAX_NUMPY_RANK_PROMOTION", "unset", {"JAX_NUMPY_RANK_PROMOTION": "raise"}),
    Case(
        "eval likelihood --workdir={run}",
        "JAX_THREEFRY_PARTITIONABLE",
        "unset",
        {"JAX_THREEFRY_PARTITIONABLE": "0"},
    ),
    Case(
        "report --workdir={run}",
        "JAX_NUMPY_DTYPE_PROMOTION",
        "unset",
        {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    ),
    Case(
        "sample --workdir={run}", "JAX_TRANSFER_GUARD", "unset", {"JAX_TRANSFER_GUARD": "disallow"}
    ),
    Case(
        TRAIN,
        "SLURM_STEP_NODELIST",
        "one process",
        {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"},
    ),
    Case(TRAIN, "two", "SLURM_NTASKS", {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "two"}),
    Case(
        TRAIN,
        "TPU_WORKER_HOSTNAMES",
        "one process",
        {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""},
    ),
]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """What the rows name, by name."""
    top = tmp_path_factory.mktemp("inputs")
    earlier = REPOSITORY / "tests/earlier"
    with tarfile.open(earlier / "run_absorbing/run.tar.gz") as archive:
        archive.extractall(top / "run", filter="data")
    for name in ("hub_absorbing", "records_bytes"):
        shutil.copytree(earlier / name, top / name)

    def files(folder: str, **contents: bytes | str) -> None:
        (top / folder).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            (top / folder / name.replace("__", ".")).write_bytes(data)

    pointer = (
        "version https://git-lfs.github.com/spec/v1\noid sha256:"
        + "0123456789abcdef" * 4
        + "\nsize 1234567\n"
    )
    words = "The quick brown fox jumps over the lazy dog. " * 40
    config = "from sedd_jax.configs import quickstart\ndef get_config():\n"
    files("empty")
    files("drafts", long__txt="text" * 25, short__txt="a text\n")
    files("drafts", two__jsonl='{"text": "a"}\n{"text": ""}\n')
    files("text", **{f"{n}__txt": words for n in "abcdefgh"})
    files(
        "broken",
        a_name__py=f"{config}    return STEPS\n",
        a_syntax__py="def get_config():\n    return (\n",
        an_import__py="import no_such_package\n",
        no_function__py="config = 1\n",
        a_type__py="def get_config():\n    return 3\n",
        an_argument__py=f"{config}    return quickstart.get_config()\n",
        an_exit__py="import sys\nsys.exit(7)\n",
        a_key__py=f"{config}    c = quickstart.get_config()\n    c.unlock()\n    c.trian = 1\n"
        "    return c\n",
        a_section__py=f"{config}    c = quickstart.get_config()\n    del c.optimizer\n"
        "    return c\n",
        a_string__py=f"{config}    c = quickstart.get_config()\n    with c.ignore_type():\n"
        "        c.train.steps = '100'\n    return c\n",
        a_lookup__py=f"{config}    return {{}}['x']\n",
        a_dict__py=f"{config}    return quickstart.get_config().to_dict()\n",
    )
    files("corpora/blank", a__txt=" \n", b__txt="")
    files("corpora/latin1", a__txt="café".encode("latin-1"))
    files("corpora/utf16", a__txt=words.encode("utf-16-le"))
    files("corpora/pdf", a__pdf=b"%PDF-1.4\n")
    files("corpora/broken_json", a__jsonl='{"text": "a"}\n{"text": \n')
    files("corpora/no_text", a__jsonl='{"body": "a"}\n')
    files("corpora/broken_gz", a__txt__gz=b"\x1f\x8b\x08\x00broken")
    files("corpora/zip", a__zip=b"PK\x03\x04")
    for split in ("train", "valid", "validation"):
        files(f"corpora/two_splits/{split}", a__txt=words)
    files("corpora/strays", train__txt=words, valid__txt=words, more__txt=words)
    files("corpora/splits", train__txt=words, valid__txt=words)
    files("corpora/train_and_test", train__txt=words, test__txt=words)
    files("corpora/one_column", a__csv="body\nx\n", b__txt=words)
    files("corpora/open_quote", a__csv='n,text\n1,one\n2,"two\n3,three\n')
    files("corpora/ragged", a__tsv="n\ttext\n1\tone\n2\ttwo\tmore\n")
    files("corpora/nul", a__csv="text\no\0ne\n")
    files("corpora/two_texts", a__csv="text,text\na,b\n")
    files("corpora/other_keys", a__jsonl='{"text": "a"}\n{"content": "b"}\n')
    files("corpora/log", a__txt=words, run__log="step 1 loss 2\n")
    files("corpora/html", a__txt=words, page__html="<p>text</p>")
    files("corpora/tar_gz", a__txt=words, a__tar__gz=b"\x1f\x8b\x08\x00")
    files("corpora/tar_xz", a__txt=words, a__tar__xz=b"\xfd7zXZ\x00")
    files("corpora/bare_bz2", a__txt=words, **{"part-0__bz2": b"BZh9"})
    files("corpora/broken_xz", a__txt__xz=b"\xfd7zXZ\x00")
    files("corpora/hidden", __a__txt=words)
    files("corpora/dangling")
    (top / "corpora/dangling/a.txt").symlink_to("nothing")
    files("corpora/eval_and_dev", train__txt=words, dev__txt=words, eval__txt=words)
    files("corpora/held_out", train__txt=words, **{"held-out__txt": words, "more__txt": words})
    files("corpora/pipe")
    os.mkfifo(top / "corpora/pipe/a.txt")
    files("tk", broken__json='{"model": ', lfs__json=pointer, vocab__txt="a\nb\n")
    files("tk", list__json="[]", unknown__json='{"model": {"type": "Morse"}}')

    def model(name: str, **changes: bytes | str | None) -> None:
        shutil.copytree(earlier / "hub_absorbing", top / "models" / name)
        for file, content in changes.items():
            if content is None:
                (top / "models" / name / file.replace("__", ".")).unlink()
            else:
                files(f"models/{name}", **{file: content})

    from safetensors.numpy import load_file, save_file

    weights = load_file(earlier / "hub_absorbing/model.safetensors")
    files("corpora/lfs", a__txt=pointer)
    model("lfs", model__safetensors=pointer)
    model("lfs_config", config__json=pointer)
    index = json.dumps({"weight_map": dict.fromkeys(weights, "two.safetensors")})
    model("lost_shard", model__safetensors=None, model__safetensors__index__json=index)
    index = index.replace("two", "../x")
    model("far_shard", model__safetensors=None, model__safetensors__index__json=index)
    torn = (earlier / "hub_absorbing/model.safetensors").read_bytes()
    model("torn", model__safetensors=torn[: len(torn) // 2])
    model("no_weights", model__safetensors=None)
    model("no_config", config__json=None)
    model("pickled", model__safetensors=None, pytorch_model__bin__index__json="{}")
    model("bad_config", config__json='{"ngpus": 1')
    model("other_names")
    other = {f"encoder.layer.{n}": np.zeros(3, np.float32) for n in range(4)}
    save_file(other, top / "models/other_names/model.safetensors")
    model("other_shape")
    name = next(iter(weights))
    wrong = {**weights, name: weights[name][..., :1].copy()}
    save_file(wrong, top / "models/other_shape/model.safetensors")
    files("models", bad__pth=b"not a torch file", lfs__pth=pointer)
    for name in ("no_checkpoint", "bad_run_config", "lfs_run", "damaged_ema", "bad_remat"):
        shutil.copytree(top / "run", top / "models" / name)
    shutil.rmtree(top / "models/no_checkpoint/checkpoints")
    files("models/bad_run_config", config__json='{"seed": ')
    files("models/lfs_run", config__json=pointer)
    saved = json.loads((top / "run/config.json").read_text())
    saved["model"]["remat"] = "most"
    files("models/bad_remat", config__json=json.dumps(saved))
    for step in (top / "models/damaged_ema/checkpoints").iterdir():
        for file in (step / "ema").rglob("*"):
            if file.is_file() and file.stat().st_size > 200 and file.name != "sha256.json":
                file.write_bytes(file.read_bytes()[:-8] + b"\xff" * 8)
    return {
        "run": top / "run",
        "hub": top / "hub_absorbing",
        "records": top / "records_bytes",
        **{
            name: top / name
            for name in ("empty", "drafts", "text", "broken", "corpora", "tk", "models")
        },
    }


def listing(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path)] = (about.st_size, about.st_mtime_ns) if path.is_file() else ()
    return found


# Runs commands in forks of one process that has imported what they import: a start takes a second.
SERVER = """
import importlib, json, os, pkgutil, sys, traceback
import sedd_jax
from sedd_jax.cli import COMMANDS
for module in pkgutil.walk_packages(sedd_jax.__path__, "sedd_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for line in sys.stdin:
    command, arguments, folder, out, err = json.loads(line)
    child = os.fork()
    if not child:
        status = 70
        try:
            os.chdir(folder)
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
            os.close(0)
            sys.argv = ["sedd-" + command, *arguments]
            status = COMMANDS[command](arguments)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment(case: Case) -> dict[str, str]:
    own = ("SLURM_", "TPU_", "XLA_FLAGS", "JAX_", "SEDD_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return env | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **case.env}


@pytest.fixture(scope="module")
def server():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, env=environment(Case("", "", "")), **pipes) as process:
        yield process
        process.stdin.close()


def run(case: Case, inputs: dict[str, Path], folder: Path, server, files: Path):
    """The command as installed where it has an environment of its own or is the first of its name,
    else in a fork of the server."""
    command, *arguments = case.line.split()
    arguments = [argument.format(**inputs) for argument in arguments]
    first = next(one for one in CASES if one.line.split()[0] == command)
    if not case.env and case is not first:
        out, err = files / "out", files / "err"
        job = command, arguments, *map(str, (folder, out, err))
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(job, status, out.read_text(), err.read_text())
    return subprocess.run(
        [Path(sys.executable).with_name(f"sedd-{command}"), *arguments],
        check=False,
        cwd=folder,
        env=environment(case),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.env or ''}{case.line}"[:100])
def test_a_wrong_input_is_told_in_one_line(case, inputs, tmp_path, tmp_path_factory, server):
    before = listing(inputs["run"].parent)
    result = run(case, inputs, tmp_path, server, tmp_path_factory.mktemp("output"))
    error = result.stderr
    assert "Traceback" not in error
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith(f"sedd-{case.line.split()[0]}: error: ")
    assert result.returncode == 2
    assert result.stdout == ""
    assert case.value.format(**inputs) in error
    assert case.remedy.format(**inputs) in error
    assert listing(tmp_path) == {}
    assert listing(inputs["run"].parent) == before


def test_there_are_many_rows_and_none_twice():
    assert len({(case.line, json.dumps(dict(case.env))) for case in CASES}) == len(CASES) >= 150
