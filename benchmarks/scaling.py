"""How memory, operations and traffic of a train step grow with devices, batch, length and depth.

Compiles each row's program ahead of time for its target (sedd_jax.training.dry_run; no accelerator) and
prints a table in markdown. --json keeps the numbers; rows that it has already are not compiled
again, so the program may be stopped and run on.

    python benchmarks/scaling.py --json=scaling.json [--only=v5e]
"""

import argparse
import importlib
import json
import math
import re
import tempfile
from pathlib import Path

from sedd_jax.training.dry_run import dry_run

GIB = 2**30
SMALL, MEDIUM = "openwebtext_small", "openwebtext_medium"
BY_16 = {"mesh.data": 16, "train.microbatches": 16}
# (config, target, changes): batch 512 unless said, as in the paper. After the colon of a config is
# its row of HARDWARE in configs/base.py.
ROWS = (
    # What the paper trained, on each machine.
    (f"{SMALL}:v5e-16", "v5e:4x4", {}),
    (f"{MEDIUM}:v5e-16", "v5e:4x4", {}),
    (f"{SMALL}:v5e-64", "v5e:8x8", {}),
    (f"{MEDIUM}:v5e-64", "v5e:8x8", {}),
    (f"{SMALL}:v5e-256", "v5e:16x16", {}),
    (f"{MEDIUM}:v5e-256", "v5e:16x16", {}),
    (SMALL, "v5e:16x16*2", {}),
    (MEDIUM, "v5e:16x16*2", {"mesh.fsdp": 4}),
    (SMALL, "v5p:4x8x8", {}),
    (MEDIUM, "v5p:4x8x8", {}),
    (f"{SMALL}:a100x8", "a100:8", {}),
    (f"{MEDIUM}:a100x8", "a100:8", {}),
    (f"{SMALL}:a100x16", "a100:16", {}),
    (f"{MEDIUM}:a100x16", "a100:16", {}),
    (f"{SMALL}:h100x8", "h100:8", {}),
    (f"{MEDIUM}:h100x8", "h100:8", {}),
    (f"{SMALL}:v4-64", "v4:2x4x4", {}),
    (f"{MEDIUM}:v4-64", "v4:2x4x4", {}),
    (f"{SMALL}:v5p-64", "v5p:2x4x4", {}),
    (f"{MEDIUM}:v5p-64", "v5p:2x4x4", {}),
    (f"{SMALL}:v6e-64", "v6e:8x8", {}),
    (f"{MEDIUM}:v6e-64", "v6e:8x8", {}),
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
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    for config, target, changes in ROWS:
        name = row_name(config, target, changes)
        if name not in found and re.search(options.only, name):
            result = compile_row(config, target, changes)
            # Another process may have written meanwhile.
            found = json.loads(options.json.read_text()) if options.json.exists() else {}
            found[name] = result
            options.json.write_text(json.dumps(found, indent=1))
    print(table({row_name(*row): found.get(row_name(*row)) for row in ROWS}))


def row_name(config: str, target: str, changes: dict) -> str:
    """small:v5e-16 v5e:4x4 microbatches=8, say."""
    told = " ".join(f"{key.split('.')[1]}={value}" for key, value in changes.items())
    return f"{config.removeprefix('openwebtext_')} {target} {told}".strip()


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
    found = estimate.to_dict()
    found.pop("parameters")
    tables = logit_tables(text, estimate.vocab_size, config.model.hidden_size, positions)
    return found | {"batch_size": config.train.batch_size, "tables": tables}


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
    heads = (
        "program",
        "chips",
        "rows a chip",
        "state GiB",
        "temporaries GiB",
        "total of GiB",
        "TFLOP a chip",
        "MiB sent a chip",
        "compiled s",
        "step s at 40 %",
    )
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, e in rows.items():
        if e is None or "error" in e:
            lines.append(f"| {name} | {'not compiled' if e is None else e['error']} |" + " |" * 8)
            continue
        state = e["parameter_bytes"] + e["ema_bytes"] + e["optimizer_bytes"]
        held = "" if e["temporary_bytes"] is None else f"{e['temporary_bytes'] / GIB:.2f}"
        sent = sum(one["bytes"] for one in e["collectives"]) / 2**20
        fits = "" if e["fits"] else " (does not fit)"
        seconds = e["step_seconds"]
        parts = e["mesh"]["data"] * e["mesh"]["fsdp"] * e["microbatches"]
        lines.append(
            f"| {name} | {e['devices']} | {e['batch_size'] // parts} | {state / GIB:.2f} | {held} "
            f"| {e['total_bytes'] / GIB:.2f} of {e['memory_bytes'] / GIB:.2f}{fits} "
            f"| {e['flops'] / e['devices'] / 1e12:.2f} | {sent:,.0f} "
            f"| {e['compile_seconds']:.0f} | {seconds:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
