"""python -m sedd_jax.training.dry_run PROGRAM.hlo: where the time of a compiled step will go.

PROGRAM.hlo is the text of an optimized program, as `dry_run(..., text_file=...)` writes it. Beside
the tables of `sedd-train --dry_run` it prints the longest kernels.
"""

import argparse
import re
import signal
import sys
from collections import defaultdict
from pathlib import Path

from sedd_jax.parallel.devices import DEVICES
from sedd_jax.training.dry_run.costs import costs, describe_costs, part_and_phase, seconds
from sedd_jax.training.dry_run.hlo import parse
from sedd_jax.training.dry_run.kernels import Kernel, program_kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--device", default="NVIDIA H200", choices=DEVICES)
    parser.add_argument("--fraction", type=float, default=0.5, help="of positions that are masked")
    parser.add_argument("--rows", type=int, default=30, help="the longest kernels to print")
    options = parser.parse_args()
    if not options.program.is_file():
        parser.error(f"{str(options.program)!r} is not a file; dry_run(text_file=...) writes one")
    device = DEVICES[options.device]
    program = parse(options.program.read_text(encoding="utf-8"))
    kernels = program_kernels(program, options.fraction)
    print("\n".join(describe_costs(costs(kernels, device))))
    print(f"\n{'ms':>6}{'GB':>8}{'runs':>6}  kernel (kind, part, phase) result")
    alike: dict[tuple, list[Kernel]] = defaultdict(list)  # as those of unrolled blocks
    for one in kernels:
        name = re.sub(r"[.\d]+$", "", one.name)
        alike[name, one.kind, *part_and_phase(one), one.shape].append(one)
    rows = [
        (
            sum(seconds(one, device) for one in same),
            sum(one.runs * one.bytes for one in same),
            sum(one.runs for one in same),
            *key,
        )
        for key, same in alike.items()
    ]
    for time, moved, runs, name, *what, shape in sorted(rows, reverse=True)[: options.rows]:
        print(
            f"{1e3 * time:6.2f}{moved / 1e9:8.2f}{runs:6.0f}  {name} ({', '.join(what)}) "
            f"{re.sub(r'{[^}]*}', '', shape)[:80]}"
        )
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ... | head ends it without a word
    sys.exit(main())
