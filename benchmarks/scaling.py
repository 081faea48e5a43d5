"""How memory, operations and traffic of a train step grow with devices, batch, length and depth.

Compiles each row's program ahead of time for its target (sedd_jax.training.dry_run, which needs no
accelerator) and prints a table in markdown. --json keeps the numbers; rows that it has already are
not compiled again, so the program may be stopped and run on.

    python benchmarks/scaling.py --json=scaling.json [--only=v5e]
"""

import argparse
import importlib
import json
import re
from pathlib import Path

import measure
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.training.dry_run import dry_run

SMALL, MEDIUM = "openwebtext_small", "openwebtext_medium"
BY_16 = {"mesh.data": 16, "train.microbatches": 16}
# The row of HARDWARE in configs/base.py, and its target.
MACHINES = {
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "a100x8": "a100:8",
    "a100x16": "a100:16",
    "h100x8": "h100:8",
    "v4-64": "v4:2x4x4",
    "v5p-64": "v5p:2x4x4",
    "v6e-64": "v6e:8x8",
}
# (config:hardware, target, changes): batch 512 unless changed, as in the paper.
ROWS = (
    # What the paper trained, on each machine.
    *((f"{c}:{name}", target, {}) for name, target in MACHINES.items() for c in (SMALL, MEDIUM)),
    (SMALL, "v5e:16x16*2", {}),
    (MEDIUM, "v5e:16x16*2", {"mesh.fsdp": 4}),
    (SMALL, "v5p:4x8x8", {}),
    (MEDIUM, "v5p:4x8x8", {}),
    # Chips: batch 512, and one sequence a chip beyond it.
    (SMALL, "v5e:1x1", {"train.microbatches": 32}),
    (SMALL, "v5e:2x2", {"train.microbatches": 8}),
    (SMALL, "v5p:2x2x1", {"train.microbatches": 2}),
    (SMALL, "v5p:4x4x4", {}),
    (SMALL, "v5p:8x8x8", {}),
    (SMALL, "v5p:8x8x16", {"train.batch_size": 1024}),
    (SMALL, "v5p:16x16x16", {"train.batch_size": 4096}),
    # Batch, length, depth, remat and fsdp, one at a time.
    (SMALL, "v5e:4x4", BY_16),
    (SMALL, "v5e:4x4", {**BY_16, "train.batch_size": 1024}),
    (SMALL, "v5e:4x4", {**BY_16, "data.length": 512}),
    (SMALL, "v5e:4x4", {**BY_16, "data.length": 2048}),
    (SMALL, "v5e:4x4", {**BY_16, "model.blocks": 24}),
    (SMALL, "v5e:4x4", {**BY_16, "model.remat": "elementwise"}),
    (SMALL, "v5e:4x4", {**BY_16, "model.remat": "blocks"}),
    (SMALL, "v5e:4x4", {"mesh.data": 1, "mesh.fsdp": 16, "train.microbatches": 16}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name has this pattern")
    options = parser.parse_args()
    for row in ROWS:
        name = row_name(*row)
        if name not in _read(options.json) and re.search(options.only, name):
            try:
                result = dry_run(config_of(*row), row[1]).to_dict()
            except ValueError as error:
                result = {"error": str(error)}
            result.pop("parameters", None)
            results = _read(options.json) | {name: result}  # another process may have written
            options.json.write_text(json.dumps(results, indent=1))
    print(measure.table([cells(row, _read(options.json)) for row in ROWS]))


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def row_name(config: str, target: str, changes: dict) -> str:
    """small:v5e-16 v5e:4x4 microbatches=8, say."""
    changed = " ".join(f"{key.split('.')[1]}={value}" for key, value in changes.items())
    return f"{config.removeprefix('openwebtext_')} {target} {changed}".strip()


def config_of(config: str, _: str, changes: dict) -> ConfigDict:
    module, _, hardware = config.partition(":")
    config = importlib.import_module(f"sedd_jax.configs.{module}").get_config(hardware)
    return configuration.with_values(config, changes)


def cells(row: tuple, results: dict[str, dict]) -> dict[str, str]:
    """A line of the table; a row that was not compiled says so."""
    name, gib = row_name(*row), 2**30
    e = results.get(name, {"error": "not compiled"})
    if "error" in e:
        return {"program": name, "chips": e["error"]}
    state = e["parameter_bytes"] + e["ema_bytes"] + e["optimizer_bytes"]
    parts = e["mesh"]["data"] * e["mesh"]["fsdp"] * e["microbatches"]
    total = f"{e['total_bytes'] / gib:.2f} of {e['memory_bytes'] / gib:.2f}"
    temporaries = e["temporary_bytes"]
    return {
        "program": name,
        "chips": str(e["devices"]),
        "rows a chip": str(config_of(*row).train.batch_size // parts),
        "state GiB": f"{state / gib:.2f}",
        "temporaries GiB": "" if temporaries is None else f"{temporaries / gib:.2f}",
        "total of GiB": total if e["fits"] else f"{total} (does not fit)",
        "TFLOP a chip": f"{e['flops'] / e['devices'] / 1e12:.2f}",
        "MiB sent a chip": f"{sum(one['bytes'] for one in e['collectives']) / 2**20:,.0f}",
        "compiled s": f"{e['compile_seconds']:.0f}",
        "step s at 40 %": f"{e['step_seconds']:.3f}",
    }


if __name__ == "__main__":
    main()
