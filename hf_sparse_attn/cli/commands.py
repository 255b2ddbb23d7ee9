"""`hf-sparse-attn`: its commands and what each takes. Tables go to stdout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from hf_sparse_attn import __version__
from hf_sparse_attn.cli.arguments import Parser, importing, list_of, logs_to_stderr, message_of, plain_where_needed
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.pretrained import NAMES
from hf_sparse_attn.shipped import SHIPPED

PROGRAM = "hf-sparse-attn"
T = TypeVar("T")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments without the program's name; None means those of the process.

    Returns:
        exit status: 0, 1 where a check of `doctor` or `docs` failed, 2 for an error of the user.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with logs_to_stderr(logging.DEBUG if "--debug" in argv else logging.INFO), plain_where_needed():
        try:
            args = _parsed(argv)
            with importing(args.imports or ()):
                status = int(args.run(args))
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            # The reader has what it wanted; what is left in the buffer must not fail at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if "--debug" in argv or not isinstance(error, _user_errors()):
                raise
            message = " ".join(message_of(error).split()) or type(error).__name__
            print(f"{PROGRAM}: error: {message}", file=sys.stderr)
            return 2


def _user_errors() -> tuple[type[Exception], ...]:
    """What is reported in one line; asked for only once something was raised, so that --help needs no torch."""
    from hf_sparse_attn.backend import BackendUnavailable
    from hf_sparse_attn.session import DenseFallback

    # A package that is missing is an ImportError, a training that diverged a FloatingPointError.
    return ValueError, TypeError, OSError, ImportError, FloatingPointError, BackendUnavailable, DenseFallback


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments; settings of a recipe may stand behind the options as well."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "train":
        # Behind an option argparse sees no positional that may be left out.
        if args.recipe is None and rest and not rest[0].startswith("-"):
            args.recipe = rest.pop(0)
        args.settings += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in args.settings]
    if rest:
        known = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
        options = [text.partition("=")[0] for text in rest if text.startswith("-")]
        said = nearest(options, known[args.command]._option_string_actions)
        parser.error(f"unrecognized arguments: {' '.join(rest)}{said}")
    return args


def _parser() -> Parser:
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    common.add_argument(
        "--import", action="append", dest="imports", default=None, metavar="MODULE",
        help="a module that registers methods of your own, imported first; may be given more than once",
    )  # fmt: skip
    common.add_argument("--debug", action="store_true", help="show tracebacks and debug logs")
    parser = Parser(prog=PROGRAM, description="Sparse attention for pretrained Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, **more: Any
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name, parents=[common], help=text, description=text, **more
        )
        made.set_defaults(run=run)
        return made

    demo = command(
        "demo",
        _printed("hf_sparse_attn.cli.demo"),
        "make the shipped tiny model sparse, method by method, and compare with dense",
    )
    demo.add_argument("--length", type=int, default=4096, metavar="N", help="bytes of the document that is read")
    demo.add_argument("--output", default="./hf_sparse_attn_demo", metavar="DIR", help="where pictures and JSON go")
    demo.add_argument("--threads", type=int, metavar="N", help="CPU threads; what torch chooses if not given")

    methods = command("methods", _methods, "list the sparse attention methods, or tell all about one")
    methods.add_argument("name", nargs="?", metavar="NAME", help="tell all about this one, and draw its pattern")
    methods.add_argument("--markdown", action="store_true", help="the tables, or the page, of the documents")

    coverage = command(
        "coverage",
        _noted("hf_sparse_attn.cli.coverage"),
        "list the model classes installed here, and which can be patched",
    )
    coverage.add_argument("--library", choices=("transformers", "diffusers", "all"), default="all", help="all")
    coverage.add_argument("--markdown", action="store_true", help="a page with counts and the list")
    coverage.add_argument("--output", metavar="DIR", help="write coverage.json and coverage.md there")

    doctor = command("doctor", _doctor, "what was found, which backends run here, and whether they are right")
    doctor.add_argument("--backends", type=list_of(str), metavar="A,B", help="try only these")

    bench = command(
        "bench",
        _noted("hf_sparse_attn.cli.bench"),
        "time sparse against dense attention and FlexAttention, in one process",
    )
    bench.add_argument(
        "--suite",
        default="quick",
        help="kernels, patterns, layers, decode (steps of generated text), gpu (all that is promised of one), or "
        "quick: a little of the first three",
    )
    bench.add_argument("--tokens", type=list_of(int), metavar="N,N", help="8192,32768; quick: 4096")
    bench.add_argument("--dims", type=list_of(int), metavar="N,N", help="head sizes: 64,128; quick: 64")
    bench.add_argument("--dtypes", type=list_of(str), metavar="T,T", help="float32,bfloat16; quick: float32")
    bench.add_argument("--densities", type=list_of(float), metavar="X,X", help="0.0625,0.125,0.25; quick: 0.125")
    bench.add_argument("--heads", type=int, metavar="N", help="8")
    bench.add_argument("--block", type=int, metavar="N", help="tokens in a block: 128")
    bench.add_argument("--causal", action=argparse.BooleanOptionalAction, help="kernels under a causal mask; off")
    bench.add_argument("--backward", action=argparse.BooleanOptionalAction, help="kernels with their backward; off")
    bench.add_argument("--backends", type=list_of(str), metavar="A,B", help="all but torch_reference")
    bench.add_argument(
        "--min-tokens",
        type=lambda text: int(text) if text.isdigit() else text,
        metavar="N|auto",
        help="layers: fewest keys for sparse attention; auto: where the dispatcher chooses; 0",
    )
    bench.add_argument("--repeats", type=int, metavar="N", help="rounds over the contestants: 5; quick: 3")
    bench.add_argument(
        "--seconds", type=float, metavar="S", help="no further round after this long and two rounds: 60"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads; what torch chooses if not given")
    bench.add_argument("--device", help="cuda where there is one, else cpu")
    bench.add_argument(
        "--model", metavar="NAME", help="decode: folder or Hub id; SmolLM2 if installed, else a tiny one"
    )
    bench.add_argument("--gguf", metavar="FILE", help="decode: the model for OpenVINO GenAI and llama.cpp")
    bench.add_argument("--output", metavar="DIR", help="write bench.json, bench.md and speedup.png there")
    bench.add_argument(
        "--calibrate",
        action="store_true",
        help="measure what attention costs on this device, and let min_tokens='auto' decide by that from now on",
    )

    run = _printed("hf_sparse_attn.cli.profile", _width)
    profiled = command("profile", run, "find out which method each head tolerates, and choose within a budget")
    profiled.add_argument(
        "model", help=f"folder or Hub id of a model or pipeline, a GGUF file, or {', '.join(SHIPPED)}"
    )
    profiled.add_argument("--data", metavar="FILE", help="text to calibrate on; for a pipeline one prompt per line")
    profiled.add_argument("--images", metavar="DIR", help="pictures to calibrate on, for a model of images")
    profiled.add_argument("--audio", metavar="DIR", help="WAV files to calibrate on, for a model of speech")
    profiled.add_argument(
        "--length", type=list_of(int), metavar="N,N", help="tokens of a text: 4096, or all positions of the model"
    )
    profiled.add_argument("--size", type=int, metavar="N", help="side of an image in pixels: as the model has it")
    profiled.add_argument(
        "--batches", type=int, default=4, metavar="N", help="texts of each length, images, recordings or prompts: 4"
    )
    profiled.add_argument(
        "--held-out", type=int, default=0, metavar="N", help="more such inputs, to run the finished profile on: 0"
    )
    profiled.add_argument("--part", metavar="NAME", help="the part of a model to profile: encoder, vision_model")
    profiled.add_argument("--budget", type=float, default=0.25, metavar="X", help="share of the dense cost: 0.25")
    profiled.add_argument(
        "--qualities",
        action="store_true",
        help="budgets 1/2, 1/4 and 1/8 at once, in the folders high, balanced and fast of DIR",
    )
    profiled.add_argument(
        "--per", choices=("density", "time"), default="density", help="what the budget counts: density"
    )
    profiled.add_argument("--metric", help="what damage is, as hsa.profile takes it; its default if not given")
    profiled.add_argument("--candidates", metavar="FILE", help='JSON: [{"method": "svg", "params": {...}}, ...]')
    profiled.add_argument("--passes", type=int, default=1, help="2: measure again with the choice in force")
    profiled.add_argument(
        "--steps",
        type=list_of(float),
        metavar="X,X",
        help="edges of step ranges that get choices of their own: 0.3 or 0.2,0.6",
    )
    profiled.add_argument(
        "--call", metavar="JSON", help='arguments of the pipeline: {"num_frames": 81, "height": 480}'
    )
    profiled.add_argument(
        "--query-blocks", type=int, metavar="N", help="runs of 128 queries measured per call; automatic"
    )
    profiled.add_argument("--max-plans-per-layer", type=int, metavar="N", help="most distinct methods in a layer")
    profiled.add_argument("--same-in-group", action="store_true", help="one method for the heads of a key/value head")
    profiled.add_argument("--state", metavar="FILE", help="keep what was measured here, and go on from it")
    profiled.add_argument("--device", help="cuda where there is one, else cpu")
    profiled.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16: auto")
    profiled.add_argument("--seed", type=int, default=0, help="0")
    profiled.add_argument("--output", required=True, metavar="DIR", help="where the profile goes")

    run = _printed("hf_sparse_attn.evaluation.run")
    evaluate = command("eval", run, "all methods at equal density on a model, against the dense one input by input")
    evaluate.add_argument(
        "name", nargs="?", metavar="MODEL",
        help="folder or Hub id of a model or pipeline, a GGUF file; or language, video or all of ours: all; "
        f"with the extra real also {', '.join(NAMES)}",
    )  # fmt: skip
    evaluate.add_argument("--model", metavar="MODEL", help="the same")
    evaluate.add_argument("--texts", nargs="+", metavar="FILE", help="for models of text: the standard library")
    evaluate.add_argument("--images", nargs="+", metavar="FILE", help="for models of images: files, or a folder")
    evaluate.add_argument("--audio", nargs="+", metavar="FILE", help="for models of speech: WAV files, or a folder")
    evaluate.add_argument("--prompts", metavar="FILE", help="for pipelines: one on each line; a few of our own")
    evaluate.add_argument("--inputs", type=int, metavar="N", help="texts, images, ... to score: 4; of whisper 10")
    evaluate.add_argument("--methods", type=list_of(str), metavar="A,B", help="all whose density can be set")
    evaluate.add_argument("--densities", type=list_of(float), metavar="X,X", help="0.0625,0.125,0.25")
    evaluate.add_argument("--profile", metavar="DIR", help="score this head profile in place of a mix made for it")
    evaluate.add_argument("--no-profile", action="store_true", help="without the mix that the profiler chooses")
    evaluate.add_argument(
        "--tokens", "--length", type=int, metavar="N", help="of a text: 4096, or all positions of the model"
    )
    evaluate.add_argument("--size", type=int, metavar="N", help="side of an image in pixels: as the model has it")
    evaluate.add_argument("--part", metavar="NAME", help="the part of a model to make sparse: encoder, vision_model")
    evaluate.add_argument("--call", metavar="JSON", help='arguments of a pipeline: {"num_frames": 81}')
    evaluate.add_argument("--documents", type=int, default=6, metavar="N", help="language: documents to read: 6")
    evaluate.add_argument("--clips", type=int, default=4, metavar="N", help="video: clips to sample: 4")
    evaluate.add_argument("--threads", type=int, metavar="N", help="CPU threads; what torch chooses if not given")
    evaluate.add_argument("--device", help="cuda where there is one, else cpu")
    evaluate.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16: auto")
    evaluate.add_argument("--seed", type=int, default=0, help="of the noise of a pipeline: 0")
    evaluate.add_argument("--output", metavar="DIR", help="write eval.json, eval.md and pictures there")

    run = _printed("hf_sparse_attn.cli.sample", _width)
    sampled = command("sample", run, "make a clip with sparse attention, alone or beside the dense one")
    sampled.add_argument("model", help="moving_wan, or the folder or Hub id of a pipeline that makes videos")
    sampled.add_argument("--method", metavar="NAME", help="a method, or the folder or Hub id of a profile")
    sampled.add_argument("--density", type=float, metavar="X", help="share of the pairs to keep; moving_wan: 0.25")
    sampled.add_argument(
        "--set", action="append", metavar="PARAM=VALUE", help="a parameter of the method; may be given more than once"
    )
    sampled.add_argument("--quality", metavar="WORD", help="parameters of the method: high, balanced or fast")
    sampled.add_argument("--compare", action="store_true", help="the dense clip beside it, and how near it comes")
    sampled.add_argument("--prompt", metavar="TEXT", help='what to show; moving_wan: "red disc down-left"')
    sampled.add_argument("--steps", type=int, metavar="N", help="denoising steps; moving_wan: 8")
    sampled.add_argument("--call", metavar="JSON", help='arguments of the pipeline: {"num_frames": 81, "height": 480}')
    sampled.add_argument("--seed", type=int, default=0, help="0")
    sampled.add_argument("--frames-per-second", type=int, default=8, metavar="N", help="of the film: 8")
    sampled.add_argument("--threads", type=int, metavar="N", help="CPU threads; what torch chooses if not given")
    sampled.add_argument("--device", help="cuda where there is one, else cpu")
    sampled.add_argument("--dtype", default="auto", help="of a pipeline: auto, float32, bfloat16 or float16: auto")
    sampled.add_argument("--output", metavar="FILE", help=".mp4 or .gif; moving_wan_radial.mp4, say, if not given")

    text = "adapt a model by a recipe: LoRA, gates or distillation, with sparse attention"
    train = command("train", _train, text, add_help=False)
    train.add_argument("-h", "--help", action="store_true", help="this help; after a recipe, its keys")
    train.set_defaults(usage=train.format_help)
    train.add_argument("recipe", nargs="?", help="a YAML file, or one that comes with the package; none lists those")
    train.add_argument("settings", nargs="*", metavar="key=value", help="in place of the file's: optimizer.beta1=0.9")
    train.add_argument("--output", metavar="DIR", help="folder for log, checkpoints and the result")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")

    report = command(
        "report", _noted("hf_sparse_attn.profiling.view.page"), "show a head profile: tables, and a page with pictures"
    )
    report.add_argument("profile", metavar="PROFILE", help="the folder of a profile, or its id on the Hub")
    report.add_argument("--output", metavar="DIR", help="write report.html, its pictures and report.json there")
    report.add_argument("--worst", type=int, default=10, metavar="N", help="heads in the table of the worst: 10")

    docs = command("docs", _docs, "write the pages of the documents from the code and the files of measured figures")
    docs.add_argument("--output", default=".github/docs", metavar="DIR", help="folder of the pages: .github/docs")
    docs.add_argument("--check", action="store_true", help="write nothing; name the pages that are not current")
    return parser


def _printed(module: str, *more: Callable[[], int]) -> Callable[[argparse.Namespace], int]:
    """A command that prints what a module's `main` gives; imported once it is run, so that --help needs no torch."""

    def run(args: argparse.Namespace) -> int:
        print(import_module(module).main(args, *(value() for value in more)))
        return 0

    return run


