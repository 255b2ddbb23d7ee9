"""What the transformer classes of diffusers need to be built small and run, besides rules by name."""

from __future__ import annotations

import torch

from tests.support.tiny_diffusers_rules import (
    CHANNELS,
    FRAMES,
    HEAD_DIM,
    HEADS,
    HEIGHT,
    POOLED,
    TEXT,
    WIDE,
    WIDTH,
    Tiny,
    axial_rotary,
    image_ids,
    position_ids,
    rotary,
)

_INNER = HEADS * HEAD_DIM
_ROWS, _COLUMNS = HEIGHT // 2, WIDE // 2
_IMAGE, _VIDEO = _ROWS * _COLUMNS, FRAMES * _ROWS * _COLUMNS
_VIDEO_GRID, _IMAGE_GRID = (FRAMES, _ROWS, _COLUMNS), (1, _ROWS, _COLUMNS)
_HALF = torch.tensor([0.5])
_FOUR_AXES = (6, 6, 6, 6)
# Text of which six tokens are valid.
_SIX = torch.arange(TEXT)[None] < 6


TABLE: dict[str, Tiny] = {
    "AceStepTransformer1DModel": Tiny(
        {"audio_acoustic_hidden_dim": CHANNELS, "in_channels": 3 * CHANNELS, "sliding_window": 8},
        {
            "hidden_states": (70, CHANNELS),
            "timestep": _HALF,
            "timestep_r": torch.tensor([0.4]),
            "context_latents": (70, 2 * CHANNELS),
        },
        dense=r".*layers\.0\..*",
    ),
    "AllegroTransformer3DModel": Tiny(
        {"sample_width": WIDE, "sample_height": HEIGHT, "sample_frames": FRAMES},
        {
            "attention_mask": torch.ones(1, FRAMES, HEIGHT, WIDE),
            "image_rotary_emb": lambda random: axial_rotary(),
        },
        grid=_VIDEO_GRID,
    ),
    "AnyFlowTransformer3DModel": Tiny(
        {},
        {
            "hidden_states": (FRAMES, CHANNELS, HEIGHT, WIDE),
            "timestep": torch.full((1, FRAMES), 500.0),
            "r_timestep": torch.full((1, FRAMES), 400.0),
        },
    ),
    "AuraFlowTransformer2DModel": Tiny({"sample_size": 18, "pos_embed_max_size": 256}, {"timestep": _HALF}),
    "BriaFibo2Transformer2DModel": Tiny(
        {
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_lens": (64, 64, 64),
        },
        {"timestep": _HALF, "encoder_hidden_states": (2, TEXT, WIDTH), "encoder_attention_mask": None},
    ),
    "BriaFiboTransformer2DModel": Tiny(
        {}, {"timestep": _HALF, "text_encoder_layers": lambda random: [random(TEXT, WIDTH) for _ in range(3)]}
    ),
    "BriaTransformer2DModel": Tiny({}, {"timestep": _HALF}),
    "ChromaTransformer2DModel": Tiny(
        {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        {"timestep": _HALF},
        grid=_IMAGE_GRID,
        before=TEXT,
        axes=(1,),
    ),
    "ChronoEditTransformer3DModel": Tiny(grid=_VIDEO_GRID),
    "CogVideoXTransformer3DModel": Tiny(
        {"sample_width": WIDE, "sample_height": HEIGHT, "sample_frames": 9, "max_text_seq_length": TEXT},
        {"hidden_states": (FRAMES, CHANNELS, HEIGHT, WIDE)},
        grid=_VIDEO_GRID,
        before=TEXT,
        axes=(1, 3, 4),
    ),
    "CogView3PlusTransformer2DModel": Tiny({"pos_embed_max_size": 16, "sample_size": 16}),
    "CogView4Transformer2DModel": Tiny({"pos_embed_max_size": 16, "sample_size": 16, "rope_axes_dim": (8, 8)}),
    "ConsisIDTransformer3DModel": Tiny(
        {"sample_width": WIDE, "sample_height": HEIGHT, "sample_frames": 9, "max_text_seq_length": TEXT},
        {"hidden_states": (FRAMES, CHANNELS, HEIGHT, WIDE)},
    ),
    "CosmosTransformer3DModel": Tiny(
        {"adaln_lora_dim": 4, "max_size": (4, 32, 32), "extra_pos_embed_type": None, "concat_padding_mask": False},
        {"attention_mask": torch.ones(1, TEXT).bool(), "fps": 30},
        grid=_VIDEO_GRID,
    ),
    "DiTTransformer2DModel": Tiny(
        {"sample_size": 16, "num_embeds_ada_norm": 1000},
        {"hidden_states": (CHANNELS, 16, 16), "class_labels": torch.tensor([3])},
    ),
    "DreamLiteTransformer2DModel": Tiny({"norm_num_groups": 2, "cross_attention_dim": WIDTH}),
    "EasyAnimateTransformer3DModel": Tiny(
        {"patch_size": 2, "attention_head_dim": 16, "sample_width": WIDE, "sample_height": HEIGHT}
    ),
    "ErnieImageTransformer2DModel": Tiny({}, {"text_bth": (TEXT, WIDTH), "text_lens": torch.tensor([6])}),
    "Flux2Transformer2DModel": Tiny(
        {"axes_dims_rope": _FOUR_AXES},
        {
            "timestep": _HALF,
            "img_ids": image_ids(axes=4),
            "txt_ids": torch.zeros(TEXT, 4),
            "guidance": torch.tensor([4.0]),
        },
    ),
    "Flux3Transformer2DModel": Tiny(
        {"axes_dims_rope": _FOUR_AXES, "cond_in_channels": CHANNELS},
        {"timestep": _HALF, "img_ids": image_ids(axes=4), "txt_ids": torch.zeros(TEXT, 4)},
    ),
    "FluxTransformer2DModel": Tiny(
        {},
        {"timestep": _HALF},
        grid=_IMAGE_GRID,
        before=TEXT,
        axes=(1,),
    ),
    "GlmImageTransformer2DModel": Tiny(
        {"prior_vq_quantizer_codebook_size": 32},
        {
            "prior_token_id": torch.arange(_IMAGE)[None] % 32,
            "prior_token_drop": torch.zeros(1, _IMAGE).bool(),
        },
    ),
    "HeliosTransformer3DModel": Tiny(
        {},
        {
            "indices_hidden_states": torch.arange(20, 20 + FRAMES)[None],
            "indices_latents_history_short": torch.arange(2)[None],
            "latents_history_short": (CHANNELS, 2, HEIGHT, WIDE),
        },
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {
            "patch_size": 2,
            "caption_channels": [WIDTH, WIDTH],
            "text_emb_dim": POOLED,
            "axes_dims_rope": (8, 8, 8),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1, 2],
        },
        {
            "hidden_states": (CHANNELS, HEIGHT, WIDE),
            "img_ids": None,
            "timesteps": torch.tensor([500.0]),
            "encoder_hidden_states_t5": (TEXT, WIDTH),
            "encoder_hidden_states_llama3": lambda random: [random(TEXT, WIDTH) for _ in range(3)],
            "pooled_embeds": (POOLED,),
        },
    ),
    "HunyuanDiT2DModel": Tiny(
        {
            "patch_size": 2,
            "cross_attention_dim": WIDTH,
            "cross_attention_dim_t5": WIDTH,
            "pooled_projection_dim": POOLED,
            "text_len": TEXT,
            "text_len_t5": 5,
            "sample_size": 16,
        },
        {
            "text_embedding_mask": torch.ones(1, TEXT),
            "encoder_hidden_states_t5": (5, WIDTH),
            "text_embedding_mask_t5": torch.ones(1, 5),
            "image_meta_size": torch.ones(1, 6),
            "style": torch.zeros(1).long(),
            "image_rotary_emb": rotary(_IMAGE, HEAD_DIM),
        },
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {"rope_axes_dim": (12, 12), "patch_size": (1, 1)},
        {
            "encoder_attention_mask": _SIX.long(),
            "hidden_states": (CHANNELS, _ROWS, _COLUMNS),
        },
        grid=_IMAGE_GRID,
        after=6,
        axes=(2, 3),
        patch=(1, 1, 1),
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {"text_embed_2_dim": 6, "image_embed_dim": 10, "patch_size": None},
        {
            "hidden_states": (CHANNELS, FRAMES, _ROWS, _COLUMNS),
            "encoder_attention_mask": _SIX.long(),
            "encoder_hidden_states_2": (5, 6),
            "encoder_attention_mask_2": (torch.arange(5)[None] < 3).long(),
            "image_embeds": torch.zeros(1, 3, 10),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        {"has_image_proj": True, "image_proj_dim": 10, "has_clean_x_embedder": True},
        {
            "encoder_attention_mask": _SIX.long(),
            "guidance": torch.tensor([6000.0]),
            "image_embeds": (2, 10),
            "indices_latents": torch.arange(20, 20 + FRAMES),
            "latents_clean": (CHANNELS, 2, HEIGHT, WIDE),
            "indices_latents_clean": torch.arange(2),
            "latents_history_2x": (CHANNELS, 3, HEIGHT, WIDE),
            "indices_latents_history_2x": torch.arange(3),
            "latents_history_4x": (CHANNELS, 9, HEIGHT, WIDE),
            "indices_latents_history_4x": torch.arange(9),
        },
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        {}, {"encoder_attention_mask": _SIX.long(), "guidance": torch.tensor([6000.0])}
    ),
    "Ideogram4Transformer2DModel": Tiny(
        {"mrope_section": (4, 4, 4)},
        {
            "hidden_states": (TEXT + _IMAGE, CHANNELS),
            "timestep": _HALF,
            "encoder_hidden_states": (TEXT + _IMAGE, WIDTH),
            "position_ids": position_ids()[None].long(),
            "segment_ids": torch.zeros(1, TEXT + _IMAGE).long(),
            # Text is 3, the image 2.
            "indicator": torch.tensor([3] * TEXT + [2] * _IMAGE)[None],
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        {}, {"hidden_states": (_VIDEO, CHANNELS, 1, 2, 2), "shape_list": [[(FRAMES, _ROWS, _COLUMNS)]]}
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {"time_dim": 16},
        {
            "hidden_states": (FRAMES, HEIGHT, WIDE, CHANNELS),
            "visual_rope_pos": (torch.arange(FRAMES), torch.arange(_ROWS), torch.arange(_COLUMNS)),
            "text_rope_pos": torch.arange(TEXT),
        },
        grid=_VIDEO_GRID,
        axes=(1, 2, 3),
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {"time_dim": 16, "in_audio_dim": CHANNELS, "out_audio_dim": CHANNELS},
        {
            "hidden_states": (FRAMES, HEIGHT, WIDE, 2 * CHANNELS + 1),
            "audio_hidden_states": (20, CHANNELS),
            "encoder_attention_mask": None,
        },
    ),
    "Krea2Transformer2DModel": Tiny(
        {"num_text_layers": 3, "timestep_embed_dim": 16},
        {
            "hidden_states": (_IMAGE, CHANNELS),
            "encoder_hidden_states": (TEXT, 3, WIDTH),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "timestep": _HALF,
            "position_ids": position_ids(),
        },
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        {
            "audio_in_channels": CHANNELS,
            "audio_out_channels": CHANNELS,
            "audio_attention_head_dim": 12,
            "audio_cross_attention_dim": HEAD_DIM,
        },
        {
            "hidden_states": (_VIDEO, CHANNELS),
            "audio_hidden_states": (20, CHANNELS),
            "audio_encoder_hidden_states": (TEXT, WIDTH),
            "audio_encoder_attention_mask": torch.ones(1, TEXT),
            "audio_num_frames": 20,
            "fps": 25.0,
        },
        grid=_VIDEO_GRID,
        axes=(1,),
    ),
    "LTXVideoTransformer3DModel": Tiny({}, {"hidden_states": (_VIDEO, CHANNELS)}, grid=_VIDEO_GRID, axes=(1,)),
    "LatteTransformer3DModel": Tiny(
        {
            "sample_size": 16,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": FRAMES,
        },
        {"hidden_states": (CHANNELS, FRAMES, 16, 16), "encoder_attention_mask": None},
        dense=".*temporal.*",
    ),
    "LongCatAudioDiTTransformer": Tiny(
        {}, {"hidden_states": (70, CHANNELS), "encoder_attention_mask": torch.ones(1, TEXT).bool()}
    ),
    "LongCatImageTransformer2DModel": Tiny({"pooled_projection_dim": WIDTH}, {"timestep": _HALF}),
    "Lumina2Transformer2DModel": Tiny(
        {"sample_size": 16, "axes_lens": (300, 32, 32), "num_kv_heads": 1},
        {"timestep": _HALF, "encoder_attention_mask": torch.ones(1, TEXT).bool()},
    ),
    "LuminaNextDiT2DModel": Tiny(
        {"cross_attention_dim": WIDTH, "sample_size": 16},
        {
            "timestep": _HALF,
            "encoder_mask": torch.ones(1, TEXT),
            "cross_attention_kwargs": {},
            "image_rotary_emb": torch.polar(torch.ones(16, 16, 12), torch.arange(3072.0).reshape(16, 16, 12).sin()),
        },
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        {"audio_in_channels": CHANNELS, "rope_freq_dim": 4, "hidden_size": _INNER},
        {
            "hidden_states": (_VIDEO, CHANNELS * 4),
            "audio_hidden_states": (20, CHANNELS),
            "timestep": _HALF,
            "timestep_indices": torch.zeros(_VIDEO + TEXT + 20).long(),
            "token_tags": torch.tensor([1] * TEXT + [0] * _VIDEO + [2] * 20),
            "position_ids": torch.arange(_VIDEO + TEXT + 20)[:, None].expand(-1, 3),
            "video_indices": torch.arange(TEXT, TEXT + _VIDEO),
            "audio_indices": torch.arange(TEXT + _VIDEO, TEXT + _VIDEO + 20),
            "text_indices": torch.arange(TEXT),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        {"rotary_dim": 8, "fourier_embedding_dim": 16},
        {"hidden_states": (CHANNELS, 70), "timestep": _HALF, "encoder_hidden_states": (70, 16)},
    ),
    "MochiTransformer3DModel": Tiny(
        {"max_sequence_length": TEXT}, {"encoder_attention_mask": _SIX}, grid=_VIDEO_GRID, after=6
    ),
    "OvisImageTransformer2DModel": Tiny({}, {"timestep": _HALF}),
    "PixArtTransformer2DModel": Tiny(
        {"sample_size": 16},
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": None},
    ),
    "QwenImageTransformer2DModel": Tiny(
        {"out_channels": 1}, {"timestep": _HALF}, grid=_IMAGE_GRID, before=TEXT, axes=(1,)
    ),
    "SD3Transformer2DModel": Tiny(
        {"sample_size": 18, "pos_embed_max_size": 16}, grid=_IMAGE_GRID, after=TEXT, axes=(2, 3)
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        {},
        {
            "hidden_states": (_VIDEO, CHANNELS),
            "timestep": torch.full((1, _VIDEO), 500.0),
            "video_rotary_emb": tuple(t[None] for t in rotary(_VIDEO, _INNER)),
        },
    ),
    "SkyReelsV2Transformer3DModel": Tiny(grid=_VIDEO_GRID),
    "StableAudio3DiTModel": Tiny(
        {"num_memory_tokens": 4, "local_add_cond_dim": 6},
        {
            "hidden_states": (CHANNELS, 70),
            "timestep": _HALF,
            "global_hidden_states": (WIDTH,),
            "local_add_cond": (6, 70),
        },
    ),
    "StableAudioDiTModel": Tiny(
        {
            "sample_size": 64,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": HEAD_DIM,
            "time_proj_dim": 8,
            "global_states_input_dim": POOLED,
            "cross_attention_input_dim": WIDTH,
        },
        {
            "hidden_states": (CHANNELS, 63),
            "timestep": _HALF,
            "global_hidden_states": (1, POOLED),
            "encoder_attention_mask": None,
            "rotary_embedding": rotary(64, HEAD_DIM // 2),
        },
    ),
    "Transformer2DModel": Tiny(
        {"norm_num_groups": 2, "cross_attention_dim": WIDTH, "caption_channels": None},
        {"timestep": None, "encoder_attention_mask": None},
    ),
    "TransformerTemporalModel": Tiny(
        {"norm_num_groups": 2, "cross_attention_dim": None},
        {
            "hidden_states": lambda random: random(20, CHANNELS, 4, 5)[0],
            "encoder_hidden_states": None,
            "timestep": None,
            "num_frames": 20,
        },
    ),
    "WanAnimateTransformer3DModel": Tiny(
        {
            "in_channels": 2 * CHANNELS + 4,
            "latent_channels": CHANNELS,
            "image_dim": 12,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8},
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "inject_face_latents_blocks": 1,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
        },
        {
            "hidden_states": (2 * CHANNELS + 4, FRAMES + 1, HEIGHT, WIDE),
            "encoder_hidden_states_image": (3, 12),
            "pose_hidden_states": (CHANNELS, FRAMES, HEIGHT, WIDE),
            "face_pixel_values": (3, 4 * FRAMES - 3, 8, 8),
        },
        grid=(FRAMES + 1, _ROWS, _COLUMNS),
    ),
    "WanVACETransformer3DModel": Tiny(
        {"vace_in_channels": CHANNELS, "vace_layers": [0]}, {"control_hidden_states": (CHANNELS, FRAMES, HEIGHT, WIDE)}
    ),
    "ZImageTransformer2DModel": Tiny(
        {"axes_dims": [8, 8, 8], "axes_lens": [256, 32, 32]},
        {
            "x": lambda random: [random(CHANNELS, 1, HEIGHT, WIDE)[0]],
            "t": _HALF,
            "cap_feats": lambda random: [random(TEXT, WIDTH)[0]],
        },
    ),
}
