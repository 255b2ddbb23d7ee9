"""Breaks a guard, runs the tests that should notice, and tells which guards nobody misses.

    python tests/mutants.py [--only NAME] [--jobs N]

Each mutant changes one text in a copy of the tree. It is killed when the tests then fail, and survives when they pass.
Ends with 1 where a mutant survives, its text is not found once, or the tests fail without any change.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)
from tests.support.processes import Server  # noqa: E402  (found from the root alone)

GUARDS = "tests/core/test_guards.py"
BUDGET = "tests/profiling/test_budget.py"
COST = "tests/cost/test_cost.py"
DECIDED = "tests/core/test_decision.py"
READERS = "tests/profiles/test_published_readers.py tests/profiles/test_published_profiles.py"
REACHED, REMOVED = "tests/training/test_lora_reach.py", "tests/training/test_bundle_removal.py"
EXPRESSIONS, MOVING = "tests/training/test_lora_pattern.py", "tests/training/test_moving_pictures.py"
ON_DISK, RAGGED = "tests/sharing/test_files.py", "tests/methods/test_vsa_ragged.py"


class Mutant(NamedTuple):
    """One change of one file, and the files of tests one of which must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str = GUARDS


POLICY, METHOD, DISPATCH = "hf_sparse_attn/policy.py", "hf_sparse_attn/method.py", "hf_sparse_attn/dispatch.py"
BACKEND = "hf_sparse_attn/backend.py"
REGISTRY, CHOICE = "hf_sparse_attn/registry.py", "hf_sparse_attn/profiling/budget.py"
JUDGE, DECISION = "hf_sparse_attn/cost/judge.py", "hf_sparse_attn/decision.py"
LOOP, CLOCK = "hf_sparse_attn/hosts/diffusers_loop.py", "hf_sparse_attn/hosts/diffusers_clock.py"
STEPS = "tests/hosts/test_diffusers_steps.py"
SESSION, RULES = "hf_sparse_attn/session.py", "hf_sparse_attn/hosts/transformers_rules.py"
HOOK, PADDING = "hf_sparse_attn/hosts/sdpa_hook.py", "hf_sparse_attn/hosts/padding.py"
CHANGED, PADDED = "tests/hosts/test_changes.py", "tests/hosts/test_padding.py"
PUBLISHED, TILES = "hf_sparse_attn/profiles/published.py", "hf_sparse_attn/pattern/video_tiles.py"
REACH, ADAPTER = "hf_sparse_attn/training/lora/reach.py", "hf_sparse_attn/training/lora/adapter.py"
BUNDLE, PATTERN = "hf_sparse_attn/training/bundle/bundle.py", "hf_sparse_attn/training/lora/pattern.py"
FILES, LOCKS = "hf_sparse_attn/sharing/files.py", "hf_sparse_attn/training/files.py"
CLIPS, LATENTS = "hf_sparse_attn/training/video/source.py", "hf_sparse_attn/training/video/latents.py"

