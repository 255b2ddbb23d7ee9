"""Tiny text encoders and tokenizers with random weights, built in memory, for the tiny video pipelines."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import tiny_hunyuan, tiny_wan


def _tokenizer(length: int, text: str, **tokens: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(tokens.values())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text] * 4, trainer)
    shape = f"{tokens['bos_token']} $A {tokens['eos_token']}" if "bos_token" in tokens else f"$A {tokens['eos_token']}"
    pairs = [(token, made.token_to_id(token)) for token in special]
    made.post_processor = processors.TemplateProcessing(single=shape, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, padding_side="right", **tokens)


def wan(kind: str = "t2v") -> Any:
    """The pipeline of tiny_wan with a T5 of width 32."""
    from transformers import T5Config, T5EncoderModel

    pipe = tiny_wan.pipeline(kind)
    tokenizer = _tokenizer(512, "a cat walks on the grass", pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(1)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=T5EncoderModel(config).eval())
    return pipe


def hunyuan() -> Any:
    """The pipeline of tiny_hunyuan with a Llama of width 16 and a CLIP of width 8.

    Their tokenizer knows the words of the pipeline's template, which in bytes would leave no room for a prompt.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    pipe = tiny_hunyuan.pipeline()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    first, second = (_tokenizer(n, DEFAULT_PROMPT_TEMPLATE["template"], **tokens) for n in (512, 77))
    sizes = {"intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": len(first)}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(1)
    llama = LlamaModel(LlamaConfig(hidden_size=16, max_position_embeddings=512, **sizes, **ids))
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=8, projection_dim=32, **sizes, **ids))
    pipe.register_modules(tokenizer=first, tokenizer_2=second, text_encoder=llama.eval(), text_encoder_2=clip.eval())
    return pipe
