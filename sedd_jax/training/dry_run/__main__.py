"""The child of `dry_run`: a question as JSON on standard input, the answer on standard output.

A process of its own: the compilers for TPU and GPU read the environment when jax starts, and may
abort. Whatever else is written to standard output goes to standard error.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """{"config", "vocab_size", "target", "text_file"} to a measurement, or to {"error"}."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    from sedd_jax import config as configuration
    from sedd_jax.training.dry_run.measure import measure
    from sedd_jax.training.dry_run.targets import parse_target

    try:
        found = measure(
            configuration.from_json(json.dumps(asked["config"])),
            parse_target(asked["target"]),
            asked["vocab_size"],
            asked["text_file"] and Path(asked["text_file"]),
        )
    except ValueError as error:
        found = {"error": str(error)}
    with answer:
        json.dump(found, answer)


if __name__ == "__main__":
    main()
