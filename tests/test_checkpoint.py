"""Damaged checkpoints: none is restored wrong, the one before is restored, bit for bit."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY, says

from sedd_jax import state
from sedd_jax.parallel import sharding
from sedd_jax.runs.checkpoint import ITEMS, SEAL, Checkpoints

STEPS = (4, 8)


def state_of(step: int) -> state.TrainState:
    """A train state whose every leaf tells the step."""
    params = {"blocks": {"w": jax.random.normal(jax.random.key(step), (64, 33))}, "b": jnp.ones(7)}
    found = state.init(params, optax.adam(1.0))
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), found)


def shape():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = jax.eval_shape(lambda: state_of(0))
    return sharding.with_shardings(found, jax.tree.map(lambda leaf: device, found))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_of(step))
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def assert_restores(folder, step, *, read_only=False):
    with Checkpoints(folder, read_only=read_only) as checkpoints:
        assert checkpoints.newest() == step
        restored = checkpoints.restore(step, shape())
        at, ema = checkpoints.restore_ema(shape().ema)
    assert at == step
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(step))
    jax.tree.map(np.testing.assert_array_equal, ema, state_of(step).ema)


def files_of(item):
    return sorted(path for path in item.rglob("*") if path.is_file())


def largest(item):
    return max(
        (path for path in files_of(item) if path.name != SEAL), key=lambda p: p.stat().st_size
    )


def flip(path, bit=9):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


FAULTS = {
    "a data file cut short": lambda item: largest(item).write_bytes(
        largest(item).read_bytes()[:-1]
    ),
    "a data file emptied": lambda item: largest(item).write_bytes(b""),
    "a data file of zeros": lambda item: largest(item).write_bytes(
        bytes(largest(item).stat().st_size)
    ),
    "a data file gone": lambda item: largest(item).unlink(),
    "a bit of a data file": lambda item: flip(largest(item)),
    "a bit of the index": lambda item: flip(item / "manifest.ocdbt", 800),
    "a bit of the metadata": lambda item: flip(item / "_METADATA"),
    "the metadata gone": lambda item: (item / "_METADATA").unlink(),
    "the seal gone": lambda item: (item / SEAL).unlink(),
    "the seal cut short": lambda item: (item / SEAL).write_bytes((item / SEAL).read_bytes()[:-9]),
    "the item gone": lambda item: shutil.rmtree(item),
    "an older item in its place": lambda item: (
        shutil.rmtree(item),
        shutil.copytree(item.parents[1] / "4" / item.name, item),
    ),
}


def test_sound_checkpoints_are_restored_newest_first(folder):
    assert_restores(folder, 8)
    assert not (folder.parent / "quarantine").exists()


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder, fault, item, caplog):
    FAULTS[fault](folder / "8" / item)
    with Checkpoints(folder, read_only=True) as reader:
        assert reader.newest() == 4
    assert not (folder.parent / "quarantine").exists()  # a reader moves nothing
    assert_restores(folder, 4)
    assert "checkpoint 8 in" in caplog.text and "taking the one before" in caplog.text
    assert (folder.parent / "quarantine/8").is_dir()
    # Its number is free: training on writes it again.
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(8, state_of(8))
    assert_restores(folder, 8)


def test_no_flipped_bit_is_restored_wrong(folder):
    generator = np.random.default_rng(0)
    newest = [path for path in files_of(folder / "8") if path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in newest], float)
    counts = {8: 0, 4: 0}
    for _ in range(200):
        path = newest[generator.choice(len(newest), p=0.5 / len(sizes) + 0.5 * sizes / sizes.sum())]
        whole = path.read_bytes()
        flip(path, int(generator.integers(8 * len(whole))))
        with Checkpoints(folder, read_only=True) as checkpoints:
            step = checkpoints.newest()
            restored = checkpoints.restore(step, shape())
        jax.tree.map(np.testing.assert_array_equal, restored, state_of(step))
        counts[step] += 1
        path.write_bytes(whole)
    # What is not sealed is Orbax's note of the time of writing: it changes no number.
    assert counts[4] > 150, counts


def test_a_reader_whose_checkpoints_were_deleted_takes_a_newer_one(folder, tmp_path):
    newer = (folder / "8").rename(tmp_path / "8")
    with Checkpoints(folder, read_only=True) as reader:
        newer.rename(folder / "8")  # a run saves it,
        shutil.rmtree(folder / "4")  # and deletes the one that the reader saw
        assert reader.newest() == 8


def test_a_reader_opens_while_a_run_deletes_checkpoints(folder):
    """Each reader lists some of thirty steps that go before it has looked at them."""
    code = "import itertools, os, time\nfor n in itertools.count(): os.mkdir(str(9 + n % 30))"
    code += "; n >= 29 and os.rmdir(str(9 + (n + 1) % 30)); time.sleep(0.001)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder) as run:
        try:
            for _ in range(40):
                with Checkpoints(folder, read_only=True) as reader:
                    assert {4, 8} <= {*reader._manager.all_steps()}
            assert run.poll() is None
        finally:
            run.kill()


def test_damage_to_the_average_alone_is_seen_by_who_reads_it_alone(folder):
    flip(largest(folder / "8/train"))
    with Checkpoints(folder, read_only=True) as reader:
        assert reader.restore_ema(shape().ema)[0] == 8
    flip(largest(folder / "8/ema"))
    with Checkpoints(folder, read_only=True) as reader:
        assert reader.restore_ema(shape().ema)[0] == 4
        assert reader.newest() == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_who_reads_the_average_alone_needs_nothing_of_the_rest(folder, fault):
    FAULTS[fault](folder / "8/train")
    with Checkpoints(folder, read_only=True) as reader:
        step, ema = reader.restore_ema(shape().ema)
    assert step == 8
    jax.tree.map(np.testing.assert_array_equal, ema, state_of(8).ema)


def test_the_average_of_a_step_that_is_named(folder):
    with Checkpoints(folder, read_only=True) as reader:
        step, ema = reader.restore_ema(shape().ema, 4)
        jax.tree.map(np.testing.assert_array_equal, ema, state_of(4).ema)
        assert step == 4
        with says("no checkpoint of step 5 in", "steps there: 4, 8"):
            reader.restore_ema(shape().ema, 5)
        flip(largest(folder / "4/ema"))
        # Not another instead.
        with says("checkpoint 4 in", "is damaged: ema/", "steps there: 4, 8"):
            reader.restore_ema(shape().ema, 4)


def test_no_sound_checkpoint_at_all_is_one_line(folder):
    for step in STEPS:
        flip(largest(folder / str(step) / "ema"))
    for read_only in (True, False):
        with Checkpoints(folder, read_only=read_only) as checkpoints:
            for call in (checkpoints.newest, lambda c=checkpoints: c.restore_ema(shape().ema)):
                with says("every checkpoint in", "is damaged: 8, 4 (8: ema/", "to begin anew"):
                    call()
    # Nothing was moved, and training does not begin anew over them.
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["4", "8"]
    assert not (folder.parent / "quarantine").exists()


def test_a_folder_without_checkpoints_has_none(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.newest() is None
        with says("no checkpoint in"):
            checkpoints.restore_ema(shape().ema)


def test_what_is_put_aside_twice_is_kept_twice(folder):
    quarantine = folder.parent / "quarantine"
    for time in range(3):
        if time == 2:
            shutil.rmtree(quarantine / "8")  # by hand: its name is free again
        flip(largest(folder / "8/ema"))
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.newest() == 4
            checkpoints.save(8, state_of(8))
    assert sorted(path.name for path in quarantine.iterdir()) == ["8", "8-2"]


def test_a_disk_that_fills_is_one_line_and_the_checkpoint_before_stays(folder):
    """Files over the limit fail to be written, as on a full disk."""
    code = f"""
import resource, signal, sys
sys.path[:0] = ["tests"]
import test_checkpoint as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with t.Checkpoints({str(folder)!r}) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        checkpoints.save(12, t.state_of(12))
        checkpoints.wait()
    except OSError as error:
        print("one line:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("one line: cannot write")]
    assert len(lines) == 1 and "make room there" in lines[0], run.stdout + run.stderr
    assert_restores(folder, 8)
    with Checkpoints(folder):
        pass
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["4", "8"]


def test_the_seal_lists_every_file_that_holds_values(folder):
    for item in ITEMS:
        sealed = json.loads((folder / "8" / item / SEAL).read_text())
        assert (sealed["step"], sealed["item"]) == (8, item)
        found = {
            path.relative_to(folder / "8" / item).as_posix()
            for path in files_of(folder / "8" / item)
        }
        assert found - set(sealed["sha256"]) <= {SEAL, "commit_success.txt"}
