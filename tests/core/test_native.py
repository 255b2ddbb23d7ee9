"""Methods as attention implementations of transformers by name, and what importing the package does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import native
from hf_sparse_attn.method import Method
from hf_sparse_attn.registry import METHODS
from tests.support.processes import run_code
from tests.support.tiny_lm import FAMILIES, padded, tiny_vl, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

native.install()


def python(code: str) -> str:
    """What an interpreter prints that has imported torch and nothing else."""
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


# ------------------------------------------------------------------ import

INSTALL = "from hf_sparse_attn.native import install; install()"
NAMES = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
want = {"hsa:" + n for n in hf_sparse_attn.list_methods()}
assert want <= set(functions.valid_keys()), functions.valid_keys()
assert want <= set(masks.valid_keys())
assert want, "no methods"
assert not [f for f in sys.meta_path if type(f).__module__.startswith("hf_sparse_attn")]
import transformers.modeling_utils as m, inspect
assert not type(m.__loader__).__module__.startswith("hf_sparse_attn")
assert "class PreTrainedModel" in inspect.getsource(m)
print("done")
"""


HEAVY = "('transformers', 'diffusers', 'peft', 'matplotlib')"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "between", "after"])
def test_names_exist_whenever_transformers_is_imported(order):
    ours = f"import hf_sparse_attn; {INSTALL}"
    code = {
        "before": f"import transformers.modeling_utils; {ours}",
        # `import transformers` alone loads no model file: the package is there, the awaited module is not.
        "between": f"import transformers; {ours}",
        # Installing twice and only asking where the module is must not use up the watch.
        "after": f"{ours}; install(); heavy = [m for m in {HEAVY} if m in sys.modules]; assert not heavy, heavy\n"
        "import importlib.util; importlib.util.find_spec('transformers.modeling_utils')\n"
        "from transformers import LlamaForCausalLM",
    }[order]
    assert python(f"import sys; {code}\n{NAMES}") == "done"


def test_broken_method_file_does_not_break_transformers():
    code = f"""
import hf_sparse_attn; {INSTALL}
from hf_sparse_attn.registry import METHODS
def fail(): raise RuntimeError("broken file")
METHODS.names = fail
import transformers.modeling_utils
print("done")
"""
    assert python(code) == "done"


# ------------------------------------------------------------------ forward


@pytest.fixture
def probe() -> Iterator[str]:
    """A method of the test's own, registered late, whose defaults are sparse for little more than 1,024 tokens."""
    window = METHODS.get("sliding_window")

    @hsa.register_method("native_probe")
    @dataclass(frozen=True, kw_only=True)
    class Probe(window):  # type: ignore[valid-type, misc]
        window: int = 100
        sink: int = 5

    native.register("native_probe")
    yield "hsa:native_probe"
    METHODS._entries.pop("native_probe")


TEXT = [n for n in hsa.list_methods() if hsa.get_method(n).needs <= {"causal"} and not hsa.get_method(n).reads]
FITTING = [*((f, "sliding_window") for f in FAMILIES), *(("llama", n) for n in TEXT if n != "sliding_window")]


@pytest.mark.parametrize("family, name", FITTING)
def test_short_texts_are_the_models_own_attention(family, name):
    usual, model = FAMILIES[family](), FAMILIES[family](f"hsa:{name}")
    ids, mask, _ = padded([23, 37], "left")
    assert torch.equal(logits(model, ids, attention_mask=mask), logits(usual, ids, attention_mask=mask))
    for kind in (None, "static"):
        same = [
            m.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=kind)
            for m in (model, usual)
        ]
        assert torch.equal(*same)


def test_a_method_that_reads_the_layers_inputs_is_refused():
    with pytest.raises(hsa.MethodDoesNotApply, match=r"'hsa:seer_attention' reads more of a layer .*patch\(\)"):
        FAMILIES["llama"]("hsa:seer_attention")(tokens(1, 20))


def test_from_pretrained_by_name(tmp_path, probe):
    from transformers import AutoModelForCausalLM

    FAMILIES["llama"]().save_pretrained(tmp_path)
    ids = tokens(2, 2100)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=probe)
    usual = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_implementation"):
        native.report(model)
    sparse, dense = logits(model, ids), logits(usual, ids)
    with hsa.patch(usual, "native_probe"):
        assert torch.equal(sparse, logits(usual, ids))
    assert not torch.equal(sparse, dense)
    report = native.report(model)
    assert [(r.layer, r.sparse_calls) for r in report.layers] == [(0, 1), (1, 1)]
    assert 0.05 < report.density < 0.6
    model.save_pretrained(tmp_path / "again")
    assert "hsa" not in (tmp_path / "again" / "config.json").read_text()


def test_switching_between_methods(probe):
    model, ids = FAMILIES["llama"](probe), tokens(1, 37)
    dense = logits(model, ids)
    assert native.report(model).method == "native_probe"
    model.set_attn_implementation("hsa:dense")
    assert torch.equal(logits(model, ids), dense)
    assert native.report(model).method == "dense"


def test_patch_on_a_native_model_and_back(probe):
    model, usual, ids = FAMILIES["llama"](probe), FAMILIES["llama"]("sdpa"), tokens(2, 2100)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with hsa.patch(model, "dense") as patch:
        assert torch.equal(logits(model, ids), logits(usual, ids))
        # Shares the config and has no patch: still native, thus sparse.
        assert not torch.equal(logits(other, ids), logits(usual, ids))
        assert [r.sparse_calls for r in native.report(other).layers] == [1, 1]
    assert patch.report().layers[0].reasons == {"method dense": 1}
    assert model.config._attn_implementation == probe
    logits(model, ids)
    assert native.report(model).method == "native_probe"


def test_method_for_video_is_refused_at_the_first_forward():
    @hsa.register_method("native_video_probe")
    @dataclass(frozen=True, kw_only=True)
    class Video(Method):
        needs = frozenset({"video grid"})

    try:
        native.register("native_video_probe")
        model = FAMILIES["llama"]("hsa:native_video_probe")
        with pytest.raises(hsa.MethodDoesNotApply, match="'hsa:native_video_probe' needs exactly one video segment"):
            logits(model, tokens(1, 20))
    finally:
        METHODS._entries.pop("native_video_probe")


def test_vision_tower_of_a_native_model_runs_its_own_attention():
    model, inputs = tiny_vl("hsa:sliding_window")
    usual, _ = tiny_vl("sdpa")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, usual(**inputs).logits)
    assert len(native.report(model).layers) == 2


def test_names_are_registered_whoever_imports_transformers_first():
    code = (
        "import hf_sparse_attn.hosts.transformers_hook;"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known;"
        "assert 'hsa:vertical_slash' in known"
    )
    done = run_code(code)
    assert done.returncode == 0 and "could not be registered" not in done.stderr, done.stderr