def _noted(module: str) -> Callable[[argparse.Namespace], int]:
    """The same of a module whose `main` gives besides what was written, which goes to stderr."""

    def run(args: argparse.Namespace) -> int:
        text, notes = import_module(module).main(args, _width())
        print(text)
        for note in notes:
            print(note, file=sys.stderr)
        return 0

    return run


def _methods(args: argparse.Namespace) -> int:
    from hf_sparse_attn.cli import methods

    print(methods.main(args, _width(), _terminal()))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from hf_sparse_attn.cli import doctor

    found = doctor.examine(args.backends)
    _show(args, found, lambda: doctor.render(found, _width()))
    return 0 if found["ok"] else 1


def _train(args: argparse.Namespace) -> int:
    if args.help:
        from hf_sparse_attn.cli import recipe_help

        if args.recipe is None:
            print(args.usage(), end="")
            return 0
        found = recipe_help.keys_of(args.recipe, args.settings)
        return _show(args, found, lambda: recipe_help.render(found, _terminal()))
    from hf_sparse_attn.cli import train as train_command

    return train_command.main(args, _width())


def _docs(args: argparse.Namespace) -> int:
    from hf_sparse_attn.documents import pages
    from hf_sparse_attn.sharing.files import make_folder

    if not args.check:
        make_folder(args.output)
    wanted = pages.pages(Path(args.output), _parser())
    changed = [str(path) for path in (pages.stale if args.check else pages.write)(wanted)]
    key, did = ("stale", "not current:") if args.check else ("written", "wrote")
    _show(args, {key: changed}, lambda: "\n".join(f"{did} {path}" for path in changed) or "all current")
    return 1 if args.check and changed else 0


def _show(args: argparse.Namespace, document: dict[str, Any], text: Callable[[], str]) -> int:
    """Prints the document with --json, else the text."""
    print(json.dumps(document, indent=2, default=str) if args.json else text())
    return 0


def _terminal() -> int:
    """Columns of the terminal, for text."""
    return min(140, max(40, shutil.get_terminal_size((100, 24)).columns))


def _width() -> int:
    """Columns of the terminal, at least 100; tables narrower than that break every word."""
    return max(100, shutil.get_terminal_size((140, 24)).columns)
