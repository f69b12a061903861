"""`python -m training.release --checkpoint F --output F`: from a training checkpoint to the file that is served.

The file has weights in half precision, no optimizer state, and the defaults that requests are answered with. Choose
those that the evaluation supports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rdt_core import checkpoint
from rdt_core.checkpoint import CheckpointError
from rdt_core.config import HALTINGS, REQUEST_DEFAULTS
from training.files import make_folder
from training.optimise import average_note
from training.options import name_given, path_named
from training.stopping import command


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rdt-release", description="Write the weights alone, in half precision.")
    parser.add_argument("--checkpoint", required=True, type=path_named, help="of a training run")
    parser.add_argument("--output", required=True, type=path_named, help="the file to write")
    parser.add_argument("--name", type=name_given, help="what the model is called (default: the run's name)")
    parser.add_argument("--halting", choices=HALTINGS, help="default of halting (default: the checkpoint's)")
    parser.add_argument("--max_steps", "--max-steps", type=int, help="default of max_steps (default: the checkpoint's)")
    parser.add_argument("--threshold", type=float, help="default of threshold (default: the checkpoint's)")
    options = parser.parse_args(arguments)
    defaults = {name: value for name in REQUEST_DEFAULTS if (value := getattr(options, name)) is not None}
    try:
        make_folder(options.output.parent, "the folder of --output")
        checkpoint.export_release(options.checkpoint, options.output, name=options.name, defaults=defaults)
        released = checkpoint.load(options.output)
        note = average_note(checkpoint.read(options.checkpoint))
    except (CheckpointError, ValueError, OSError) as error:
        print(f"rdt-release: {error}", file=sys.stderr)
        return 2
    size = options.output.stat().st_size / 1e6
    print(f"{options.output}: {released.name}@{released.digest[:12]}, {size:.1f} MB{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
