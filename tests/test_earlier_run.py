"""A run's folder that version 0.1.0 made still trains on, and samples what it sampled."""

import json
import tarfile

import numpy as np
import pytest
from conftest import REPOSITORY

import sedd_jax
from sedd_jax.cli import train_command
from sedd_jax.runs.checkpoint import Checkpoints

SAMPLES = ["allfotnplsmqkaf wxdnbmu f q.mpaq", "mpoa\nopimchcrosqccrupnwsxix.obx\n"]
LOSS = 3.0514631271362305  # nats per token, mean of steps 9 and 10, as version 0.1.0 goes on


@pytest.fixture
def earlier(tmp_path):
    with tarfile.open(REPOSITORY / "tests/earlier/run_absorbing/run.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def test_an_earlier_run_goes_on_as_it_would_have(earlier):
    assert train_command([f"--workdir={earlier}", "--config.train.steps=10"]) == 0
    rows = [json.loads(line) for line in (earlier / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["nats_per_token"] for row in rows if row["kind"] == "train"}
    assert list(losses) == [2, 4, 6, 8, 10]
    np.testing.assert_allclose(losses[10], LOSS, rtol=1e-4)
    with Checkpoints(earlier / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.newest() == 10


def test_an_earlier_run_samples_what_it_sampled(earlier):
    model = sedd_jax.load(earlier)
    assert model.step == 8
    assert model.sample(2, steps=4, seed=0) == SAMPLES
