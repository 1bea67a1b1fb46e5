"""The sizes of a small model, by config key, and the few keys that a config's own consistency needs beside them. Data, no rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SMALL_SIZES: Mapping[str, Any] = {
    # widths
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "emb_dim": 64, "word_embed_proj_dim": 64, "embedding_size": 64,
    "embedding_dim": 64, "input_embedding_size": 64, "output_embedding_size": 64, "hidden_size_per_layer_input": 16,
    "hidden_size_global": 64, "lru_width": 64, "backbone_hidden_size": 64,
    "adapter_in_dim": 64, "adapter_out_dim": 64, "adapter_input_size": 64, "out_hidden_size": 64,
    # depth
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "num_decoder_layers": 2, "num_blocks": 2, "depth": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_encoder_layers": 2,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "kv_n_heads": 2, "head_dim": 16, "d_kv": 16, "dim_head": 16, "d_head": 16, "rotary_dim": 8,
    "query_pre_attn_scalar": 16, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "qk_head_dim": 32, "v_head_dim": 16, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8, "o_lora_rank": 16,
    "attention_hidden_size": 128, "attention_head_dim": 32, "adapter_rank": 8, "kv_channels": 16,
    # linear attention and state spaces
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 16,
    "linear_num_heads": 4, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_headdim": 16, "mamba_n_heads": 8, "mamba_d_head": 16,
    "n_mamba_heads": 8, "mamba_d_ssm": 128, "ssm_state_size": 16, "mamba_d_state": 16, "state_size": 16, "mamba_dt_rank": 4,
    "time_step_rank": 4, "n_groups": 2, "mamba_n_groups": 2, "mamba_ngroups": 2, "chunk_size": 8, "mamba_chunk_size": 8,
    # feed-forward
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "d_ff": 96, "d_inner": 96, "dff": 96, "dim_ff": 96, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "hidden_dim": 96, "ffn_hidden_size": 96, "feed_forward_size": 96, "expert_ffn_hidden_size": 48,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "moe_topk": 2, "moe_num_experts": 4, "moe_k": 2, "zero_expert_num": 2, "moe_intermediate_size": 48, "shared_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "shared_experts_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # tables
    "vocab_size": 256, "decoder_vocab_size": 256, "vocab_size_per_layer_input": 256, "max_position_embeddings": 128, "n_positions": 128,
    "n_ctx": 128, "max_source_positions": 64, "max_target_positions": 128,
    "sliding_window": 16, "window_size": 16, "pronunciation_vocab_size": 64, "shape_vocab_size": 64,
    "pronunciation_embed_dim": 16, "shape_embed_dim": 16, "position_bias_max_distance": 32, "position_bias_num_buckets": 16,
    "encoder_hash_byte_group_vocab": 64,
    # pictures and sound
    "mlp_dim": 96, "output_channels": 16,
    "image_size": 32, "patch_size": 8, "nemo_conv_channels": 16, "depthwise_separable_out_channel": 16, "ext_pw_out_channel": 16,
}  # fmt: skip
"""A size by its key. Only keys that a config has are set, and never to more than it had: a size of null or 0 means `not there`."""

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_HYBRID = ["linear_attention", "full_attention"]

EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 48},
    "falcon_h1": {"mamba_n_heads": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "intermediate_size": [96, 96, 96, 96],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attention_head_size": 16,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [4, 4],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 1,
    },
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_query_groups": 4,
    },
}
"""Keys that the small config of a model type needs beside the sizes, sub-configs by their own model type. They say what the default
config of the type leaves open (a number of experts that is null), or keep two sizes consistent that no rule connects.
"""
