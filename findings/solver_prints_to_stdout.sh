#!/usr/bin/env bash
# scipy 1.17.1 (HiGHS inside), seen 2026-12-01: integer programming writes to the process's standard output although it
# was told to be silent.
#
# Expected: nothing is printed. The documentation of scipy.optimize.milp: `disp` (default False), "Set to True if
# indicators of optimization status are to be printed to the console during optimization."
# Seen: with disp=False, some multiple-choice knapsacks of 120 groups (2 of 12) make the solver write lines such as
# "HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();" to file descriptor 1, past sys.stdout, so
# that contextlib.redirect_stdout does not hold them. A program that prints JSON is then no longer read by the next one;
# what is written to that descriptor has to be led elsewhere while the solver runs.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scipy==1.17.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import os
import tempfile

import numpy as np
import scipy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, identity, kron

GROUPS, CHOICES = 120, 20


def solve(seed):
    """One choice in each group, the least total damage within a budget."""
    draw = np.random.default_rng(seed)
    cost = np.sort(draw.random((GROUPS, CHOICES)), 1)
    damage = np.sort(draw.lognormal(0, 2, (GROUPS, CHOICES)), 1)[:, ::-1] * draw.lognormal(0, 2, (GROUPS, 1))
    one_each = LinearConstraint(kron(identity(GROUPS), np.ones((1, CHOICES))).tocsr(), 1, 1)
    budget = LinearConstraint(csr_matrix(cost.reshape(1, -1)), -np.inf, 0.25 * GROUPS)
    return milp(
        damage.ravel(), integrality=np.ones(GROUPS * CHOICES), bounds=Bounds(0, 1), constraints=[one_each, budget],
        options={"disp": False, "mip_rel_gap": 0.0},
    )


def printed(seed):
    """What reaches file descriptor 1 meanwhile."""
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()) as python:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            assert solve(seed).success
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        assert not python.getvalue()
        return file.read().decode()


found = {seed: text for seed in range(12) if (text := printed(seed))}
print(f"scipy {scipy.__version__}: {len(found)} of 12 problems printed: {sorted({t.splitlines()[0] for t in found.values()})}")
assert found and all("HighsMipSolverData" in text for text in found.values()), "the solver prints otherwise now"
PYTHON
