"""`hf-sparse-attn bench`: times sparse attention, or measures what attention costs on a device."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_sparse_attn.bench import calibrate, harness, plot
from hf_sparse_attn.bench.options import Options, make_options
from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.cost.timing import threads
from hf_sparse_attn.sharing.files import make_folder

# What is no option of the benchmark itself.
_APART = ("run", "command", "imports", "json", "debug", "output", "calibrate")


def main(args: argparse.Namespace, width: int) -> tuple[str, list[str]]:
    """What to print, and what was written.

    Args:
        args: as the command line gives them.
        width: columns of the tables.

    Raises:
        ValueError, OSError: an option out of its range, or a folder that cannot be made.
    """
    if args.calibrate:
        return _calibrate(args, width)
    given = {name: value for name, value in vars(args).items() if name not in _APART and value is not None}
    options = make_options(**given)
    if args.output is not None:
        # A folder that cannot be made must not cost a result of many minutes.
        make_folder(args.output)
    result = harness.run(options)
    # Files before tables, for a reader that has gone.
    notes = [] if args.output is None else plot.write(result, args.output)
    return json.dumps(result, indent=2, default=str) if args.json else plot.render(result, width), notes


def _calibrate(args: argparse.Namespace, width: int) -> tuple[str, list[str]]:
    own = ("suite", "threads", "device", *_APART)
    other = [f"--{name}" for name, value in vars(args).items() if name not in own and value is not None]
    if other:
        raise ValueError(f"--calibrate takes only --threads, --device, --output and --json, got {', '.join(other)}")
    device = Options(threads=args.threads, device=args.device).where
    # With --output for the package or another machine, else for this user.
    path = cost.user_file(device) if args.output is None else Path(args.output) / cost.file_name(device)
    make_folder(path.parent)
    with threads(args.threads):
        found = calibrate.measure(device)
    calibrate.write(found, path)
    shown = json.dumps(found, indent=2, default=str) if args.json else calibrate.render(found, width)
    return shown, [f"wrote {path}"]
