"""Stretched rotary positions: equal to a model built so, saved with it, and undone bit for bit."""

import copy
import math

import pytest
import torch
import transformers

from hf_sparse_attn.training.rope_scaling import RopeSettings, rotary_modules, scale_rope
from tests.support.tiny_lm import FAMILIES, VOCAB, tiny_vl, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = 63


def _buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def _logits(model, length=LONG):
    with torch.no_grad():
        return model(tokens(2, length), use_cache=False).logits


def _rebuilt(model, parameters, **changes):
    """A model that transformers builds from the config with those rope parameters, with the same weights."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = copy.deepcopy(parameters)
    for name, value in changes.items():
        setattr(config, name, value)
    made = type(model)(config).eval()
    made.load_state_dict(model.state_dict())
    return made


CASES = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, 8192),
    "ntk": (
        {"type": "ntk", "factor": 4.0},
        # 8 rotary dimensions.
        {"rope_type": "default", "rope_theta": 10000.0 * 4.0 ** (8 / 6)},
        8192,
    ),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_length": 16, "beta_fast": 2.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 2.0,
            "rope_theta": 10000.0,
        },
        2048,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_stretched_model_is_the_one_built_so_and_comes_back(family, case):
    settings, parameters, length = CASES[case]
    model = FAMILIES[family]("sdpa")
    config, plain, buffers = copy.deepcopy(model.config.to_dict()), _logits(model), _buffers(model)
    undo = scale_rope(model, settings)
    built = _rebuilt(model, parameters)
    assert torch.equal(_logits(model), _logits(built))
    assert not torch.allclose(_logits(model), plain)
    assert model.config.rope_parameters == parameters
    assert model.config.max_position_embeddings == length
    undo()
    assert model.config.to_dict() == config
    assert torch.equal(_logits(model), plain)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    undo()


def test_linear_divides_positions():
    """Chen et al. 2023, equation 4: position m is seen as m / factor."""
    model = FAMILIES["llama"]("sdpa")
    # With a mask given, positions that do not count up are not taken for several texts in a row.
    given = dict(position_ids=torch.arange(LONG)[None] / 3.0, attention_mask=torch.ones(1, LONG, dtype=torch.long))
    with torch.no_grad():
        wanted = model(tokens(1, LONG), **given, use_cache=False).logits
    scale_rope(model, {"type": "linear", "factor": 3.0})
    torch.testing.assert_close(_logits(model)[:1], wanted, rtol=1e-4, atol=1e-4)


def test_ntk_divides_the_slowest_frequency_and_keeps_the_fastest():
    model = FAMILIES["llama"]("sdpa")
    (rotary,) = rotary_modules(model)
    before = rotary.inv_freq.clone()
    scale_rope(model, {"type": "ntk", "factor": 4.0})
    ratio = before / rotary.inv_freq
    assert math.isclose(ratio[0], 1.0, rel_tol=1e-6)
    assert math.isclose(ratio[-1], 4.0, rel_tol=1e-5)


def test_yarn_keeps_the_fast_divides_the_slow_and_sharpens():
    model = FAMILIES["llama"]("sdpa", head_dim=32)
    (rotary,) = rotary_modules(model)
    before = rotary.inv_freq.clone()
    scale_rope(model, {"type": "yarn", "factor": 4.0, "original_length": 256})
    turns, ratio = 256 * before / (2 * math.pi), before / rotary.inv_freq
    assert (turns >= 32).any() and (turns < 1).any()
    # The ramp starts and ends at whole dimensions: one may be inside it at either end.
    assert torch.allclose(ratio[turns >= 32], torch.ones(())) and torch.allclose(ratio[-4:], torch.tensor(4.0))
    assert ((ratio > 0.999) & (ratio < 4.001)).all() and (ratio.diff() > -1e-5).all()
    assert rotary.attention_scaling == 0.1 * math.log(4.0) + 1.0


def test_a_saved_model_is_loaded_stretched(tmp_path):
    model = FAMILIES["llama"]("sdpa")
    scale_rope(model, {"type": "yarn", "factor": 2.0, "original_length": 16})
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(loaded), _logits(model))


@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk"])
def test_stretched_twice_is_stretched_by_the_product_and_undone_last_first(kind):
    model, once = FAMILIES["llama"]("sdpa"), FAMILIES["llama"]("sdpa")
    plain = _logits(model)
    first = scale_rope(model, {"type": kind, "factor": 2.0})
    between = _logits(model)
    second = scale_rope(model, {"type": kind, "factor": 3.0})
    scale_rope(once, {"type": kind, "factor": 6.0})
    torch.testing.assert_close(_logits(model), _logits(once), rtol=1e-4, atol=1e-4)
    assert model.config.max_position_embeddings == once.config.max_position_embeddings == 6 * 2048
    with pytest.raises(ValueError, match="changed since"):
        first()
    second()
    assert torch.equal(_logits(model), between)
    first()
    assert torch.equal(_logits(model), plain)


def test_stretched_further_attention_is_as_sharp_as_the_whole_factor_asks():
    model, once = FAMILIES["llama"]("sdpa"), FAMILIES["llama"]("sdpa")
    scale_rope(model, {"type": "yarn", "factor": 2.0, "attention_factor": 1.5})
    scale_rope(model, {"type": "yarn", "factor": 3.0})
    scale_rope(once, {"type": "yarn", "factor": 6.0})
    assert model.model.rotary_emb.attention_scaling == once.model.rotary_emb.attention_scaling
    assert model.config.rope_parameters == once.config.rope_parameters


def test_windowed_layers_keep_their_positions():
    model = FAMILIES["gemma3"]("eager")
    (rotary,) = rotary_modules(model)
    near, far = rotary.sliding_attention_inv_freq.clone(), rotary.full_attention_inv_freq.clone()
    plain = _logits(model)
    undo = scale_rope(model, {"type": "linear", "factor": 2.0})
    assert torch.equal(rotary.sliding_attention_inv_freq, near)
    torch.testing.assert_close(rotary.full_attention_inv_freq, far / 2)
    assert not torch.equal(_logits(model), plain)
    undo()
    assert torch.equal(_logits(model), plain)


def test_the_text_decoder_of_a_model_of_images_and_text():
    model, inputs = tiny_vl("sdpa")
    with torch.no_grad():
        plain = model(**inputs).logits
        undo = scale_rope(model, {"type": "yarn", "factor": 4.0, "original_length": 16})
        changed = model(**inputs).logits
        assert model.config.text_config.rope_parameters["mrope_section"] == [1, 1, 2]
        undo()
        assert not torch.allclose(changed, plain) and torch.equal(model(**inputs).logits, plain)


def test_buffers_keep_their_dtype():
    model = FAMILIES["llama"]("sdpa").to(torch.bfloat16)
    before = {name: value.dtype for name, value in model.named_buffers()}
    scale_rope(model, {"type": "linear", "factor": 2.0})
    assert {name: value.dtype for name, value in model.named_buffers()} == before


def test_a_failure_half_way_leaves_nothing(monkeypatch):
    model = FAMILIES["llama"]("sdpa")
    config, plain = copy.deepcopy(model.config.to_dict()), _logits(model)
    (rotary,) = rotary_modules(model)

    def refuse(self, config):
        raise RuntimeError("no")

    monkeypatch.setattr(type(rotary), "__init__", refuse)
    with pytest.raises(RuntimeError, match="no"):
        scale_rope(model, {"type": "linear", "factor": 2.0})
    assert model.config.to_dict() == config and torch.equal(_logits(model), plain)


REFUSED = {
    "unknown type": ({"type": "dynamic", "factor": 2.0}, ValueError, "`rope.type` must be one of linear, ntk, yarn"),
    "no factor": ({"type": "linear"}, ValueError, "factor"),
    "factor below 1": ({"type": "linear", "factor": 0.5}, ValueError, "`factor` must be 1 or more, got 0.5"),
    "factor not finite": ({"type": "ntk", "factor": math.inf}, ValueError, "`factor` must be 1 or more"),
    "factor a word": ({"type": "ntk", "factor": "four"}, TypeError, "rope.factor"),
    "unknown key": ({"type": "ntk", "factor": 2.0, "base": 1}, ValueError, "base"),
    "length 0": ({"type": "yarn", "factor": 2.0, "original_length": 0}, ValueError, "`original_length`"),
    "yarn's setting": ({"type": "ntk", "factor": 2.0, "beta_fast": 8}, ValueError, "`beta_fast` must be left out"),
    "crossed": ({"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}, ValueError, "`beta_fast` must be at"),
    "negative": ({"type": "yarn", "factor": 2.0, "attention_factor": -1}, ValueError, "`attention_factor` must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_none(case):
    settings, error, message = REFUSED[case]
    model = FAMILIES["llama"]("sdpa")
    with pytest.raises(error, match=message):
        scale_rope(model, settings)


def test_settings_check_themselves():
    with pytest.raises(ValueError, match="`type` must be linear, ntk or yarn"):
        RopeSettings(type="longrope", factor=2.0)


def test_models_that_cannot_be_stretched():
    small = dict(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match=r"rotary positions .* GPT2LMHeadModel"):
        scale_rope(transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)), {"type": "ntk", "factor": 2.0})
    with pytest.raises(TypeError, match="torch module, got a str"):
        scale_rope("byte_llama", {"type": "ntk", "factor": 2.0})
    llama3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    model = FAMILIES["llama"](
        "sdpa", rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, **llama3}
    )
    plain = _logits(model)
    with pytest.raises(ValueError, match=r"'yarn' needs .* of type default or yarn, got 'llama3'; type 'ntk'"):
        scale_rope(model, {"type": "yarn", "factor": 2.0})
    undo = scale_rope(model, {"type": "ntk", "factor": 2.0})
    assert model.config.rope_parameters["factor"] == 8.0 and not torch.equal(_logits(model), plain)
    undo()
    assert torch.equal(_logits(model), plain)
