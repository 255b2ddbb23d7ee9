"""The page of a head profile, its pictures and its figures, as files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.view.curves import attention_picture, pareto_picture
from hf_sparse_attn.profiling.view.page import page
from hf_sparse_attn.profiling.view.plots import Picture, figure_map, method_map
from hf_sparse_attn.profiling.view.report import render, summary, words

PAGE = "report.html"
_MOST_PLANS = 12


def write(profile: HeadProfile, folder: Path | str, worst: int = 10) -> list[Path]:
    """Writes the page (one file that needs no other), its pictures as PNG, and `report.json`.

    Args:
        profile: the profile; without measurements the page says which parts need them.
        folder: made if it is not there.
        worst: heads in the table.

    Returns:
        the files, the page first.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    document = summary(profile, worst)
    drawn = pictures(profile)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {PAGE: page(profile, document, drawn).encode(), **{f"{p.name}.png": p.png for p in drawn}}
    files["report.json"] = (json.dumps(document, indent=2) + "\n").encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def main(args: argparse.Namespace, width: int) -> tuple[str, list[str]]:
    """`hf-sparse-attn report`: what to print, and a line about each file.

    Args:
        args: profile (folder or Hub id), output (folder or None), worst (int), json (bool).
        width: of the terminal.
    """
    profile = HeadProfile.from_pretrained(args.profile)
    files = [] if args.output is None else write(profile, args.output, args.worst)
    document = summary(profile, args.worst)
    text = json.dumps({**document, "files": list(map(str, files))}, indent=2) if args.json else render(document, width)
    return text, [f"wrote {file}" for file in files]


def pictures(profile: HeadProfile) -> list[Picture]:
    """All pictures there is data for.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra("the page", "matplotlib", "report") from error

    drawn = []
    for at, plan in enumerate(profile.plans[:_MOST_PLANS]):
        many = len(profile.plans) > 1
        name, where = (f"_{at}", f", steps {plan.steps[0]:g} to {plan.steps[1]:g}") if many else ("", "")
        drawn.append(method_map(profile, plan.choice, f"methods{name}", f"Method of each head{where}"))
        for figure in ("density", "damage"):
            if figure in profile.figures and not np.isnan(profile.figures[figure][at]).all():
                title = f"{words(figure).capitalize()} of each head{where}"
                drawn.append(figure_map(profile, figure, at, f"{figure}{name}", title))
    drawn += [p for p in (pareto_picture(profile), attention_picture(profile)) if p is not None]
    return drawn
