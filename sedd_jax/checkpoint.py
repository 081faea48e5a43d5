"""Checkpoints of the train state in Orbax directories, written in the background.

A checkpoint holds two items: `ema`, which evaluation and sampling read alone, and `train`, the
rest of the state. A restored state is bit-equal to the saved one on any mesh.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from sedd_jax import sharding
from sedd_jax.state import TrainState


class Checkpoints:
    """The checkpoints of one run, newest last. Use as a context manager: leaving waits for saves."""

    def __init__(self, folder: str | Path, *, keep: int | None = None, read_only: bool = False):
        """keep: how many of the newest stay. A reader must be read_only: the one that writes
        clears away unfinished saves, and would take another's for leftovers."""
        handlers = {item: ocp.StandardCheckpointHandler() for item in ("train", "ema")}
        with _without_warnings() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                Path(folder).absolute(),  # Orbax wants an absolute path
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    create=not read_only,
                ),
                item_handlers=handlers,
            )
        self.folder = Path(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Start writing state as this step's checkpoint, unless it is there already."""
        if step in self._manager.all_steps():
            return
        train = state.replace(ema=None)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(train), ema=ocp.args.StandardSave(state.ema)
            ),
            force=True,
        )

    def wait(self) -> None:
        """Until the checkpoint being written is complete; raises what its writing raised."""
        self._manager.wait_until_finished()

    def restore(self, shape: TrainState) -> TrainState:
        """The newest state; shape gives every leaf's shape, dtype and sharding."""
        step = self._newest()
        restored = self._restore(step, train=shape.replace(ema=None), ema=shape.ema)
        return restored["train"].replace(ema=restored["ema"])

    def restore_ema(self, shape: Any) -> tuple[int, Any]:
        """(step, moving average) of the newest checkpoint, reading nothing else."""
        step = self._newest()
        return step, self._restore(step, ema=shape)["ema"]

    def _newest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise ValueError(
                f"no checkpoint in {str(self.folder)!r}; train first, or name another workdir"
            )
        return step

    def _restore(self, step: int, **shapes: Any):
        metadata = self._manager.item_metadata(step)
        for item, shape in shapes.items():
            self._compare(step, metadata[item], shape)
        args = {item: ocp.args.StandardRestore(shape) for item, shape in shapes.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _compare(self, step: int, saved: Any, shape: Any) -> None:
        """ValueError if names, shapes or dtypes differ: Orbax would cast a dtype silently."""
        found, wanted = _leaves(saved), _leaves(shape)
        for name in {**found, **wanted}:
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"checkpoint {step} in {str(self.folder)!r} holds {name} as "
                    f"{found.get(name, 'nothing')}, the model needs {wanted.get(name, 'nothing')};"
                    " use the config that it was trained with"
                )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns whoever only reads that it only reads."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _leaves(tree: Any) -> dict[str, str]:
    """Name -> dtype[shape] of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        sharding.path_name(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def with_shardings(shape: Any, shardings: Any) -> Any:
    """A tree of shapes, each leaf with its sharding."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shape,
        shardings,
    )
