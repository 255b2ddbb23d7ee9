"""Which step of how many a forward is told, whatever time does: pipelines of every kind, and loops of one's own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse_attn as hsa
from hf_sparse_attn.hosts import diffusers_loop
from hf_sparse_attn.hosts.diffusers_clock import GUESSED
from tests.support import tiny_wan
from tests.support.tiny_diffusers import tiny_model, tiny_sizes
from tests.support.tiny_wan import Spy, run

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE: dict[str, Any] = {"method": "sliding_window", "window": 3, "sink": 1, "block_size": 16, "min_tokens": 0}
Told = list[tuple[int, int]]


def told(patched: Any, act: Callable[[], object]) -> Told:
    """Step and number of steps of every forward while `act` runs; equal ones after one another once."""
    spy = Spy()
    with hsa.patch(patched, spy, min_tokens=0):
        act()
    return [one for one, _ in groupby((c.step, c.num_steps) for c in spy.seen if c.layer == 0)]


def steps(number: int) -> Told:
    return [(step, number) for step in range(number)]


def flux(kind: str = "FluxPipeline", scheduler: Any = None) -> Any:
    """A pipeline that is called with embeddings alone."""
    cls = diffusers.FluxTransformer2DModel
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.1)
    transformer = tiny_model(cls, {**tiny_sizes(cls), "in_channels": 4, "guidance_embeds": False})
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = getattr(diffusers, kind)(transformer=transformer, vae=vae, scheduler=scheduler, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, number: int, **more: Any) -> None:
    dtype = pipe.transformer.dtype
    embeds = {
        "prompt_embeds": torch.ones(1, 6, 16, dtype=dtype),
        "pooled_prompt_embeds": torch.ones(1, 8, dtype=dtype),
    }
    pipe(**embeds, height=14, width=18, num_inference_steps=number, output_type="latent", **more)


def image(number: int, strength: float) -> Callable[[Any], None]:
    return lambda pipe: draw(pipe, number, image=torch.rand(1, 3, 14, 18), strength=strength)


@pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_strength_counts_the_steps_that_are_run(kind: str) -> None:
    pipe, more = flux(kind), {"image": torch.rand(1, 3, 14, 18), "strength": 0.3}
    if kind == "FluxInpaintPipeline":
        more["mask_image"] = torch.ones(1, 1, 14, 18)
    assert told(pipe, lambda: draw(pipe, 10, **more)) == steps(3)
    with hsa.patch(pipe, dense_steps=0.25, strict=True, **SPARSE) as patch:
        draw(pipe, 10, **more)
    layer = patch.report().layers[0]
    assert (layer.sparse_calls, layer.reasons) == (2, {"dense_steps": 1})


def test_time_that_rises() -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    parts = {"transformer": tiny_model(diffusers.ZImageTransformer2DModel), "vae": vae}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(**parts, text_encoder=None, tokenizer=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt_embeds": [torch.randn(9, 16)], "guidance_scale": 0.0, "height": 20, "width": 28}
    assert told(pipe, lambda: pipe(**call, num_inference_steps=5, output_type="latent")) == steps(5)


@pytest.mark.parametrize(
    ("scheduler", "given", "ran"),
    [
        ("FlowMatchHeunDiscreteScheduler", 8, 15),
        ("FlowMatchHeunDiscreteScheduler", 2, 3),
        ("UniPCMultistepScheduler", 6, 6),
        ("DPMSolverMultistepScheduler", 6, 6),
    ],
)
def test_evaluations_of_a_solver(scheduler: str, given: int, ran: int) -> None:
    """Heun's method has two evaluations for each step but the last."""
    pipe = tiny_wan.pipeline()
    more = {} if "Heun" in scheduler else {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe.scheduler = getattr(diffusers, scheduler)(**more)
    assert told(pipe, lambda: tiny_wan.generate(pipe, steps=given)) == steps(ran)
    with hsa.patch(pipe, dense_steps=0.5, **SPARSE) as patch:
        tiny_wan.generate(pipe, steps=given)
    assert patch.report().layers[0].reasons == {"dense_steps": 2 * -(-ran // 2)}


def test_neighbours_of_equal_time() -> None:
    """In bfloat16 with shift 10, 50 steps leave 45 different times."""
    pipe = flux(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=10.0)).to(torch.bfloat16)
    times: list[float] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: times.append(float(given["timestep"][0])), with_kwargs=True
    )
    assert told(pipe, lambda: draw(pipe, 50)) == steps(50)
    hook.remove()
    assert len(times) == 50 and len(set(times)) < 50


def test_derived_pipelines_count_for_themselves() -> None:
    pipes = [flux()]
    second = diffusers.FluxImg2ImgPipeline.from_pipe(pipes[0])
    second.set_progress_bar_config(disable=True)

    def two_stages() -> None:
        draw(pipes[0], 4)
        image(10, 0.2)(second)
        image(10, 0.2)(second)

    # Equal ones after one another are those of two calls.
    assert told(pipes[0], two_stages) == [*steps(4), *steps(2), *steps(2)]
    assert told(second, two_stages) == [*steps(4), *steps(2), *steps(2)]
    patch = hsa.patch(pipes.pop(), dense_steps=0.25, **SPARSE)
    gc.collect()
    image(8, 1.0)(second)
    assert patch.report().layers[0].reasons == {"dense_steps": 2}


class Stop(Exception):
    pass


def test_nothing_is_left_of_an_aborted_run() -> None:
    pipe = flux()

    def abort(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise Stop
        return kept

    def act() -> None:
        with pytest.raises(Stop):
            draw(pipe, 6, callback_on_step_end=abort)
        draw(pipe, 4)

    assert told(pipe, act) == [*steps(6)[:3], *steps(4)]


def test_a_bare_call_after_an_aborted_run_is_a_guess() -> None:
    pipe = tiny_wan.pipeline()

    def abort(*_: Any) -> Any:
        raise Stop

    with hsa.patch(pipe, dense_steps=0.3, **SPARSE) as patch:
        with pytest.raises(Stop):
            pipe(
                prompt_embeds=torch.randn(1, 9, 32), negative_prompt_embeds=torch.randn(1, 9, 32), height=32, width=48,
                num_frames=9, num_inference_steps=4, output_type="latent", callback_on_step_end=abort,
            )  # fmt: skip
        assert not patch.report().notes
        wan_call(pipe.transformer, 500)
        assert patch.report().notes == (GUESSED,)


@pytest.mark.parametrize("kind", ["experts", "v2v", "ti2v"])
def test_two_experts_are_one_run(kind: str) -> None:
    pipe = tiny_wan.pipeline(kind)
    ran = 3 if kind == "v2v" else 6
    assert told(pipe, lambda: tiny_wan.generate(pipe, steps=6)) == steps(ran)


def test_one_transformer_in_two_pipelines_at_once() -> None:
    transformer = flux().transformer
    found: dict[int, Told] = {}
    spy = Spy()
    pipes = {number: flux() for number in (3, 5)}
    start = threading.Barrier(2)

    def work(number: int) -> None:
        own = threading.get_ident()
        start.wait()
        draw(pipes[number], number)
        found[number] = [told for ident, told in threads if ident == own]

    threads: list[tuple[int, tuple[int, int]]] = []

    class ByThread(list[Any]):
        def append(self, ctx: Any) -> None:
            if ctx.layer == 0:
                threads.append((threading.get_ident(), (ctx.step, ctx.num_steps)))

    object.__setattr__(spy, "seen", ByThread())
    for pipe in pipes.values():
        pipe.transformer = transformer
    with hsa.patch(transformer, spy, min_tokens=0):
        workers = [threading.Thread(target=work, args=(number,)) for number in pipes]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert found == {3: steps(3), 5: steps(5)}


# Loops of one's own.


def wan_call(model: nn.Module, time: Any) -> None:
    run(model, **tiny_wan.inputs(time=float(time)))


def euler(number: int) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(number)
    return scheduler


def numbered(model: nn.Module) -> None:
    scheduler = euler(4)
    for i, t in enumerate(scheduler.timesteps):
        assert i >= 0
        wan_call(model, t)


def bare(model: nn.Module) -> None:
    scheduler = euler(4)
    for t in scheduler.timesteps:
        wan_call(model, t)
        wan_call(model, t)


def from_the_middle(model: nn.Module) -> None:
    scheduler = euler(9)
    timesteps = scheduler.timesteps[5:]
    for _, t in enumerate(timesteps):
        wan_call(model, t)


def sliced(model: nn.Module) -> None:
    scheduler = euler(9)
    for _, t in enumerate(scheduler.timesteps[5:]):
        wan_call(model, t)


def handed_out(model: nn.Module) -> None:
    scheduler = euler(9)

    def rest() -> Any:
        return scheduler.timesteps[5:]

    for _, t in enumerate(rest()):
        wan_call(model, t)


def rising(model: nn.Module) -> None:
    scheduler = euler(4)
    for t in scheduler.timesteps:
        wan_call(model, 1000 - t)


def in_a_function(model: nn.Module) -> None:
    scheduler = euler(4)

    def one(time: Any) -> None:
        for _ in range(2):
            wan_call(model, time)

    for t in scheduler.timesteps:
        one(t)


def in_a_task(model: nn.Module) -> None:
    async def generate() -> None:
        scheduler = euler(4)
        for t in scheduler.timesteps:
            await asyncio.sleep(0)
            wan_call(model, t)

    asyncio.run(generate())


def in_a_generator(model: nn.Module) -> None:
    def generate() -> Iterator[int]:
        scheduler = euler(4)
        for i, t in enumerate(scheduler.timesteps):
            wan_call(model, t)
            yield i

    list(generate())


@pytest.mark.parametrize(
    "loop",
    [numbered, bare, from_the_middle, sliced, handed_out, rising, in_a_function, in_a_task, in_a_generator],
    ids=lambda f: f.__name__,
)
def test_a_loop_over_the_timesteps_of_a_scheduler(loop: Callable[[nn.Module], None]) -> None:
    model = tiny_wan.transformer()
    assert told(model, lambda: loop(model)) == steps(4)
    with hsa.patch(model, dense_steps=0.25, strict=True, **SPARSE) as patch:
        loop(model)
    assert set(patch.report().layers[0].reasons) == {"dense_steps"} and not patch.report().notes


def test_other_loops_are_none_over_steps() -> None:
    """Over levels of noise that were drawn, for one: times are counted, which is a guess and told as one."""
    model = tiny_wan.transformer()
    pipe = tiny_wan.pipeline()
    pipe.scheduler.set_timesteps(9)

    def act() -> None:
        timesteps = torch.tensor([900.0, 500.0, 100.0])
        for _, level in enumerate(timesteps):
            wan_call(model, level)

    pipe.transformer = model
    spy = Spy()
    with hsa.patch(model, spy, min_tokens=0):
        act()
    assert [c.step for c in spy.seen if c.layer == 0] == [0, 1, 2]
    with hsa.patch(pipe, dense_steps=0.3, **SPARSE) as patch:
        act()
    assert patch.report().notes == (GUESSED,) and GUESSED in str(patch.report())
    with hsa.patch(pipe, **SPARSE) as patch:
        act()
    # Nothing depends on it here.
    assert not patch.report().notes


@pytest.mark.parametrize(
    ("times", "want"),
    [
        ((900, 900, 500, 500, 100), [0, 0, 1, 1, 2]),
        ((100, 500, 900, 100, 500), [0, 1, 2, 0, 1]),
        ((900, 500, 900, 500), [0, 1, 0, 1]),
    ],
    ids=["falls", "rises", "anew"],
)
def test_a_guess_by_time(times: tuple[int, ...], want: list[int]) -> None:
    model, spy = tiny_wan.transformer(), Spy()
    with hsa.patch(model, spy, min_tokens=0):
        for time in times:
            wan_call(model, time)
    assert [c.step for c in spy.seen if c.layer == 0] == want


def test_frames_that_stand_still_one_by_one() -> None:
    """Asynchronous diffusion forcing without a loop that could be read: time goes on as long as any frame's does."""
    model, spy = tiny_wan.transformer(), Spy()
    given = tiny_wan.inputs()
    tokens = 5 * 7 * 13
    with hsa.patch(model, spy, min_tokens=0):
        for frames in ((900, 900, 900), (500, 900, 900), (100, 500, 900), (0, 100, 500), (0, 0, 100)):
            each = torch.tensor(frames).repeat_interleave(-(-tokens // 3))[:tokens]
            run(model, **{**given, "timestep": each[None].float()})
    assert [c.step for c in spy.seen if c.layer == 0] == [0, 1, 2, 3, 4]


def test_what_the_user_announces_goes_before_a_loop_of_his_own() -> None:
    model = tiny_wan.transformer()

    def act() -> None:
        scheduler = euler(4)
        for i, t in enumerate(scheduler.timesteps):
            with model.cache_context("cond", step_index=2 * i, num_inference_steps=8):
                wan_call(model, t)

    assert told(model, act) == [(0, 8), (2, 8), (4, 8), (6, 8)]


def test_shares_of_a_run_of_unknown_length_are_no_shares() -> None:
    """A method that goes by the share of the run is dense where nobody knows its length, as dense_steps are."""
    model, spy = tiny_wan.transformer(), Spy()
    object.__setattr__(spy, "by_steps", True)
    with hsa.patch(model, spy, min_tokens=0) as patch:
        wan_call(model, 500)
    (reason,) = patch.report().layers[0].reasons
    assert reason.startswith("number of steps unknown") and not spy.seen
    with hsa.patch(model, spy, min_tokens=0, strict=True), pytest.raises(hsa.DenseFallback, match="number of steps"):
        wan_call(model, 500)


# What the look at the stack leaves behind: nothing.


def test_variables_are_neither_kept_nor_changed() -> None:
    model = tiny_wan.transformer()
    kept: list[Any] = []

    def generate() -> None:
        scheduler = euler(3)
        latents = nn.Parameter(torch.zeros(3))
        kept.append(weakref.ref(latents))
        for i, t in enumerate(scheduler.timesteps):
            wan_call(model, t)
            latents = None  # type: ignore[assignment]
            assert i > 1 or kept[0]() is None
        assert latents is None

    def with_a_snapshot() -> dict[str, Any]:
        scheduler = euler(3)
        settings = locals()
        for t in scheduler.timesteps:
            wan_call(model, t)
        return settings

    spy = Spy()
    with hsa.patch(model, spy, min_tokens=0):
        generate()
        assert set(with_a_snapshot()) == {"scheduler", "model"}
    assert [c.step for c in spy.seen if c.layer == 0] == [0, 1, 2] * 2


def test_loops_of_a_function() -> None:
    def act(items: list[int]) -> Iterator[int]:
        for a, (b, c) in enumerate(zip(items, items, strict=True)):
            yield a + b + c
            for d in items:
                yield d + 1

    loops = diffusers_loop._read(act.__code__).loops
    assert [loop.names for loop in loops] == [("a", "b", "c"), ("d",)]
    assert loops[0].begin < loops[1].begin < loops[1].end <= loops[0].end


def test_a_compiled_transformer_in_a_pipeline() -> None:
    pipe = tiny_wan.pipeline()
    with hsa.patch(pipe, dense_steps=0.5, **SPARSE) as patch:
        pipe.transformer.compile(backend="eager")
        tiny_wan.generate(pipe, steps=4)
    layer = patch.report().layers[0]
    assert (layer.sparse_calls, layer.reasons) == (4, {"dense_steps": 4})
