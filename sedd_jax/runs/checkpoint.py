"""Checkpoints of the train state in Orbax directories, written in the background.

A checkpoint holds two items: `ema`, which evaluation and sampling read alone, and `train`, the
rest of the state. A restored state is bit-equal to the saved one on any mesh.

Orbax restores a file with a flipped bit as if nothing were wrong, and it never falls back. So each
item is sealed with the sha256 of its files before Orbax commits it, and a checkpoint that differs
from its seal is passed over for the one before.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from sedd_jax.host import files
from sedd_jax.parallel import processes, sharding
from sedd_jax.state import TrainState

log = logging.getLogger(__name__)
T = TypeVar("T")

ITEMS = ("train", "ema")
SEAL = "sha256.json"


class _Sealing(ocp.StandardCheckpointHandler):
    """Seals the item that it has written, before the rename that commits the checkpoint."""

    about: dict[str, Any]  # the step and the item, so that none passes for another

    def finalize(self, directory) -> None:
        super().finalize(directory)
        _seal(Path(directory), self.about)


@ocp.args.register_with_handler(_Sealing, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_Sealing, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.StandardRestore):
    pass


def _seal(folder: Path, about: dict[str, Any]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}
    files.write_text(folder / SEAL, json.dumps({**about, "sha256": hashes}, indent=1))


def fault_of(folder: Path, about: dict[str, Any]) -> str | None:
    """How an item's folder differs from what was sealed with `about`; None if it does not."""
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        hashes = sealed.pop("sha256")
        if sealed != about:
            return f"{folder.name}/{SEAL} is of {sealed}, not of {about}"
        for name, sha256 in hashes.items():
            if files.sha256(folder / name) != sha256:
                return f"{folder.name}/{name} is not what was written"
    except FileNotFoundError as error:
        return f"{folder.name}/{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder.name} cannot be read: {type(error).__name__}"
    return None


