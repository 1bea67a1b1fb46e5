"""A small model of the same kind: the config of any transformers architecture with its sizes reduced, for `verify`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from colossal_core.small_sizes import EXCEPTIONS, SMALL_SIZES

MAX_DEPTH = 4
"""Layers are two, or as many as there are kinds of them, up to this many; more only where they are asked for."""

_TOKEN_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_eos_token_id",
    "sep_token_id",
    "mask_token_id",
    "cls_token_id",
)
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TABLE_WIDTHS = ("embedding_size", "word_embed_proj_dim")
"""Widths of a table of embeddings that may differ from the model's: a projection stands between them then."""
_OVERRIDES = "per_layer_config"
"""transformers' key for what single layers have otherwise, by their number."""


def shrink_config(config: Any, overrides: Mapping[str, Any] | None = None, *, min_depth: int = 0) -> Any:
    """The config with small sizes; the kind of everything (activations, norms, tying, softcaps, rotary scaling) is kept.

    overrides: `model.verify_config`, applied last. min_depth: layers that stay at least, where there are so many. Sub-configs
    (text, vision) are shrunk alike. The argument is not changed.
    """
    shrunk = _shrunk_config(config.to_dict(), config, min_depth)
    shrunk.update(overrides or {})
    for key in ("transformers_version", "model_type"):
        shrunk.pop(key, None)
    return type(config)(**shrunk)


def _shrunk_config(keys: Mapping[str, Any], config: Any, min_depth: int) -> dict[str, Any]:
    """The small keys of a config, and of those inside it."""
    shrunk = _shrunk_keys(keys, min_depth)
    for name in getattr(config, "sub_configs", {}):
        if isinstance(keys.get(name), Mapping):
            shrunk[name] = _shrunk_config(keys[name], getattr(config, name, None), min_depth)
    shrunk.update(copy.deepcopy(dict(EXCEPTIONS.get(str(keys.get("model_type")), {}))))
    return shrunk


def _shrunk_keys(keys: Mapping[str, Any], min_depth: int) -> dict[str, Any]:
    small = copy.deepcopy(dict(keys))
    _keep_some_layers(small, min_depth)
    _shrink_sizes(small)
    for layer in small[_OVERRIDES].values() if isinstance(small.get(_OVERRIDES), dict) else ():
        _shrink_layer(layer, keys)
    if isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"] = _shrunk_rope(small["rope_parameters"])
    for key in _TOKEN_KEYS:
        token = small.get(key)
        if isinstance(token, int) and token >= small.get("vocab_size", token + 1):
            small[key] = 0
    return small


def _shrink_sizes(keys: dict[str, Any]) -> None:
    """Sizes, also where they are given layer by layer. The depth is not among them: `_keep_some_layers` has cut it."""
    ungrouped = keys.get("num_key_value_heads") is not None and keys["num_key_value_heads"] == keys.get(
        "num_attention_heads"
    )
    projected = [
        key for key in _TABLE_WIDTHS if _is_size(keys.get(key)) and keys[key] != keys.get("hidden_size", keys[key])
    ]
    for key, size in SMALL_SIZES.items():
        had = keys.get(key)
        if key not in _DEPTH_KEYS and _is_size(had):
            keys[key] = min(had, size)
        elif isinstance(had, list) and had and all(map(_is_size, had)):
            keys[key] = [min(entry, size) for entry in had]
    if ungrouped:
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    for key in projected:
        keys[key] = max(1, keys["hidden_size"] // 2)


def _shrink_layer(own: dict[str, Any], all_layers: Mapping[str, Any]) -> None:
    """What one layer has otherwise: twice the small size where it is wider than the others, half of it where it is narrower."""
    usual = {key: all_layers.get(key) for key in own}
    had = dict(own)
    _shrink_sizes(own)
    for key, value in had.items():
        if key in SMALL_SIZES and _is_size(value) and _is_size(usual[key]) and value != usual[key]:
            own[key] = SMALL_SIZES[key] * 2 if value > usual[key] else max(1, SMALL_SIZES[key] // 2)
    if had.get("num_key_value_heads") is not None and had["num_key_value_heads"] == had.get("num_attention_heads"):
        own["num_key_value_heads"] = own["num_attention_heads"]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary scaling factors by frequency are as many as a head has pairs: they are cut to the small head's."""
    small = dict(rope)
    for key in ("short_factor", "long_factor"):
        if isinstance(small.get(key), list):
            small[key] = small[key][: SMALL_SIZES["head_dim"] // 2]
    return {key: _shrunk_rope(value) if isinstance(value, dict) else value for key, value in small.items()}


def _keep_some_layers(keys: dict[str, Any], min_depth: int) -> None:
    """Cuts the depth, and with it every list with an entry a layer: one layer of each kind stays where `MAX_DEPTH` allows it."""
    depth = next((keys[key] for key in _DEPTH_KEYS if _is_size(keys.get(key))), None)
    if depth is None:
        return
    lists = {key: entries for key, entries in keys.items() if isinstance(entries, list) and len(entries) == depth}
    given = keys.get(_OVERRIDES)
    overrides = {int(layer): own for layer, own in given.items()} if isinstance(given, dict) else {}
    kinds = [
        str([*(entries[layer] for entries in lists.values()), overrides.get(layer)]) if depth > 2 else str(layer)
        for layer in range(depth)
    ]
    kept = _some_of_each(kinds, max(min_depth, SMALL_SIZES["num_hidden_layers"]))
    keys.update({key: len(kept) for key in _DEPTH_KEYS if _is_size(keys.get(key))})
    keys.update({key: [entries[layer] for layer in kept] for key, entries in lists.items()})
    if overrides:
        keys[_OVERRIDES] = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}


def _some_of_each(kinds: Sequence[str], count: int) -> list[int]:
    """The first layer of each kind, and further ones until there are `count` (or all that there are), in order."""
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:MAX_DEPTH]
    rest = [layer for layer in range(len(kinds)) if layer not in firsts]
    return sorted([*firsts, *rest[: max(0, count - len(firsts))]])
