"""A small model of the same kind: the config of any transformers architecture with its sizes reduced, for `verify`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

SMALL_SIZES: Mapping[str, Any] = {
    # widths
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "word_embed_proj_dim": 64, "embedding_size": 64,
    # depth
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "query_pre_attn_scalar": 16,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    # feed-forward
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "d_ff": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "hidden_dim": 96,
    "ffn_hidden_size": 96,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    # tables
    "vocab_size": 256, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "sliding_window": 16,
    # pictures
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
"""A size by its key. Only keys that a config has are set, and never to more than it had: a size of null or 0 means `not there`."""

_TOKEN_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "sep_token_id",
    "mask_token_id",
    "cls_token_id",
)
_BY_LAYER_SUFFIXES = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "attention_types",
    "no_rope_layers",
    "sparse_layers",
)
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def shrink_config(config: Any, overrides: Mapping[str, Any] | None = None) -> Any:
    """The config with small sizes; the kind of everything (activations, norms, tying, softcaps, rotary scaling) is kept.

    overrides: `model.verify_config`, applied last. Sub-configs (text, vision) are shrunk alike. The argument is not changed.
    """
    keys = config.to_dict()
    shrunk = _shrunk_keys(keys)
    for name in getattr(config, "sub_configs", {}):
        if isinstance(keys.get(name), Mapping):
            shrunk[name] = _shrunk_keys(keys[name])
    shrunk.update(overrides or {})
    for key in ("transformers_version", "model_type"):
        shrunk.pop(key, None)
    return type(config)(**shrunk)


def _shrunk_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    small = copy.deepcopy(dict(keys))
    for key, size in SMALL_SIZES.items():
        had = small.get(key)
        if isinstance(had, int) and not isinstance(had, bool) and had > 0:
            small[key] = min(had, size)
    heads = next((small[key] for key in ("num_attention_heads", "n_head", "num_heads", "n_heads") if key in small), 4)
    if keys.get("num_key_value_heads") is not None:
        same = keys["num_key_value_heads"] == keys.get("num_attention_heads")
        small["num_key_value_heads"] = heads if same else min(2, keys["num_key_value_heads"])
    if isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"] = _shrunk_rope(small["rope_parameters"])
    _cut_lists(small)
    for key in _TOKEN_KEYS:
        token = small.get(key)
        if isinstance(token, int) and token >= small.get("vocab_size", token + 1):
            small[key] = 0
    return small


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary scaling factors by frequency are as many as a head has pairs: they are cut to the small head's."""
    small = dict(rope)
    for key in ("short_factor", "long_factor"):
        if isinstance(small.get(key), list):
            small[key] = small[key][: SMALL_SIZES["head_dim"] // 2]
    return {key: _shrunk_rope(value) if isinstance(value, dict) else value for key, value in small.items()}


def _cut_lists(keys: dict[str, Any]) -> None:
    """Lists with an entry a layer keep their first entries, one of each kind among them where two layers allow it."""
    depth = next((keys[key] for key in _DEPTH_KEYS if isinstance(keys.get(key), int)), None)
    if depth is None:
        return
    for key in _BY_LAYER_SUFFIXES:
        entries = keys.get(key)
        if isinstance(entries, list) and len(entries) > depth:
            kinds = list(dict.fromkeys(map(str, entries)))
            firsts = sorted(next(i for i, entry in enumerate(entries) if str(entry) == kind) for kind in kinds[:depth])
            rest = [index for index in range(len(entries)) if index not in firsts]
            keys[key] = [entries[index] for index in sorted([*firsts, *rest[: depth - len(firsts)]])]