class Checkpoints:
    """The checkpoints of one run, newest last. A context manager: leaving waits for saves."""

    def __init__(self, folder: str | Path, *, keep: int | None = None, read_only: bool = False):
        """keep: how many of the newest are not deleted. A reader must be read_only: a writer
        deletes unfinished saves, and would take another process's for leftovers. Of several
        processes all write together, but each reads by itself."""
        group = ocp.options.MultiprocessingOptions()
        if read_only:
            index = jax.process_index()
            group = ocp.options.MultiprocessingOptions(
                primary_host=index, active_processes={index}, barrier_sync_key_prefix=str(index)
            )
        self._handlers = {item: _Sealing(multiprocessing_options=group) for item in ITEMS}

        def open_manager() -> ocp.CheckpointManager:
            return ocp.CheckpointManager(
                Path(folder).absolute(),  # Orbax wants an absolute path
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    create=not read_only,
                    multiprocessing_options=group,
                ),
                item_handlers=self._handlers,
            )

        with _without_warnings() if read_only else contextlib.nullcontext():
            self._manager = _listed(open_manager) if read_only else open_manager()
        self.folder, self._read_only = Path(folder), read_only

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_) -> None:
        try:
            with self._writing():
                self._manager.close()
        except OSError as error:
            if exception is None:
                raise
            log.error("%s", error)  # what ended the run comes first

    def newest(self, items: tuple[str, ...] = ITEMS) -> int | None:
        """The newest step whose items match their seals; None if there is no checkpoint.

        A damaged one is passed over with a warning, and a writer moves it into the folder
        quarantine beside the checkpoints, so that its number is free again. ValueError, and
        nothing is moved, if there are checkpoints and none is sound: training must not begin anew
        over them.
        """
        if self._read_only:
            return self._newest(items)
        # Process 0 checks, and moves the damaged ones, before any process restores.
        step = processes.on_first_process(lambda: self._newest(items))
        self._manager.reload()
        return step

    def _newest(self, items: tuple[str, ...]) -> int | None:
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            fault = self._fault_of(step, items)
            if fault is None:
                self._pass_over(damaged)
                return step
            damaged[step] = fault
        if damaged and self._read_only:
            # A run that trains deletes its oldest checkpoints, and saves others first.
            _listed(self._manager.reload)
            if set(self._manager.all_steps()) - set(damaged):
                return self._newest(items)
        if damaged:
            step, fault = next(iter(damaged.items()))
            raise ValueError(
                f"every checkpoint in {str(self.folder)!r} is damaged: "
                f"{', '.join(map(str, damaged))} ({step}: {fault}); put a copy of one in its "
                "place, or move the folder away to begin anew"
            )
        return None

    def _fault_of(self, step: int, items: tuple[str, ...]) -> str | None:
        folder = self.folder / str(step)
        faults = (fault_of(folder / item, _about(step, item)) for item in items)
        return next(filter(None, faults), None)

    def _pass_over(self, damaged: dict[int, str]) -> None:
        for step, fault in damaged.items():
            log.warning(
                "checkpoint %d in %r is damaged: %s; taking the one before",
                step,
                str(self.folder),
                fault,
            )
            if not self._read_only:
                quarantine = self.folder.with_name("quarantine")
                quarantine.mkdir(exist_ok=True)
                taken = {path.name for path in quarantine.iterdir()}
                names = (f"{step}-{n}" if n > 1 else str(step) for n in itertools.count(1))
                name = next(name for name in names if name not in taken)
                (self.folder / str(step)).rename(quarantine / name)

    def needed(self, items: tuple[str, ...] = ITEMS, step: int | None = None) -> int:
        """`newest`, or this step; ValueError where it is not there or damaged."""
        if step is None:
            step = self.newest(items)
            if step is None:
                raise ValueError(
                    f"no checkpoint in {str(self.folder)!r}; train first, or name another workdir"
                )
            return step
        there = f"steps there: {', '.join(map(str, sorted(self._manager.all_steps()))) or 'none'}"
        if step not in self._manager.all_steps():
            raise ValueError(f"no checkpoint of step {step} in {str(self.folder)!r}; {there}")
        fault = self._fault_of(step, items)
        if fault is not None:
            raise ValueError(
                f"checkpoint {step} in {str(self.folder)!r} is damaged: {fault}; {there}"
            )
        return step

    def save(self, step: int, state: TrainState) -> None:
        """Start writing state as this step's checkpoint, unless it is there already.

        OSError if the one before could not be written.
        """
        if step in self._manager.all_steps():
            return
        with self._writing():
            self._manager.wait_until_finished()
            for item, handler in self._handlers.items():
                handler.about = _about(step, item)
            self._manager.save(
                step,
                args=ocp.args.Composite(train=_Save(state.replace(ema=None)), ema=_Save(state.ema)),
                force=True,
            )

    def wait(self) -> None:
        """Until the checkpoint being written is complete; OSError if it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the system, Orbax or TensorStore: each is about the disk
            reason = " ".join(str(error).split())[:300]
            raise OSError(
                f"cannot write a checkpoint in {str(self.folder)!r}: {reason}; make room there and "
                "run the same command: it goes on from the checkpoint before"
            ) from error

    def restore(self, step: int, shape: TrainState) -> TrainState:
        """The state of that step; shape gives every leaf's shape, dtype and sharding."""
        restored = self._restore(step, train=shape.replace(ema=None), ema=shape.ema)
        return restored["train"].replace(ema=restored["ema"])

    def restore_ema(self, shape: Any, step: int | None = None) -> tuple[int, Any]:
        """(step, moving average) of the newest or that checkpoint, reading nothing else."""
        step = self.needed(("ema",), step)
        return step, self._restore(step, ema=shape)["ema"]

    def _restore(self, step: int, **shapes: Any):
        for item, shape in shapes.items():
            # The manager's would read the other items' too, which may be damaged.
            place = epath.Path(self.folder.absolute()) / str(step) / item
            self._compare(step, self._handlers[item].metadata(place), shape)
        args = {item: _Restore(shape) for item, shape in shapes.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _compare(self, step: int, saved: Any, shape: Any) -> None:
        """ValueError if names, shapes or dtypes differ: Orbax would cast a dtype silently."""
        stored, needed = _leaves(saved), _leaves(shape)
        for name in {**stored, **needed}:
            if stored.get(name) != needed.get(name):
                raise ValueError(
                    f"checkpoint {step} in {str(self.folder)!r} holds {name} as "
                    f"{stored.get(name, 'nothing')}, the model needs {needed.get(name, 'nothing')};"
                    " use the config that it was trained with"
                )


def _about(step: int, item: str) -> dict[str, Any]:
    return {"step": step, "item": item}


def _listed(look: Callable[[], T]) -> T:
    """look(), again where a step went while Orbax, which lists all and then looks at each, did."""
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return look()
    return look()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns every reader that it is one."""
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
