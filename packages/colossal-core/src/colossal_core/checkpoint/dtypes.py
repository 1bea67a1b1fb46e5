"""Element types of a checkpoint: their name in the manifest (torch's), in a safetensors header, and their size in bytes."""

from __future__ import annotations

import torch

SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Every element type that can be saved: torch's name -> safetensors' name."""

_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in SAFETENSORS_NAMES}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    return _TORCH_DTYPES[name]


def item_bytes(name: str) -> int:
    return _TORCH_DTYPES[name].itemsize
