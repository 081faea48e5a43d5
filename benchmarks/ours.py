"""Our side of the benchmarks: the training program, and the sampler of the API.

Lives in a process of its own (worker.py). The checkout is named: `sedd_jax` and `sedd_jax.configs`
are read from there, whatever is installed.
"""

import dataclasses
import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import device_time
import numpy as np

MODEL_KEYS = ("hidden_size", "blocks", "heads", "cond_dim", "dropout")


def _first_module(*names: str) -> Any:
    """The first of the package's modules that the checkout has: they moved after version 0.1.0."""
    root = Path(importlib.import_module("sedd_jax").__file__).parent
    for name in names:
        path = root.joinpath(*name.split("."))
        # By its file: an editable installation would find the module of another checkout.
        if path.is_dir() or path.with_suffix(".py").is_file():
            return importlib.import_module(f"sedd_jax.{name}")
    raise ModuleNotFoundError(f"the checkout has none of {', '.join(names)}")


class Ours:
    """A checkout's training step and sampler at one size and dtype."""

    def __init__(self, side: dict[str, Any], size: dict[str, Any]):
        use_checkout(Path(side["path"]))
        import jax

        from sedd_jax import config
        from sedd_jax.configs import base

        self.jax, self.configuration, self.base = jax, config, base.get_config
        self.device = jax.devices()[0]
        self.is_accelerator = self.device.platform != "cpu"
        self.size = size
        self.values = {
            **{f"model.{name}": size[name] for name in MODEL_KEYS},
            "model.dtype": side["dtype"],
            **dict(side["values"]),
        }
        self.compiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, *_: Any, **__: Any) -> None:
        self.compiles += event.endswith("backend_compile_duration")

    def about(self) -> dict[str, Any]:
        return {"device": self.device.device_kind, "framework": f"jax {self.jax.__version__}"}

    def _experiment(self, batch_size: int, length: int, **changes: Any) -> Any:
        """What the config means on one device: nothing is allocated."""
        batch = {"train.batch_size": batch_size, "data.length": length}
        config = self.configuration.with_values(self.base(), batch | self.values | changes)
        make_mesh = _first_module("parallel.sharding", "sharding").make_mesh
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, [self.device])
        module = _first_module("experiment", "program")
        make = getattr(module, "make_experiment", None) or module.make_program
        return make(config, self.size["vocab_size"], mesh)

    def forward_flops(self, length: int) -> int:
        """Operations of one network call with every logit, a sequence: uniform noise needs all.

        A third of the package's own count of a training step.
        """
        every_logit = {"graph.name": "uniform", "graph.scale_by_sigma": False}
        return self._experiment(1, length, **every_logit, **{"train.microbatches": 1}).flops // 3

    # --- training

    def start_training(self, batch_size: int, length: int) -> dict[str, Any]:
        """The state on the device and the compiled step; parameters, bytes, bytes as compiled."""
        from sedd_jax.data import Blocks

        jax = self.jax
        self.state = self.step = None  # of another batch
        experiment = self._experiment(batch_size, length)

        def start():
            state = experiment.fresh()
            params = self._without_zeros(state.params)
            return state.replace(params=params, ema=jax.tree.map(jax.numpy.copy, params))

        self.state = jax.jit(start, out_shardings=experiment.shardings)()
        drawn = np.random.default_rng(0).integers(
            self.size["vocab_size"], size=(batch_size, length), dtype=np.int32
        )
        self.batch = Blocks(jax.device_put(drawn, experiment.batch_shape.tokens.sharding))
        self.key = experiment.keys["train"]
        self.step = experiment.lower().compile()
        return {
            "parameters": self._count(self.state.params),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)),
            "temporary_bytes": getattr(self.step.memory_analysis(), "temp_size_in_bytes", None),
        }

    def train(self, steps: int) -> float:
        """The loss of the last of so many steps, nats per sequence."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch, self.key)
        self.jax.block_until_ready(self.state)
        return float(metrics["loss"])

    # --- sampling

    def start_sampling(self, batch_size: int, length: int) -> dict[str, Any]:
        """A model with random weights; its parameters."""
        SEDD = _first_module("inference.model", "api").SEDD
        experiment = self._experiment(batch_size, length)
        parts = {name: getattr(experiment, name, None) for name in ("config", "graph", "schedule")}
        parts |= {"network": experiment.network, "length": length, "tokenizer": None, "step": None}
        start = self.jax.jit(lambda: self._without_zeros(experiment.fresh().params))
        parts["params"] = start()
        fields = {field.name for field in dataclasses.fields(SEDD)}
        self.model = SEDD(**{name: part for name, part in parts.items() if name in fields})
        self.batch_size, self.seed = batch_size, 0
        return {"parameters": self._count(self.model.params)}

    def sample(self, steps: int) -> int:
        """Draw a batch; how many of its tokens are none of the vocabulary's: 0."""
        self.seed += 1
        tokens = self.model.sample_tokens(
            self.batch_size, steps=steps, batch_size=self.batch_size, seed=self.seed
        )
        return int((tokens >= self.size["vocab_size"]).sum())

    def profile(self, kind: str, steps: int) -> dict[str, Any]:
        """Where the time of so many steps, or of a sample's network calls, goes on the device."""
        options = self.jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        run, calls = (self.train, steps) if kind == "train" else (self.sample, steps + 1)
        with tempfile.TemporaryDirectory() as folder:
            with self.jax.profiler.trace(folder, profiler_options=options):
                run(steps)
            (file,) = Path(folder).rglob("*.xplane.pb")
            profile = self.jax.profiler.ProfileData.from_file(str(file))
        return device_time.summary(device_time.kernels(profile), calls)

    def _without_zeros(self, params: Any) -> Any:
        """Zero at the start (head, modulation) are drawn instead: scores must not be trivial."""
        jax = self.jax
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [
            jax.numpy.where((leaf == 0).all(), 0.02 * jax.random.normal(key, leaf.shape), leaf)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, drawn)

    def _count(self, params: Any) -> int:
        return sum(leaf.size for leaf in self.jax.tree.leaves(params))

    # --- the device

    def matmul(self, side: int, dtype: str) -> Any:
        """A function that multiplies two matrices and waits."""
        jax, jnp = self.jax, self.jax.numpy
        a, b = jax.random.normal(jax.random.key(0), (2, side, side)).astype(dtype)
        precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
        return lambda: multiply(a, b).block_until_ready()

    def device_peak(self) -> int | None:
        """Bytes of the accelerator in use at most; None on a CPU. jax's allocator keeps it."""
        stats = self.device.memory_stats() if self.is_accelerator else None
        return stats and stats["peak_bytes_in_use"]

    def forget_device_peak(self) -> None:
        pass


def use_checkout(path: Path) -> None:
    """Let `import sedd_jax` and `sedd_jax.configs`, its folder configs/, mean this checkout."""
    sys.path.insert(0, str(path))
    folder = path / "configs"
    spec = importlib.util.spec_from_file_location(
        "sedd_jax.configs", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["sedd_jax.configs"] = module
    spec.loader.exec_module(module)
