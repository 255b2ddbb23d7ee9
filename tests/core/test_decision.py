"""What runs for a call and why: every guard of decision.py, session.py and the table of transformers' rules fires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as mu

import hf_sparse_attn as hsa
from hf_sparse_attn import decision, policy
from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.cost.judge import TOO_DENSE, TOO_DENSE_AT_BEST, Loss, Prediction
from hf_sparse_attn.decision import SPARSE, Case, Decision, by_shape, of_call
from hf_sparse_attn.decoder import EXACT, OWN, Decoder
from hf_sparse_attn.dispatch import dense_attention
from hf_sparse_attn.hosts.transformers_hook import LayerState, attend_sparse
from hf_sparse_attn.hosts.transformers_mask import MaskSpec
from hf_sparse_attn.hosts.transformers_rules import RULES, LayerCall, decide
from hf_sparse_attn.hosts.vision_layout import Tokens
from hf_sparse_attn.method import Decline, Method, PartlyDense
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.session import Session
from hf_sparse_attn.span import Span

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Whole(Method):
    """Keeps every key, or does what a test wants."""

    name = "whole"
    word: str | None = None
    declines: str | None = None
    partly: str | None = None

    def dense_here(self, ctx: Context) -> str | None:
        return self.word

    def attention(self, q, k, v, ctx, run):
        if self.declines is not None:
            return Decline(self.declines)
        layout = ctx.layout
        done = run(q, k, v, BlockPattern.dense(layout.q_len, layout.kv_len, layout.is_causal, block=16))
        if self.partly is None:
            return done
        some = PartlyDense(done)
        some.reasons = (self.partly,)
        return some


def session_of(
    strict: bool = False, method: Method | None = None, decoder: Decoder | None = None, **policy: Any
) -> Session:
    return Session(method or Whole(), Policy(**{"min_tokens": 0, **policy}), "auto", strict, decoder)


def at(kv_len: int, q_len: int | None = None, **where: Any) -> Context:
    layout = TokenLayout.causal(kv_len).continued(kv_len - (q_len or kv_len))
    return Context(layout, num_heads=2, num_kv_heads=2, head_dim=16, **where)


def tensors(tokens: int, rows: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return [torch.randn(rows, 2, tokens, 16, generator=draw) for _ in range(3)]


# ------------------------------------------------------------------ what was asked for

ASKED: dict[str, tuple[dict[str, Any], Context, str | None]] = {
    "15 queries": ({}, at(60, 15), "decoding: fewer than 16 queries"),
    "16 queries": ({}, at(60, 16), None),
    "the last of dense_layers": ({"dense_layers": 2}, at(60, layer=1), "dense_layers"),
    "the first after dense_layers": ({"dense_layers": 2}, at(60, layer=2), None),
    "no dense_layers": ({"dense_layers": 0}, at(60), None),
    "in the list of dense_layers": ({"dense_layers": (1, 3)}, at(60, layer=3), "dense_layers"),
    "between dense_layers": ({"dense_layers": (1, 3)}, at(60, layer=2), None),
    "last dense step": ({"dense_steps": 0.2}, at(60, step=1, num_steps=10), "dense_steps"),
    "first sparse step": ({"dense_steps": 0.2}, at(60, step=2, num_steps=10), None),
    "a share of less than a step": ({"dense_steps": 0.01}, at(60, step=0, num_steps=4), "dense_steps"),
    "last sparse step": ({"dense_steps": (0, 0.2)}, at(60, step=7, num_steps=10), None),
    "first dense step at the end": ({"dense_steps": (0, 0.2)}, at(60, step=8, num_steps=10), "dense_steps"),
    "fewer keys than min_tokens": ({"min_tokens": 40}, at(39), "fewer than 40 keys (min_tokens=40)"),
    "min_tokens": ({"min_tokens": 40}, at(40), None),
}


@pytest.mark.parametrize("case", ASKED)
def test_the_policy_decides_at_its_boundaries(case: str) -> None:
    given, ctx, reason = ASKED[case]
    assert of_call(session_of(**given), ctx, CPU) == Decision(reason)


def test_the_methods_own_word_goes_before_the_policy() -> None:
    assert of_call(session_of(method=Whole(word="by my word"), dense_layers=9), at(60), CPU).reason == "by my word"


def test_a_pause_is_not_counted_and_the_method_dense_is() -> None:
    session, dense = session_of(), session_of(method=hsa.get_method("dense")())
    for one in (session, dense):
        with one.pause():
            assert one.as_before(one.record("layer", 0))
    assert not session.as_before(session.records["layer"]) and dense.as_before(dense.records["layer"])
    assert not session.records["layer"].dense_reasons and dense.records["layer"].dense_reasons == {"method dense": 1}


@pytest.mark.parametrize("strict", [False, True])
def test_only_what_nobody_asked_for_raises_where_the_patch_is_strict(strict: bool) -> None:
    session, record = session_of(strict), LayerRecord("layers.0", 0)
    assert not session.stays_dense(record, SPARSE) and session.stays_dense(record, Decision("asked for"))
    given_up: Callable[[], object] = lambda: session.stays_dense(record, Decision("lost", fallback=True))  # noqa: E731
    if not strict:
        assert given_up()
        session.give_up(record, "lost")
        assert record.dense_reasons == {"asked for": 1, "lost": 2}
        return
    for raising in (given_up, lambda: session.give_up(record, "lost")):
        with pytest.raises(hsa.DenseFallback, match=r"layer layers.0: lost \(strict=True\)"):
            raising()
    assert record.dense_reasons == {"asked for": 1}


# ------------------------------------------------------------------ one call


def run(session: Session, tokens: int = 60, ctx: Context | None = None, **more: Any) -> Any:
    return session.sparse(session.record("layer", 0), *tensors(tokens), at(tokens) if ctx is None else ctx, **more)


def test_a_dense_call_is_counted_once_and_a_sparse_one_gives_its_output() -> None:
    session = session_of(dense_layers=1)
    assert run(session) is None and session.records["layer"].dense_reasons == {"dense_layers": 1}
    out, lse = run(session_of())
    want = dense_attention(*tensors(60), at(60))
    torch.testing.assert_close((out, lse), want)


def test_a_short_sequence_among_long_ones_is_dense_by_itself() -> None:
    session, (q, k, v), ctx = session_of(), tensors(60, rows=2), at(60)
    spans = [Span((0,), (2, 42), (2, 42)), Span((1,), (0, 15), (0, 15)), Span((1,), (15, 31), (15, 31))]
    record = session.record("layer", 0)
    out, lse = session.sparse(record, q, k, v, ctx, spans)
    assert record.dense_reasons == {"decoding: fewer than 16 queries": 1} and record.sparse_calls == 1
    inside = torch.zeros(2, 60, dtype=torch.bool)
    for span in spans:
        one = dense_attention(*span.cut(q, k, v), span.context(ctx))
        torch.testing.assert_close((out[span.rows, :, slice(*span.q)], lse[span.rows, :, slice(*span.q)]), one)
        inside[span.rows[0], slice(*span.q)] = True
    assert (out.transpose(1, 2)[~inside] == 0).all() and (lse.transpose(1, 2)[~inside] == -torch.inf).all()
    assert session.sparse(record, q, k, v, ctx, [spans[1]] * 2) is None
    assert record.dense_reasons == {"decoding: fewer than 16 queries": 3} and record.sparse_calls == 1
    alone, _ = session.sparse(record, q, k, v, ctx, spans[:1])
    assert torch.equal(alone[0], out[0]) and (alone[1] == 0).all()


def test_what_the_host_has_asked_by_shape_is_not_asked_again_but_for_other_tokens() -> None:
    session = session_of(min_tokens=61)
    assert run(session, decided=at(60).layout) is not None
    assert run(session, decided=at(70).layout) is None
    assert session.records["layer"].dense_reasons == {"fewer than 61 keys (min_tokens=61)": 1}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["declines", "partly"])
def test_what_a_method_gives_up_is_a_fallback(kind: str, strict: bool) -> None:
    session = session_of(strict, Whole(**{kind: "not here"}))
    record = session.record("layer", 0)
    if strict:
        with pytest.raises(hsa.DenseFallback, match="not here"):
            run(session)
        assert not record.dense_reasons and not record.partly_dense
    else:
        assert (run(session) is None) == (kind == "declines")
        assert (record.dense_reasons if kind == "declines" else record.partly_dense) == {"not here": 1}


# ------------------------------------------------------------------ what is predicted


class Judged:
    """A judge and its call that say what a test wants, and remember what they were asked."""

    def __init__(self, bound: bool = True, pays: bool = True) -> None:
        self.asked: list[str] = []
        self.predicted = Prediction(1.0, 4.0 if pays else 1.0, 0.5)
        self.best = None if bound else Loss(TOO_DENSE_AT_BEST, self.predicted)
        self.table, self.sparse, self.dense = SimpleNamespace(origin="measured"), 1.0, self.predicted.dense

    def __getattr__(self, name: str) -> Any:
        answers = {
            "bound": (self.best, "assumed"),
            "call": self,
            "found": self.predicted,
        }

        def answer(*_: Any) -> Any:
            self.asked.append(name)
            return answers[name]

        return answer


@pytest.fixture(autouse=True)
def no_text_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """For min_tokens="auto", so that the judge alone decides."""
    monkeypatch.setattr(policy, "fewest_keys", lambda *_: 0)


def judged(min_tokens: int | str = "auto", **says: Any) -> tuple[Session, Any]:
    session = session_of(min_tokens=min_tokens)
    session.judge = judge = Judged(**says)  # type: ignore[assignment]
    return session, judge


def case_of(session: Session, trial: bool = False, known: bool = False) -> Case:
    return Case(session, LayerRecord("layer", 0, on_trial=trial), tensors(60)[0], at(60), known)


def test_a_case_that_cannot_pay_costs_one_look_up_and_none_where_the_shape_was_asked() -> None:
    session, judge = judged(bound=False)
    assert case_of(session).before() == Decision(judge.best, "assumed") and judge.asked == ["bound"]
    assert case_of(session, known=True).before().reason is None and judge.asked == ["bound", "call"]


@pytest.mark.parametrize("how", ["number", "trial"])
def test_a_case_that_is_forced_is_sparse(how: str) -> None:
    session, _ = judged(60 if how == "number" else "auto", bound=False, pays=False)
    case = case_of(session, trial=how == "trial")
    assert case.before().reason is None
    case.check(None, *tensors(60))  # type: ignore[arg-type]
    assert case.gain() == 1.0


def test_a_pattern_that_keeps_too_much_makes_the_case_dense() -> None:
    session, judge = judged(pays=False)
    record = session.record("layer", 0)
    assert run(session) is None and record.losses == {(TOO_DENSE, "measured"): (1, judge.predicted)}
    assert run(judged(pays=True)[0]) is not None


def test_a_call_is_asked_for_its_bound_where_the_shape_was_not() -> None:
    session, judge = judged(bound=False)
    assert run(session) is None and session.records["layer"].losses == {
        (TOO_DENSE_AT_BEST, "assumed"): (1, judge.predicted)
    }
    assert run(session, decided=at(60).layout) is not None and judge.asked.count("bound") == 1


def test_a_timed_run_is_sparse_whatever_is_predicted() -> None:
    session, judge = judged()
    record = session.record("layer", 0)
    record.to_measure, runs, seen = 1, [], []
    session.watcher = lambda *given: seen.append(given)

    def dense() -> None:
        judge.best, judge.predicted = Loss(TOO_DENSE_AT_BEST, judge.predicted), Prediction(9.0, 1.0, 0.5)
        runs.append(1)

    assert run(session, dense=dense) is not None
    assert len(record.measured) == record.sparse_calls == len(seen) == 1 and not record.losses
    assert record.to_measure == 0 and judge.asked.count("found") == 1 + len(runs) > 2


# ------------------------------------------------------------------ what holds for a shape


def ask(session: Session, tokens: int = 60, context: Any = at, kind: object = None) -> Decision:
    q = tensors(tokens)[0]
    return by_shape(session, session.record("layer", 0), q, tokens, lambda: context(tokens), kind)


def test_a_shape_is_decided_once() -> None:
    session, judge = judged(bound=False)
    assert [ask(session), ask(session, context=None)] == [Decision(judge.best, "assumed")] * 2
    assert judge.asked == ["bound"]
    short = session_of(min_tokens=61)
    assert ask(short) == ask(short, context=None) == Decision("fewer than 61 keys (min_tokens=61)")
    assert ask(session_of()) == SPARSE
    # A video of as many tokens is another matter.
    assert ask(session, kind="video").reason == judge.best and judge.asked == ["bound"] * 2


def test_shapes_are_forgotten_before_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "KEPT_SHAPES", 2)
    session = session_of(min_tokens=99)
    for tokens in (20, 21, 22):
        ask(session, tokens)
    assert len(session.records["layer"].by_shape) == 1


# ------------------------------------------------------------------ the rules of transformers


def spec(function: Any = mu.causal_mask_function, kv_len: int = 20, **more: Any) -> MaskSpec:
    wanted = dict(batch_size=2, q_length=20, kv_length=kv_len, q_offset=0, mask_function=function, attention_mask=None)
    return MaskSpec("sdpa", {**wanted, "device": "cpu", "dtype": torch.float32, **more})


def a_call(session: Session | None = None, **changes: Any) -> LayerCall:
    """A call of 2 rows of 20 causal tokens that nothing hinders, and what is changed of it."""
    state = LayerState(LayerRecord("layer", 0), session or session_of(), 1, "sdpa")
    config = SimpleNamespace(output_attentions=changes.pop("output_attentions", False))
    module: Any = SimpleNamespace(config=config, is_causal=True)
    q = torch.zeros(2, 4, 20, 8)
    given = {"q": q, "k": q[:, :2], "v": q[:, :2], "mask": spec(), "kwargs": {}, **changes}
    return LayerCall(state, module, **given)


def with_watch() -> LayerCall:
    call = a_call(kept={})
    watch: Any = SimpleNamespace(inputs=lambda *_: "q_norm did not run")
    object.__setattr__(call.state, "watch", watch)
    return call


def reading() -> Session:
    session = session_of()
    session.reads = frozenset({"hidden"})
    return session


def paused() -> Session:
    return Paused(hsa.get_method("block_topk")(), policy.Policy(), "auto", strict=False)


class Paused(Session):
    paused = True


@dataclass(frozen=True, kw_only=True)
class Video(Whole):
    needs = frozenset({"video grid"})


FEW = torch.zeros(2, 2, 19, 8)
WINDOW = mu.sliding_window_causal_mask_function(9)
OTHER = "mask other than causal under torch.compile (give an attention_mask of ones where nothing is packed)"
# Rule, what a call has that it forbids, the reason eagerly and traced; None where the rule is not for such calls.
BROKEN: dict[str, tuple[str, Callable[[], LayerCall], str | None, str | None]] = {
    "paused": ("patch", lambda: a_call(paused()), "paused", "paused"),
    "dense": ("patch", lambda: a_call(session_of(method=hsa.get_method("dense")())), *["method dense"] * 2),
    "fewer keys": ("fewer keys", lambda: a_call(k=FEW), "20 queries for 19 keys", None),
    "shape": ("shape", lambda: a_call(session_of(dense_layers=1)), "dense_layers", None),
    "decoding": (
        "decoding", lambda: a_call(session_of(decoder=OWN), q=torch.zeros(2, 4, 15, 8)),
        "decoding: fewer than 16 queries", "decoding",
    ),
    "reads": ("reads", lambda: a_call(reading()), None, "method whole reads more of a layer than a graph hands over"),
    "no mask": ("no mask", lambda: a_call(mask=None), *["no mask was described to the layer"] * 2),
    "tensor": (
        "ready mask", lambda: a_call(mask=torch.ones(2, 1, 20, 20)),
        "mask given as a Tensor: mask that is not causal", "mask given as a Tensor",
    ),
    "keys of the mask": (
        "mask of other sizes", lambda: a_call(mask=spec(kv_len=21)),
        "mask for [2, 1, 20, 21] where the layer has [2, 1, 20, 20]", None,
    ),
    "rows of the mask": (
        "mask of other sizes", lambda: a_call(mask=spec(batch_size=3)),
        "mask for [3, 1, 20, 20] where the layer has [2, 1, 20, 20]", None,
    ),
    "other tokens": (
        "other tokens",
        lambda: a_call(mask=None, k=torch.zeros(2, 2, 30, 8), kwargs={"is_causal": False}),
        "2 x 20 queries for 2 x 30 keys", "queries of another sequence than the keys",
    ),
    "other rows": (
        "other tokens",
        lambda: a_call(mask=None, k=torch.zeros(1, 2, 20, 8), kwargs={"is_causal": False}),
        "2 x 20 queries for 1 x 20 keys", "queries of another sequence than the keys",
    ),
    "dropout": (
        "dropout", lambda: a_call(kwargs={"dropout": 0.1}),
        "dropout of 0.1 on the attention weights", "dropout on the attention weights",
    ),
    "weights": ("weights", lambda: a_call(kwargs={"output_attentions": True}), *["output_attentions=True"] * 2),
    "weights by config": ("weights", lambda: a_call(output_attentions=True), *["output_attentions=True"] * 2),
    "scaling": ("scaling", lambda: a_call(kwargs={"scaling": torch.ones(1)}), *["scaling given as a Tensor"] * 2),
    "bias": (
        "position bias", lambda: a_call(kwargs={"position_bias": torch.zeros(1)}),
        "position bias", "position_bias under torch.compile",
    ),
    "paged": ("paged cache", lambda: a_call(kwargs={"cache": 1}), "paged cache", "cache under torch.compile"),
    "own window": (
        "own mask", lambda: a_call(mask=spec(WINDOW), kwargs={"sliding_window": 9}),
        "layer's own sliding window of 9", "layer's own mask",
    ),
    "window of the layer": (
        "own mask", lambda: a_call(kwargs={"sliding_window": 19}), "layer's own sliding window of 19", None
    ),
    "bidirectional": (
        "mask", lambda: a_call(mask=spec(mu.bidirectional_mask_function)),
        "bidirectional mask in a causal layer", OTHER,
    ),
    "causal mask": (
        "mask", lambda: a_call(kwargs={"is_causal": False}),
        "causal mask in a layer with is_causal=False", OTHER.replace("than causal", "than bidirectional"),
    ),
    "packing": (
        "packing", lambda: a_call(kwargs={"cu_seq_lens_k": torch.tensor([0, 20])}),
        None, "cu_seq_lens_k under torch.compile",
    ),
    "packing beside the mask": (
        "mask", lambda: a_call(kwargs={"cu_seq_lens_k": torch.tensor([0, 9, 20])}),
        "cu_seq_lens_k tells of 2 sequences, the mask of one", "cu_seq_lens_k under torch.compile",
    ),
    "inputs": ("inputs", with_watch, "q_norm did not run", None),
    "tokens": (
        "tokens", lambda: a_call(session_of(method=Video()), tokens=Tokens((), "no ids")),
        "vision tokens unknown: no ids", None,
    ),
}  # fmt: skip
ASKED_FOR = {"patch", "shape", "decoding", "own mask"}
UNCOUNTED = {"patch", "decoding"}


def test_every_rule_is_broken_once() -> None:
    eager = {rule for rule, _, reason, _ in BROKEN.values() if reason is not None}
    traced = {rule for rule, _, _, reason in BROKEN.values() if reason is not None}
    # "packing" stands for what eagerly is part of the mask.
    # What is not ours is broken in tests/hosts/test_changes.py, for it changes more than the call.
    assert {rule.name for rule in RULES if rule.eager} - eager == {"context parallelism", "not ours"}
    assert {rule.name for rule in RULES if rule.traced} - traced == {"not ours"}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_says_its_reason_and_whether_it_is_a_fallback(case: str, traced: bool) -> None:
    rule, make, *reasons = BROKEN[case]
    found = decide(make(), traced)
    assert found.reason == reasons[traced]
    if found.reason is not None:
        assert found.fallback == (rule not in ASKED_FOR)
        assert found.counted == (found.reason != "paused" and not (traced and rule in UNCOUNTED))


FINE: dict[str, Callable[[], LayerCall]] = {
    "as it is": a_call,
    "as many queries as need be": lambda: a_call(
        q=torch.zeros(2, 4, 16, 8), mask=spec(q_length=16, kv_length=20, q_offset=4)
    ),
    "a window as wide as the text": lambda: a_call(kwargs={"sliding_window": 20}),
    "no dropout": lambda: a_call(kwargs={"dropout": 0.0, "scaling": 1, "is_causal": None}),
    "no mask where none is needed": lambda: a_call(mask=None, kwargs={"is_causal": False}),
    "unknown tokens of no account": lambda: a_call(tokens=Tokens((), "no ids")),
}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("case", FINE)
def test_what_no_rule_forbids_is_sparse(case: str, traced: bool) -> None:
    assert decide(FINE[case](), traced) == SPARSE


def test_few_queries_are_for_the_decoder_whatever_the_method_and_the_policy_say_of_prompts() -> None:
    few: dict[str, Any] = {"q": torch.zeros(2, 4, 3, 8), "mask": spec(q_length=3, kv_length=20, q_offset=17)}
    for session in (
        session_of(),
        session_of(dense_layers=1),
        session_of(method=hsa.get_method("dense")(), decoder=EXACT),
    ):
        assert decide(a_call(session, **few)) == SPARSE
        assert decide(a_call(session, **few), traced=True).reason in ("decoding", "method dense")
    assert decide(a_call(session_of(method=Video()), tokens=Tokens((), "no ids"), **few)) == SPARSE
    assert decide(a_call(paused(), **few)).reason == "paused"


@pytest.mark.parametrize("decoder", [EXACT, Decoder("sparse", Whole())], ids=["exact", "sparse"])
def test_only_sparse_decoding_that_is_lost_is_a_fallback(decoder: Decoder) -> None:
    few: dict[str, Any] = {"q": torch.zeros(2, 4, 3, 8), "mask": spec(q_length=3, kv_length=20, q_offset=17)}
    found = decide(a_call(session_of(decoder=decoder), **few, kwargs={"dropout": 0.1}))
    assert found.reason == "dropout of 0.1 on the attention weights" and found.fallback == (decoder is not EXACT)


def test_a_share_of_a_rank_raises_unless_the_model_runs_as_before() -> None:
    whole: dict[str, Any] = {"mask": None, "kwargs": {"is_causal": True}}
    with pytest.raises(ValueError, match="context parallelism"):
        decide(a_call(**whole))
    assert decide(a_call(paused(), **whole)).reason == "paused"
    assert decide(a_call(**whole), traced=True).reason == "no mask was described to the layer"


def test_the_first_rule_that_holds_is_the_reason() -> None:
    both = {"dropout": 0.1, "position_bias": torch.zeros(1)}
    assert decide(a_call(kwargs=both)).reason == "dropout of 0.1 on the attention weights"
    assert decide(a_call(kwargs=both, mask=None)).reason == "no mask was described to the layer"


def test_inputs_reach_the_context() -> None:
    call, inputs = with_watch(), LayerInputs()
    object.__setattr__(call.state, "watch", SimpleNamespace(inputs=lambda *_: inputs))
    assert decide(call) == SPARSE and call.ctx.inputs is inputs


def test_the_places_of_a_static_cache_are_not_taken_for_keys() -> None:
    """By the shapes of the tensors there are 60 keys, by the mask 20."""
    for fewest, reasons in ((21, {"fewer than 21 keys (min_tokens=21)": 1}), (20, {})):
        call = a_call(session_of(min_tokens=fewest), k=torch.zeros(2, 2, 60, 8), mask=spec(kv_len=60))
        assert decide(call) == SPARSE and call.ctx.layout == TokenLayout.causal(20)
        done = attend_sparse(call.state, call.module, call.q, call.k, call.k, call.mask, {})
        assert (done is None) == bool(reasons) and call.state.record.dense_reasons == reasons
