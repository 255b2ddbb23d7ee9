"""Trained gates: their files, and what layers of language models hand over to the methods that ask them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hf_sparse_attn as hsa
from hf_sparse_attn import GateSet
from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.hosts.transformers_forward import values_here
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.profiling.observe import observing
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.gates import find_gates, gate_of
from hf_sparse_attn.span import Span
from tests.support.tiny_lm import FAMILIES, padded, positions, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

KIND = "seer_attention"
MODEL = Fingerprint("tiny", "llama", 3, 4, 2, 8, "", "")
SETTINGS = {"block_size": 16, "hidden": 12}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    GateSet(KIND, MODEL, SETTINGS, seed=3).save(tmp_path / "gates")
    return tmp_path / "gates"


# ------------------------------------------------------------------ files


def test_gates_come_back_as_they_were(folder: Path) -> None:
    made, back = GateSet(KIND, MODEL, SETTINGS, seed=3), GateSet.load(folder)
    assert (back.kind, back.model, back.settings) == (KIND, MODEL, SETTINGS)
    assert made.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), back.state_dict().values(), strict=True))
    assert sorted(p.name for p in folder.iterdir()) == ["gates.json", "gates.safetensors"]


def test_starting_weights_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (GateSet(KIND, MODEL, SETTINGS, seed=s).layers[0].key for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_as_many_gates_as_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = hsa.get_method(KIND)
    made = cls.make_gates(MODEL, SETTINGS)
    for wrong in (made[:2], [*made, made[0]]):
        monkeypatch.setattr(cls, "make_gates", lambda model, settings, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=f"of 'seer_attention' must give 3 gates, got {len(wrong)}"):
            GateSet(KIND, MODEL, SETTINGS)


def test_live_sets_are_equal_by_identity_and_shown_in_short() -> None:
    one, two = (GateSet(KIND, MODEL, SETTINGS) for _ in range(2))
    method = hsa.get_method(KIND)(gates=one)
    assert method == replace(method) and hash(method) == hash(replace(method))
    assert method != hsa.get_method(KIND)(gates=two)
    assert repr(one) == "GateSet('seer_attention', tiny, 3 layers, 4608 weights)" and repr(one) in repr(method)


def test_files_are_read_once_and_anew_when_they_change(folder: Path) -> None:
    like = torch.zeros(1)
    first = find_gates(str(folder), KIND)
    assert find_gates(str(folder), KIND) is first
    gate = gate_of(str(folder), KIND, 1, like)
    assert gate_of(str(folder), KIND, 1, like) is gate and not any(p.requires_grad for p in gate.parameters())
    assert not any(p.requires_grad for p in first.parameters())
    assert gate_of(str(folder), KIND, 1, like, torch.float64).key.dtype == torch.float64
    assert gate_of(str(folder), KIND, 1, like.half()).key.dtype == torch.float32
    with pytest.raises(ValueError, match="`gates` must be of vsa, got those of seer_attention in"):
        find_gates(str(folder), "vsa")
    GateSet(KIND, MODEL, SETTINGS, seed=4).save(folder)
    assert not torch.equal(gate_of(str(folder), KIND, 1, like).key, gate.key)


def test_weights_that_are_copied_in_alone_are_read_anew(folder: Path, tmp_path: Path) -> None:
    before = find_gates(str(folder), KIND).layers[0].key
    other = GateSet(KIND, MODEL, SETTINGS, seed=4)
    other.save(tmp_path / "other")
    # Over the file itself, which gates in use must not follow.
    shutil.copy(tmp_path / "other" / "gates.safetensors", folder)
    assert torch.equal(before, GateSet(KIND, MODEL, SETTINGS, seed=3).layers[0].key)
    assert torch.equal(find_gates(str(folder), KIND).layers[0].key, other.layers[0].key)


def test_every_layer_has_its_own_gate_on_disk_and_live(folder: Path) -> None:
    live, like = GateSet(KIND, MODEL, SETTINGS, seed=3), torch.zeros(1)
    for layer in range(3):
        assert gate_of(live, KIND, layer, like) is live.layers[layer]
        assert torch.equal(gate_of(str(folder), KIND, layer, like).key, live.layers[layer].key)
        assert not torch.equal(live.layers[layer].key, live.layers[layer - 1].key)


def test_copies_of_live_gates_are_for_use_alone() -> None:
    live = GateSet(KIND, MODEL, SETTINGS)
    made = live.of_layer(1, torch.device("cpu"), torch.float64)
    assert not made.training and not any(p.requires_grad for p in made.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in live.parameters())


def test_a_deep_copy_has_no_gates_of_the_original(folder: Path) -> None:
    first = find_gates(str(folder), KIND)
    placed = first.of_layer(0, torch.device("cpu"), torch.float32)
    other = copy.deepcopy(first)
    with torch.no_grad():
        other.layers[0].key.zero_()
    assert not other.of_layer(0, torch.device("cpu"), torch.float32).key.any() and bool(placed.key.any())


def test_gates_of_a_bundle_on_the_hub_are_asked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def download(repo_id: str, name: str) -> str:
        asked.append(name)
        if "/" not in name:
            raise EntryNotFoundError(f"no {name}")
        return str(folder.parent / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("hf_sparse_attn.sharing.gates._DOWNLOADED", {})
    found = find_gates("somebody/bundle", KIND)
    assert torch.equal(found.layers[0].key, GateSet(KIND, MODEL, SETTINGS, seed=3).layers[0].key)
    assert find_gates("somebody/bundle", KIND) is found
    assert asked == ["gates.json", "gates/gates.json", "gates/gates.safetensors"]


def edit(folder: Path, **change: Any) -> None:
    file = folder / "gates.json"
    value = json.loads(file.read_text())
    for name, new in change.items():
        at, names = value, name.split("__")
        for part in names[:-1]:
            at = at[part]
        at[names[-1]] = new
    file.write_text(json.dumps(value))


def cut_weights(folder: Path) -> None:
    file = folder / "gates.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_weights(change) -> Any:
    def damage(folder: Path) -> None:
        file = folder / "gates.safetensors"
        with safe_open(file, "pt") as opened:
            mark = opened.metadata()
        save_file(change(load_file(file)), file, mark)

    return damage


DAMAGES = {
    "no_json": (lambda f: (f / "gates.json").write_text("{"), "gates.json must be a JSON file"),
    "twice": (lambda f: (f / "gates.json").write_text('{"kind": 1, "kind": 2}'), "given once, got 'kind' twice"),
    "infinite": (lambda f: edit(f, settings__hidden=float("inf")), "numbers must be finite, got Infinity"),
    "no_object": (lambda f: edit(f, settings=[]), "`settings` must be an object"),
    "list": (lambda f: (f / "gates.json").write_text("[]"), "must be a JSON object"),
    "version": (lambda f: edit(f, version=2), "version 1, got .*2"),
    "key": (lambda f: edit(f, other=1), "must have the keys"),
    "model": (lambda f: edit(f, model__layers=0), "`layers` must be at least 1, got 0"),
    "kind": (lambda f: edit(f, kind="block_topk"), "'block_topk', which has none"),
    "unknown_kind": (lambda f: edit(f, kind="nothing"), "must be one of"),
    "unknown_setting": (lambda f: edit(f, settings={"depth": 3}), "take the settings block_size, hidden"),
    "huge": (lambda f: edit(f, settings__hidden=10**9), "layers|0.key is .4, 24, 12., not .4, 24, 1000000000."),
    "other_settings": (lambda f: edit(f, settings__block_size=32), "must be written together"),
    "cut": (cut_weights, "must be a whole safetensors file"),
    "gone": (lambda f: (f / "gates.safetensors").unlink(), "gates.safetensors"),
    "missing": (change_weights(lambda w: {k: v for k, v in w.items() if k != "1.key"}), "1.key is missing"),
    "more": (change_weights(lambda w: {**w, "9.key": torch.zeros(1)}), "9.key is .1., not wanted"),
    "nan": (change_weights(lambda w: {k: v * torch.nan for k, v in w.items()}), "must be finite numbers"),
    "integers": (change_weights(lambda w: {k: v.int() for k, v in w.items()}), "finite numbers, got torch.int32"),
    "endless": (lambda f: (f / "gates.json").write_text(" " * (1 << 20) + "{}"), "must have at most 1048576 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_told(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GateSet.load(folder)


def test_weights_that_are_not_finite_are_neither_saved_nor_read(folder: Path, tmp_path: Path) -> None:
    made = GateSet(KIND, MODEL, SETTINGS)
    with torch.no_grad():
        made.layers[1].key[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"finite weights to be saved, got others in 1\.key"):
        made.save(tmp_path / "bad")
    assert not (tmp_path / "bad" / "gates.json").exists()


PLACES = {
    "nothing": ("", ValueError, "`gates` must be a folder, a Hub id or a GateSet with gates trained for seer"),
    "no_folder": ("/nowhere/gates", ValueError, "a folder that exists or a Hub id"),
    "no_gates": ("EMPTY", FileNotFoundError, "must be a folder that holds gates.json"),
    "file": ("FILE", ValueError, "a folder or a Hub id, got the file"),
    "hub": ("somebody/gates", OSError, "gates on the Hub that can be reached, got 'somebody/gates'"),
}


@pytest.mark.parametrize("place", PLACES)
def test_places_without_gates_are_told(folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    named, error, message = PLACES[place]
    named = {"EMPTY": str(tmp_path / "empty"), "FILE": str(folder / "gates.json")}.get(named, named)
    with pytest.raises(error, match=message):
        find_gates(named, KIND)


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="`gates` must be a folder, a Hub id or a GateSet, got 3 of type int"):
        hsa.get_method(KIND)(gates=3)
    with pytest.raises(ValueError, match="which has none"):
        GateSet("dense", MODEL)
    with pytest.raises(TypeError, match=r"`settings\['hidden'\]` must be a number"):
        GateSet(KIND, MODEL, {"hidden": object()})
    with pytest.raises(ValueError, match="more than 3 layers"):
        gate_of(GateSet(KIND, MODEL, SETTINGS), KIND, 3, torch.zeros(1))
    with pytest.raises(ValueError, match="on the device of the model meta, got cpu"):
        gate_of(GateSet(KIND, MODEL, SETTINGS), KIND, 0, torch.zeros(1, device="meta"))


def test_gates_of_another_method_or_model_are_refused(folder: Path) -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(ValueError, match=r"gates were trained for; .*layers: 3 here, 2 in the model"):
        hsa.patch(model, KIND, gates=str(folder))
    with pytest.raises(ValueError, match="`gates` must be a folder"):
        hsa.patch(model, KIND)
    own = GateSet(KIND, model, SETTINGS)
    own.check(model)
    own.kind = "vsa"
    with pytest.raises(ValueError, match="`gates` must be of seer_attention, got those of vsa"):
        hsa.get_method(KIND)(gates=own)
    assert hsa.patching.active_patch(model.model) is None


# ------------------------------------------------------------------ what layers hand over


@dataclass(frozen=True, kw_only=True)
class Reader(Method):
    """Notes what it is given and is dense."""

    name: ClassVar[str] = "reader"
    reads = frozenset({"hidden", "q", "k"})

    seen: list[tuple[Context, torch.Tensor, torch.Tensor]] = field(default_factory=list, compare=False)

    def pattern(self, q, k, ctx):
        self.seen.append((ctx, q.detach(), k.detach()))
        return Decline("seen")


def by_hand(model, ids: torch.Tensor) -> list[LayerInputs]:
    """Hidden states, queries and keys of every layer, projected outside of it."""
    found: list[LayerInputs] = []

    def before(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        hidden = args[0] if args else given["hidden_states"]
        q, k = (getattr(module, f"{n}_proj")(hidden).unflatten(-1, (-1, module.head_dim)) for n in "qk")
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        found.append(LayerInputs(hidden, q.transpose(1, 2), k.transpose(1, 2)))

    layers = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def same(got: LayerInputs, want: LayerInputs) -> bool:
    return all(torch.equal(getattr(got, n), getattr(want, n)) for n in ("hidden", "q", "k"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_layers_hand_over_what_they_had_before_positions(name: str) -> None:
    changes = {"layer_types": ["full_attention"] * 2} if name == "gemma3" else {}
    model, ids, reader = FAMILIES[name]("sdpa", **changes), tokens(2, 37), Reader()
    with hsa.patch(model, reader, min_tokens=0), torch.no_grad():
        model(ids, use_cache=False)
    want = by_hand(model, ids)
    assert [ctx.layer for ctx, _, _ in reader.seen] == [0, 1]
    assert all(same(ctx.inputs, w) for (ctx, _, _), w in zip(reader.seen, want, strict=True))
    # Positions were put in afterwards: the first token is not turned, all others are.
    for ctx, q, k in reader.seen:
        torch.testing.assert_close(ctx.inputs.q[:, :, 0], q[:, :, 0])
        assert not torch.allclose(ctx.inputs.k[:, :, 1:], k[:, :, 1:], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_hand_over_their_own_tokens(side: str) -> None:
    model, reader = FAMILIES["qwen3"]("sdpa"), Reader()
    ids, mask, singles = padded([61, 37, 61], side)
    with hsa.patch(model, reader, min_tokens=0), torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    assert len(reader.seen) == 4
    for ctx, q, _ in reader.seen:
        layer, rows = ctx.layer, [0, 2] if q.shape[0] == 2 else [1]
        for i, row in enumerate(rows):
            want = by_hand(model, singles[row])[layer]
            for name in ("hidden", "q", "k"):
                got = getattr(ctx.inputs, name)[i : i + 1]
                torch.testing.assert_close(got, getattr(want, name), rtol=1e-4, atol=1e-4)


def test_packed_rows_hand_over_each_sequence() -> None:
    span = Span((1,), (3, 8), (13, 18))
    inputs = LayerInputs(torch.randn(2, 9, 5), torch.randn(2, 4, 9, 3), torch.randn(2, 2, 9, 3))
    ctx = span.context(Context(TokenLayout.causal(19).continued(10), num_heads=4, num_kv_heads=2, inputs=inputs))
    assert same(ctx.inputs, LayerInputs(inputs.hidden[1:, 3:8], inputs.q[1:, :, 3:8], inputs.k[1:, :, 3:8]))
    assert span.cut_inputs(LayerInputs(hidden=inputs.hidden)).q is None and span.cut_inputs(None) is None


@pytest.mark.parametrize("when", ["before", "after", "unloaded"])
def test_adapters_are_part_of_what_is_read(when: str) -> None:
    peft = pytest.importorskip("peft")
    model, ids, reader = FAMILIES["llama"]("sdpa"), tokens(1, 33), Reader()
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2, init_lora_weights=False)
    whole = peft.get_peft_model(model, config) if when == "before" else model
    with hsa.patch(whole, reader, min_tokens=0), torch.no_grad():
        model(ids, use_cache=False)
        if when != "before":
            whole = peft.get_peft_model(model, config)
            whole(ids, use_cache=False)
        if when == "unloaded":
            whole = whole.unload()
        reader.seen.clear()
        whole(ids, use_cache=False)
        seen = list(reader.seen)
    want = by_hand(whole, ids)
    assert all(same(ctx.inputs, w) for (ctx, _, _), w in zip(seen, want, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.modules())


def test_recomputation_reads_the_same() -> None:
    model, ids, reader = FAMILIES["llama"]("sdpa"), tokens(2, 33), Reader()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with hsa.patch(model, reader, min_tokens=0):
        model(ids, use_cache=False).logits.sum().backward()
    want = by_hand(model, ids)
    assert [ctx.layer for ctx, _, _ in reader.seen] == [0, 1, 1, 0]
    assert all(same(ctx.inputs, want[ctx.layer]) for ctx, _, _ in reader.seen)


def test_nothing_is_watched_for_methods_that_read_nothing_and_nothing_is_left() -> None:
    model = FAMILIES["llama"]("sdpa")
    with hsa.patch(model, "block_topk", min_tokens=0):
        # The model's forwards are noted, and nothing of its layers is.
        hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert hooked == [model.model]
    with hsa.patch(model, Reader(), min_tokens=0) as patch, torch.no_grad():
        model(tokens(1, 33), use_cache=False)
        watches = [m.__dict__["_hsa_layer"].watch for m in model.modules() if "_hsa_layer" in m.__dict__]
        assert len(watches) == 2 and not values_here().keys() & set(watches), "activations are let go"
        assert patch.report().layers[0].reasons == {"seen": 1}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_decoding_lets_activations_go() -> None:
    model = FAMILIES["llama"]("sdpa")
    with hsa.patch(model, Reader(), min_tokens=0), torch.no_grad():
        model.generate(tokens(1, 20), max_new_tokens=3, do_sample=False)
        watches = [m.__dict__["_hsa_layer"].watch for m in model.modules() if "_hsa_layer" in m.__dict__]
        assert not values_here().keys() & set(watches)


def test_fused_projections_are_refused_and_the_model_is_left_as_it_was() -> None:
    model = FAMILIES["phi3"]("sdpa")
    with pytest.raises(hsa.MethodDoesNotApply, match=r"k_norm or k_proj, which layers.0.self_attn \(Phi3Att"):
        hsa.patch(model, Reader())
    assert hsa.patching.active_patch(model.model) is None
    with hsa.patch(model, "block_topk"):
        pass


def test_families_that_hand_over_nothing_refuse() -> None:
    from tests.support.tiny_encoders import ENCODERS

    with pytest.raises(hsa.MethodDoesNotApply, match=r"'reader' reads the .*queries before positions.*family encoder"):
        hsa.patch(ENCODERS["bert"](), Reader())
    with (
        pytest.raises(hsa.MethodDoesNotApply, match="to be observed reads the keys before positions of a layer"),
        observing(ENCODERS["bert"](), print, reads=frozenset({"k"})),
    ):
        pass


def test_compiled_graphs_are_dense_and_say_why() -> None:
    model, ids, reader = FAMILIES["llama"]("sdpa"), tokens(1, 33), Reader()
    usual = model(ids, use_cache=False).logits
    with hsa.patch(model, reader, min_tokens=0) as patch, torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, usual)
        reasons = [r for layer in patch.report().layers for r in layer.reasons]
    assert not reader.seen
    assert {r.partition(" (")[0] for r in reasons} == {"method reader reads more of a layer than a graph hands over"}


def test_a_norm_after_the_rotation_is_not_read() -> None:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NanoChatForCausalLM(NanoChatConfig(**sizes, num_key_value_heads=2)).eval()
    reader, ids = Reader(), tokens(1, 21)
    hidden = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, o: hidden.append(o))
    with hsa.patch(model, reader, min_tokens=0), torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    assert torch.equal(reader.seen[0][0].inputs.q.transpose(1, 2).flatten(2), hidden[0])


def test_a_folder_can_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a folder that exists"):
        find_gates(str(folder), KIND)
    assert find_gates(str(tmp_path / "elsewhere"), KIND).model == MODEL
