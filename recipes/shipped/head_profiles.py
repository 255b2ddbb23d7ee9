"""Make the head profiles that come with the package: high, balanced and fast for each model.

    python -m recipes.shipped.head_profiles [--output hf_sparse_attn/assets/profiles] [smollm2 ...]

The shipped models, and those of pretrained/ where their packages are installed. Each is profiled on some inputs
and then run, dense and by the profile, on others that are held out; texts at up to four times the length as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.presets import BUDGETS
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.known import SHIPPED
from hf_sparse_attn.profiling.candidates import TIGHT
from hf_sparse_attn.profiling.run import at_budget
from hf_sparse_attn.shipped.byte_llama import default_metric


class Subject(NamedTuple):
    """A model and its inputs.

    Args:
        model: as `profile` takes it.
        batches: to choose by.
        held_out: to measure on.
        source: what they are, in words.
        query_blocks: as in `profile`.
    """

    model: Any
    batches: list[Any]
    held_out: list[Any]
    source: str
    query_blocks: int | None = None


def smollm2() -> Subject:
    """Texts of 2,048 tokens; held out are other texts, of 4,096 and 8,192 tokens besides."""
    from hf_sparse_attn.pretrained import smollm2 as weights
    from hf_sparse_attn.pretrained import texts

    tokenizer = weights.load_tokenizer()

    def batch(text: str, tokens: int) -> dict[str, Any]:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:tokens]])
        return {"input_ids": ids, "labels": ids}

    held = list(texts.HELD_OUT.values())
    pairs = [f"{a}\n\n{b}" for a, b in zip(held[::2], held[1::2], strict=True)]
    longer = (
        [batch(text, 2048) for text in held[:8]] + [batch(text, 4096) for text in held[:3]] + [batch(pairs[1], 8192)]
    )
    chosen = [batch(text, 2048) for text in list(texts.CALIBRATION.values())[:4]]
    return Subject(weights.load_model(torch.bfloat16), chosen, longer, "standard library: code and prose; bfloat16")


def dinov2() -> Subject:
    """Photographs of 784 pixels a side: 3,137 tokens."""
    from hf_sparse_attn.pretrained import dinov2 as weights
    from hf_sparse_attn.pretrained import images

    def batches(count: int, names: Any) -> list[Any]:
        return [{"pixel_values": weights.pixels(image, 784)} for image in images.images(count, 0, names)]

    chosen, held = batches(len(images.CALIBRATION), images.CALIBRATION), batches(6, images.HELD_OUT)
    return Subject(weights.load_model(), chosen, held, "photographs of 784 pixels", query_blocks=10)


def whisper() -> Subject:
    """The encoder, on spoken sentences: 1,500 tokens."""
    from hf_sparse_attn.pretrained import speech
    from hf_sparse_attn.pretrained import whisper as weights

    extractor = weights.load_extractor()

    def batch(sentence: str) -> dict[str, Any]:
        found = extractor(speech.speak(sentence), sampling_rate=speech.RATE, return_tensors="pt")
        return {"input_features": found["input_features"]}

    chosen = [batch(sentence) for sentence in speech.calibration_sentences[:4]]
    held = [batch(sentence) for sentence in speech.sentences[:6]]
    return Subject(weights.load_model().model.encoder, chosen, held, "synthesised speech")


def byte_llama() -> Subject:
    """Documents of 4,096 bytes with needles in them."""
    from hf_sparse_attn.shipped.byte_llama import load_model
    from hf_sparse_attn.shipped.corpus import Split, needle_document

    def batch(seed: int, split: Split, tokens: int = 4096) -> dict[str, Any]:
        document = needle_document(tokens, needles=16, seed=seed, split=split)
        return {"input_ids": document.token_ids, "labels": document.token_ids, "needles": document.questions}

    chosen = [batch(seed, "train") for seed in (0, 1)]
    held = [batch(1000 + seed, "heldout") for seed in range(6)]
    return Subject(load_model(), chosen, held, "standard library, needles")


def moving_wan() -> Subject:
    """Denoising runs over classes of scenes."""
    from hf_sparse_attn.shipped import moving
    from hf_sparse_attn.shipped.moving_scenes import draw_classes

    def batches(count: int, first: int) -> list[Any]:
        def run(scene: Any, seed: int) -> Callable[[Any], Any]:
            return lambda model: moving.sample(model, [scene], seed=seed)

        return [run(scene, first + i) for i, scene in enumerate(draw_classes(count, first))]

    return Subject(moving.load_moving_wan(), batches(4, 0), batches(4, 1000), "synthetic moving scenes")


SUBJECTS: dict[str, Callable[[], Subject]] = {
    made.__name__: made for made in (byte_llama, moving_wan, smollm2, dinov2, whisper)
}


def main() -> None:
    """Makes the profiles that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SUBJECTS)}; all if not given")
    parser.add_argument("--output", type=Path, default=SHIPPED)
    args = parser.parse_args()
    for name in args.names or SUBJECTS:
        made: HeadProfile | None = None
        subject = SUBJECTS[name]()
        for quality, budget in BUDGETS.items():
            if made is None or (budget <= TIGHT) != (made.budget["density"] <= TIGHT):
                found = made = hsa.profile(
                    subject.model, subject.batches, budget=budget, metric=default_metric(name), maps=0,
                    query_blocks=subject.query_blocks, held_out=subject.held_out, source=subject.source,
                )  # fmt: skip
            else:
                found = at_budget(subject.model, made, subject.batches, budget, subject.held_out)
            replace(found, measurements=None).save_pretrained(args.output / name / quality)
            for row in found.evaluation:
                print(
                    name,
                    quality,
                    *(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in row.items()),
                )


if __name__ == "__main__":
    main()
