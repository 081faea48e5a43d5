"""How memory, operations and traffic of a train step grow with devices, batch, length and depth.

Compiles each row's program ahead of time for its target (sedd_jax.training.dry_run, which needs no
accelerator) and prints a table in markdown. --json keeps the numbers; rows that it has already are
not compiled again, so the program may be stopped and run on.

    python benchmarks/scaling.py --json=scaling.json [--only=v5e]
"""

import argparse
import importlib
import json
import math
import re
import tempfile
from pathlib import Path

from sedd_jax.parallel.devices import GIB
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

HEADS = (
    *("program", "chips", "rows a chip", "state GiB", "temporaries GiB", "total of GiB"),
    *("TFLOP a chip", "MiB sent a chip", "compiled s", "step s at 40 %"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name has this pattern")
    options = parser.parse_args()
    results = _read(options.json)
    for row in ROWS:
        name = row_name(*row)
        if name not in results and re.search(options.only, name):
            result = compile_row(*row)
            results = _read(options.json) | {name: result}  # another process may have written
            options.json.write_text(json.dumps(results, indent=1))
    print(table({row_name(*row): results.get(row_name(*row)) for row in ROWS}))


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def row_name(config: str, target: str, changes: dict) -> str:
    """small:v5e-16 v5e:4x4 microbatches=8, say."""
    changed = " ".join(f"{key.split('.')[1]}={value}" for key, value in changes.items())
    return f"{config.removeprefix('openwebtext_')} {target} {changed}".strip()


def compile_row(config: str, target: str, changes: dict) -> dict:
    """The estimate, and the program's float32 tables with a number for every logit: none, it is."""
    module, _, hardware = config.partition(":")
    config = importlib.import_module(f"sedd_jax.configs.{module}").get_config(hardware)
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    with tempfile.TemporaryDirectory() as folder:
        text_file = Path(folder) / "program.txt"
        try:
            estimate = dry_run(config, target, text_file=text_file)
        except ValueError as error:
            return {"error": str(error)}
        text = text_file.read_text() if text_file.exists() else ""
    rows = config.train.batch_size // config.train.microbatches
    positions = rows // (estimate.mesh["data"] * estimate.mesh["fsdp"]) * config.data.length
    result = estimate.to_dict()
    result.pop("parameters")
    tables = logit_tables(text, estimate.vocab_size, config.model.hidden_size, positions)
    return result | {"batch_size": config.train.batch_size, "tables": tables}


def logit_tables(text: str, vocab_size: int, hidden_size: int, positions: int) -> list[str]:
    """The float32 arrays of a program with a number for every token at every position.

    positions is how many one device has at a time; in any layout. A side may be padded, by at
    most 256. The embedding and the head, with hidden_size numbers for every token, are none:
    where positions is hidden_size they look the same, and none is reported.
    """

    def is_table(shape: str) -> bool:
        sides = [int(n) for n in shape.split(",")]
        others = [
            math.prod(sides) // side for side in sides if vocab_size <= side <= vocab_size + 256
        ]
        return any(n >= positions and n != hidden_size for n in others)

    shapes = set(re.findall(r"\bf32\[([\d,]+)\]", text))
    return sorted(f"f32[{shape}]" for shape in shapes if is_table(shape))


def table(rows: dict[str, dict | None]) -> str:
    """In markdown; a row that was not compiled says so."""
    lines = [f"| {' | '.join(HEADS)} |", "| --- |" + " ---: |" * (len(HEADS) - 1)]
    for name, e in rows.items():
        cells = [e["error"] if e else "not compiled"] if not e or "error" in e else _cells(e)
        lines.append(f"| {' | '.join([name, *cells])} |" + " |" * (len(HEADS) - 1 - len(cells)))
    return "\n".join(lines)


def _cells(e: dict) -> list[str]:
    state = e["parameter_bytes"] + e["ema_bytes"] + e["optimizer_bytes"]
    parts = e["mesh"]["data"] * e["mesh"]["fsdp"] * e["microbatches"]
    total = f"{e['total_bytes'] / GIB:.2f} of {e['memory_bytes'] / GIB:.2f}"
    return [
        str(e["devices"]),
        str(e["batch_size"] // parts),
        f"{state / GIB:.2f}",
        "" if e["temporary_bytes"] is None else f"{e['temporary_bytes'] / GIB:.2f}",
        total if e["fits"] else f"{total} (does not fit)",
        f"{e['flops'] / e['devices'] / 1e12:.2f}",
        f"{sum(one['bytes'] for one in e['collectives']) / 2**20:,.0f}",
        f"{e['compile_seconds']:.0f}",
        f"{e['step_seconds']:.3f}",
    ]


if __name__ == "__main__":
    main()