MUTANTS = [
    Mutant(
        "modes, none",
        HOOK,
        "for mode in torch.overrides._get_current_function_mode_stack():",
        "for mode in ():",
        CHANGED,
    ),
    Mutant("modes, those of torch too", HOOK, ' and kind.__module__.partition(".")[0] != "torch"', "", CHANGED),
    Mutant("replaced function, unseen", HOOK, "if now is SDPA:", "if True:", CHANGED),
    Mutant(
        "scoped classes, not found",
        HOOK,
        "return other is cls or other is cls.__base__",
        "return other is cls",
        CHANGED,
    ),
    Mutant("replaced implementation, unseen", RULES, "if _BY_TRANSFORMERS.fullmatch(name):", "if False:", CHANGED),
    Mutant("ring attention, unseen", RULES, "if is_context_parallel():", "if False:", CHANGED),
    Mutant("masks, any weight", PADDING, "(visible | (below <= _HIDDEN)).all()", "visible.any()", PADDED),
    Mutant("masks, learnt", PADDING, "mask.requires_grad or not bool", "not bool", PADDED),
    Mutant("masks, one constant", PADDING, "(least == most) & (least > _NOTHING)", "least > most", PADDED),
    Mutant("masks, by query", PADDING, "if bool(alike.all()):", "if True:", PADDED),
    Mutant("masks, groups that overlap", PADDING, "((visible != same) & seen", "((visible & ~visible) & seen", PADDED),
    Mutant("masks, many groups", PADDING, "if len(names) > _MOST_GROUPS:", "if False:", PADDED),
    Mutant("queries, one more", POLICY, "ctx.layout.q_len < self.min_queries", "ctx.layout.q_len <= self.min_queries"),
    Mutant("queries, one fewer by default", POLICY, "min_queries: int = 16", "min_queries: int = 15"),
    Mutant("queries, never", POLICY, "if ctx.layout.q_len < self.min_queries:", "if False:"),
    Mutant("keys, one more", POLICY, "ctx.layout.kv_len < fewest:", "ctx.layout.kv_len <= fewest:"),
    Mutant("keys, never by the table", POLICY, "fewest = fewest_keys(ctx, device)", "fewest = 0"),
    Mutant("layers, one more", POLICY, "ctx.layer < layers if", "ctx.layer <= layers if"),
    Mutant("layers, the others", POLICY, "else ctx.layer in layers", "else ctx.layer not in layers"),
    Mutant("layers, negative", POLICY, "or n < 0 for n in numbers", "or n < -1 for n in numbers"),
    Mutant("layers, truth values", POLICY, "isinstance(n, bool) or not isinstance(n, int)", "not isinstance(n, int)"),
    Mutant("steps, one more at the start", POLICY, "ctx.step < start", "ctx.step <= start"),
    Mutant("steps, one fewer at the end", POLICY, "ctx.step >= ctx.num_steps - end", "ctx.step > ctx.num_steps - end"),
    Mutant("steps, rounding of floats", POLICY, "ctx.num_steps - 1e-9)", "ctx.num_steps)"),
    Mutant("steps, rounded down", POLICY, "math.ceil(share", "math.floor(share"),
    Mutant("steps, all of them", POLICY, "not 0 <= share <= 1", "not 0 <= share < 1"),
    Mutant("steps, three shares", POLICY, "if len(self.dense_steps) != 2:", "if len(self.dense_steps) < 2:"),
    Mutant("tokens, negative", POLICY, "or self.min_tokens < 0", "or self.min_tokens < -1"),
    Mutant(
        "tokens, truth values", POLICY, "isinstance(self.min_tokens, (bool, str))", "isinstance(self.min_tokens, str)"
    ),
    Mutant("needs, always causal", METHOD, '"causal": layout.is_causal', '"causal": True'),
    Mutant("needs, always bidirectional", METHOD, '"bidirectional": not layout.is_causal', '"bidirectional": True'),
    Mutant("needs, always a video", METHOD, '"video grid": layout.video_part is not None', '"video grid": True'),
    Mutant(
        "needs, not asked",
        METHOD,
        "if reason is not None:\n            return Decline(reason)",
        "if False:\n            pass",
    ),
    Mutant(
        "reads, what is there", METHOD, "getattr(ctx.inputs, name, None) is None]", "getattr(ctx.inputs, name, None)]"
    ),
    Mutant("reads, nothing", METHOD, "for name in sorted(self.reads) if", "for name in () if"),
    Mutant("parameters of a ready method", REGISTRY, "        if params:\n", "        if False:\n"),
    Mutant("unknown parameters", REGISTRY, "    if unknown:\n", "    if False:\n"),
    Mutant("axes", DISPATCH, "if t.ndim != 4:", "if t.ndim < 4:"),
    Mutant("whole numbers", DISPATCH, "if not t.is_floating_point():", "if False:"),
    Mutant("dtypes of arguments", DISPATCH, "if t.dtype != q.dtype or t.device", "if t.device"),
    Mutant("devices of arguments", DISPATCH, "or t.device != q.device:", ":"),
    Mutant("values of other tokens", DISPATCH, "if k.shape[:3] != v.shape[:3]:", "if k.shape[:2] != v.shape[:2]:"),
    Mutant("keys of another batch", DISPATCH, "if q.shape[0] != k.shape[0] or q", "if q"),
    Mutant("keys of another dim", DISPATCH, "or q.shape[3] != k.shape[3]:", ":"),
    Mutant("heads that do not divide", DISPATCH, "or q.shape[1] % k.shape[1]:", ":"),
    Mutant("no heads", DISPATCH, "if k.shape[1] == 0 or q", "if q"),
    Mutant("pattern of other lengths", DISPATCH, "    if want != got:\n", "    if want[0] != got[0]:\n"),
    Mutant("pattern of another batch", DISPATCH, "if size not in (1, limit):", "if size < 1:"),
    Mutant("dtypes of a call", DISPATCH, "if not q.dtype == k.dtype == v.dtype:", "if not q.dtype == k.dtype:"),
    Mutant("refused by name", BACKEND, "if reason is not None:\n            raise", "if False:\n            raise"),
    Mutant(
        "refused by auto",
        BACKEND,
        "if reason is None:\n            return name, found",
        "if True:\n            return name, found",
    ),
    Mutant("ranks", BACKEND, "key=lambda n: (ranks[n], n)", "key=lambda n: n, reverse=True"),
    Mutant("devices without a rank", BACKEND, "for n, rank in ranks.items() if rank is not None)", "for n in ranks)"),
    Mutant("gradients that are not recorded", DISPATCH, "torch.is_grad_enabled() and (q.req", "(q.req"),
    Mutant("gradients of values", DISPATCH, "or k.requires_grad or v.requires_grad)", "or k.requires_grad)"),
    Mutant("names of entries", REGISTRY, "or name != name.lower():", ":"),
    Mutant("taken names", REGISTRY, "and _origin(known) != _origin(entry):", "and False:"),
    Mutant(
        "unknown names",
        REGISTRY,
        "        if name not in self._entries:\n            lacking",
        "        if False:\n            lacking",
    ),
    Mutant(
        "methods that are none",
        REGISTRY,
        "if not (isinstance(entry, type) and issubclass(entry, Method)):",
        "if False:",
    ),
    Mutant("backends without attention", REGISTRY, 'in ("why_not", "attention"):', 'in ("why_not",):'),
    Mutant("families without install", REGISTRY, '("targets", "install", "tiny")', '("targets", "tiny")'),
    Mutant("broken files of ours", REGISTRY, 'or error.name.split(".")[0] == "hf_sparse_attn":', ":"),
    Mutant("broken files without a name", REGISTRY, "if error.name is None or error", "if error.name and error"),
    Mutant("dense beyond the floor", CHOICE, "    kept[:, 0] = True\n", "", BUDGET),
    Mutant("damage at the floor", CHOICE, "damage <= limit[:, :, None]", "damage < limit[:, :, None]", BUDGET),
    Mutant("negative floors", CHOICE, "np.isnan(limit).any() or (limit < 0).any()", "np.isnan(limit).any()", BUDGET),
    Mutant(
        "negative budgets", CHOICE, "np.isnan(limits).any() or (limits < 0).any()", "np.isnan(limits).any()", BUDGET
    ),
    Mutant(
        "negative damage", CHOICE, "np.isnan(values).any() or (values < 0).any()", "np.isnan(values).any()", BUDGET
    ),
    Mutant(
        "budgets below the least", CHOICE, "if (np.array(least) * units > problem.limit).any():", "if False:", BUDGET
    ),
    Mutant("time of 0 seconds", CHOICE, "if not time_limit > 0:", "if not time_limit >= 0:", BUDGET),
    Mutant("no plans in a layer", CHOICE, "np.integer)) or most < 1:", "np.integer)) or most < 0:", BUDGET),
    Mutant(
        "pays, without a margin",
        JUDGE,
        "self.sparse < cost.MARGIN * self.dense\n",
        "self.sparse < 9 * self.dense\n",
        COST,
    ),
    Mutant(
        "own time, not counted",
        JUDGE,
        "found.pays else Loss(OWN_TIME",
        "True else Loss(OWN_TIME",
        COST,
    ),
    Mutant("pauses, not heeded", DECISION, "    if session.paused:", "    if False:", DECIDED),
    Mutant("pauses, counted", DECISION, 'Decision("paused", counted=False)', 'Decision("paused")', DECIDED),
    Mutant(
        "shapes, without policy and method",
        DECISION,
        "decision = of_call(session, ctx, q.device)",
        "decision = SPARSE",
        DECIDED,
    ),
    Mutant(
        "the word of a method",
        DECISION,
        "return of_sequence(session, ctx, device) if word is None else Decision(word)",
        "return of_sequence(session, ctx, device)",
        DECIDED,
    ),
    Mutant(
        "bounds where sparse was asked for",
        DECISION,
        'if session.policy.min_tokens != "auto":\n        return SPARSE',
        "if False:\n        return SPARSE",
        DECIDED,
    ),
    Mutant("trials that are judged", DECISION, '"auto" and not record.on_trial', '"auto"', DECIDED),
    Mutant("not worth it, not asked before", DECISION, "if self.auto and not self.known:", "if False:", DECIDED),
    Mutant("not worth it, run all the same", DECISION, "if self.auto and not prediction.pays", "if False", DECIDED),
    Mutant(
        "worth it by prediction alone",
        DECISION,
        "if self.auto and not prediction.pays",
        "if not prediction.pays",
        DECIDED,
    ),
    Mutant("fallbacks, always", SESSION, "        if found.fallback:\n", "        if True:\n", DECIDED),
    Mutant("fallbacks, never", SESSION, "        if found.fallback:\n", "        if False:\n", DECIDED),
    Mutant("counted, always", SESSION, "        if found.counted:\n", "        if True:\n", DECIDED),
    Mutant("strict, not heeded", SESSION, "        if self.strict:\n", "        if False:\n", DECIDED),
    Mutant("one sequence that is not whole", SESSION, "spans[0].is_whole(q, k)", "True", DECIDED),
    Mutant("sequences, none sparse", SESSION, "if not any(results):", "if not all(results):", DECIDED),
    Mutant(
        "declined, run all the same", SESSION, "        if isinstance(done, Decline):", "        if False:", DECIDED
    ),
    Mutant(
        "watchers of trials",
        SESSION,
        "self.watcher is not None and not record.on_trial",
        "self.watcher is not None",
        DECIDED,
    ),
    Mutant("declined, no fallback", SESSION, "fallback=True), work)", "fallback=False), work)", DECIDED),
    Mutant(
        "windows of a layer", RULES, "reach > window and not plan.own", "reach >= window and not plan.own", DECIDED
    ),
    Mutant("loop, one that has ended", LOOP, "if loop.begin <= frame.f_lasti < loop.end", "if True", STEPS),
    Mutant("loop, over anything", LOOP, "if schedule.of_scheduler or library or owner is not None", "if True", STEPS),
    Mutant(
        "loop, a part of the schedule",
        LOOP,
        "start = 0 if number is None or number > place else place - number",
        "start = 0",
        STEPS,
    ),
    Mutant("loop, variables kept", LOOP, "found.clear()", "pass", STEPS),
    Mutant("loop, a user's copy of them", LOOP, "if code.snapshot and not library:", "if False:", STEPS),
    Mutant("steps, announced by the user", CLOCK, "if announced.step is not None:", "if False:", STEPS),
    Mutant("steps, first way alone", CLOCK, "now.way in (0, way)", "way < 0", STEPS),
    Mutant("steps, largest time", CLOCK, "time.double().mean()", "time.max()", STEPS),
    Mutant(
        "steps, a share of an unknown run",
        "hf_sparse_attn/hosts/diffusers_run.py",
        "self.needs_schedule and call.num_steps is None",
        "False",
        STEPS,
    ),
    Mutant(
        "steps, a guess not told",
        "hf_sparse_attn/hosts/diffusers_state.py",
        "self.session.notes.add(GUESSED)",
        "pass",
        STEPS,
    ),
    Mutant("published, gates as they are", PUBLISHED, "return gates.clip(0, 1)", "return gates", READERS),
    Mutant("published, gates that are none", PUBLISHED, "if np.isnan(gates).any():", "if False:", READERS),
    Mutant(
        "published, shares rounded",
        PUBLISHED,
        "math.ceil(share * (gates.size - 1) - 1e-9)",
        "round(share * gates.size)",
        READERS,
    ),
    Mutant("published, quantile alone", PUBLISHED, "return max(ranked, int(", "return min(ranked, int(", READERS),
    Mutant("published, heads beyond", PUBLISHED, "if beyond and not partial:", "if False:", READERS),
    Mutant("published, layers short", PUBLISHED, "(len(value) != found.layers and not partial)", "False", READERS),
    Mutant("fused, never", REACH, 'if not getattr(attention, "fused_projections", False) or', "if True or", REACHED),
    Mutant("fused, by the flag alone", REACH, "or not _asks_for_fused(attention):", "or False:", REACHED),
    Mutant("fused, later", REACH, "    if lost:\n", "    if False:\n", REACHED),
    Mutant("fused, merged or not", REACH, "(unfuses or not part.merged)", "True", REACHED),
    Mutant("fused, queries of text", REACH, '"to_kv" if getattr', '"to_qkv" if getattr', REACHED),
    Mutant("reached, not told", REACH, "        if self._missing:\n", "        if False:\n", REACHED),
    Mutant("reached, told of all", REACH, "self._missing.discard(name)", "None", REACHED),
    Mutant("merged, taken off", ADAPTER, "        if merged:\n", "        if False:\n", REACHED),
    Mutant(
        "bundle, half of it", BUNDLE, "for check in self._checks if self._undo else ():", "for check in ():", REMOVED
    ),
    Mutant(
        "expression, to peft",
        ADAPTER,
        '"|".join(map(re.escape, find_targets(self.model, settings)))',
        "settings.pattern",
        EXPRESSIONS,
    ),
    Mutant("expression, any depth", PATTERN, "and depth < _DEEPEST", "and True", EXPRESSIONS),
    Mutant("expression, any length", PATTERN, "if len(text) > _LONGEST:", "if False:", EXPRESSIONS),
    Mutant("expression, flags", PATTERN, "if parsed.state.flags & ~re.UNICODE:", "if False:", EXPRESSIONS),
    Mutant("expression, once more", PATTERN, "tries < most - least", "tries <= most - least", EXPRESSIONS),
    Mutant("expression, words", PATTERN, "(sides[0] != sides[1])", "(sides[0] == sides[1])", EXPRESSIONS),
    Mutant("files, never again", FILES, 'if sys.platform != "win32" or target.is_dir():', "if True:", ON_DISK),
    Mutant("files, again for folders", FILES, " or target.is_dir():", ":", ON_DISK),
    Mutant("files, again anywhere", FILES, 'sys.platform != "win32" or ', "", ON_DISK),
    Mutant("files, of all threads", FILES, "-{threading.get_ident()}", "", ON_DISK),
    Mutant("files, long names", FILES, "path.name[:_LONGEST]", "path.name", ON_DISK),
    Mutant("files, ends of lines", FILES, ', newline="\\n"', "", ON_DISK),
    Mutant("files, of nobody else", FILES, "made.mkdir()", "made.mkdir(0o700)", ON_DISK),
    Mutant("lock, at any place", LOCKS, "        file.seek(0)\n", "", ON_DISK),
    Mutant("lock, not let go", LOCKS, "        _lock(file, hold=False)\n", "", ON_DISK),
    Mutant(
        "lock, of a file that is gone",
        LOCKS,
        "if os.path.samestat(os.fstat(file.fileno()), path.stat()):",
        "if True:",
        ON_DISK,
    ),
    Mutant("lock, any error", LOCKS, "not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)", "not in ()", ON_DISK),
    Mutant("shards, of other drives", LATENTS, r'r"[^/\\:]+', r'r"[^/\\]+', ON_DISK),
    Mutant("pictures, at one rate", CLIPS, "(_shown if shown else _at_rate)", "_at_rate", MOVING),
    Mutant("pictures, against the captions", CLIPS, "shown = clip.fps is None and", "shown =", MOVING),
    Mutant("tiles, blocks of one length", TILES, "block // 2) if ragged else block", "block)", RAGGED),
    Mutant("tiles, always short blocks", TILES, "ragged = largest > int(counts[-1])", "ragged = True", RAGGED),
]


def copied(folder: Path) -> Path:
    """A copy of the files that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


class Job:
    """A copy of the tree, and a process to run tests in it without importing torch each time."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.server = copied(folder), Server()

    def passes(self, tests: str) -> bool:
        """Whether tests pass in the tree."""
        call = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests.split()]
        # No byte code: a file may change within the second in which it was read.
        code = f"import sys; sys.dont_write_bytecode = True; import pytest; sys.exit(pytest.main({call!r}))"
        return self.server.run(code, cwd=self.tree, OMP_NUM_THREADS="1").returncode == 0

    def fate(self, mutant: Mutant) -> str:
        """What becomes of a mutant; the tree is as before afterwards."""
        file = self.tree / mutant.file
        before = file.read_text() if file.exists() else ""
        if before.count(mutant.old) != 1:
            return f"text found {before.count(mutant.old)} times"
        file.write_text(before.replace(mutant.old, mutant.new))
        try:
            return "SURVIVED" if self.passes(mutant.tests) else "killed"
        finally:
            file.write_text(before)


def results(mutants: list[Mutant], jobs: int, folder: Path) -> Iterator[tuple[Mutant, str, float]]:
    """Mutants with their fates and seconds, in order."""
    free: Queue[Job] = Queue()
    for number in range(jobs):
        free.put(Job(folder / str(number)))
    for tests in sorted({mutant.tests for mutant in mutants}):
        job = free.get()
        if not job.passes(tests):
            sys.exit(f"{tests} fails without any change")
        free.put(job)

    def one(mutant: Mutant) -> tuple[Mutant, str, float]:
        job, begin = free.get(), time.monotonic()
        try:
            return mutant, job.fate(mutant), time.monotonic() - begin
        finally:
            free.put(job)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of those that run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if not chosen:
        parser.error(f"--only must be part of a name, got {options.only!r}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for mutant, what, seconds in results(chosen, options.jobs, Path(folder)):
            failed += what != "killed"
            print(f"{what:<10} {mutant.name:<36} {mutant.file:<40} {seconds:5.0f} s", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} killed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
