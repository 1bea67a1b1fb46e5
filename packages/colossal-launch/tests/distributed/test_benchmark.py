"""The benchmark beside torch's DDP and FSDP2, run small on the CPU: it compares like with like, and survives a row that fails."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[4]
pytest.importorskip("colossal_zero")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return ROOT / "benchmarks" / "zero_vs_peers.py"


@pytest.fixture
def overlap(benchmark: Path) -> ModuleType:
    del benchmark
    return importlib.import_module("zero.overlap")


def run(benchmark: Path, out: Path, *options: str) -> tuple[str, list[dict[str, object]]]:
    """Two ranks, a tiny GPT-2. Returns what was printed, and the rows of the report."""
    command = [
        sys.executable,
        str(benchmark),
        "--model",
        "tiny",
        "--processes",
        "2",
        "--micro-batches",
        "2",
        "--compile",
        "no",
    ]
    command += ["--warmup-steps", "1", "--timed-steps", "2", "--out", str(out), *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert (out / "tiny.json").exists(), finished.stdout + finished.stderr
    return finished.stdout, json.loads((out / "tiny.json").read_text())["rows"]


@pytest.mark.slow
def test_contestants_train_alike_and_one_that_fails_is_reported(benchmark: Path, tmp_path: Path) -> None:
    contestants = ["ddp", "zero1+no_such_key=1", "fsdp2-z3", "zero1", "zero3"]
    printed, rows = run(benchmark, tmp_path, "--contestants", ",".join(contestants))
    assert [row.get("failed") for row in rows] == [None, "ConfigError", None, None, None], printed
    assert "no_such_key" in str(rows[1]["message"])
    trained = [row for row in rows if "failed" not in row]
    assert [row["contestant"] for row in trained] == ["ddp", "fsdp2-z3", "zero1", "zero3"], printed
    for key in ("loss_first", "loss_last"):
        found = [float(str(row[key])) for row in trained]
        assert max(found) - min(found) < 4e-3, f"bfloat16 keeps 8 bits: {key} {found}"
    assert (tmp_path / "tiny.png").stat().st_size > 0


def test_hidden_communication_is_what_computation_covers(overlap: ModuleType) -> None:
    kernels = [
        overlap.Kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0.0, 100.0),
        overlap.Kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 50.0, 120.0),
        overlap.Kernel("triton_poi_fused_add_native_layer_norm_3", 110.0, 160.0),
        overlap.Kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 150.0, 250.0),
        overlap.Kernel("Memcpy DtoD (Device -> Device)", 160.0, 180.0),
        overlap.Kernel("triton_poi_fused__to_copy_2", 180.0, 200.0),
        overlap.Kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 300.0, 400.0),
    ]
    found = overlap.analyse(kernels, num_steps=2)
    assert found["by_kind"]["all-gather"] == {"kernels": 0.5, "ms": 0.05, "hidden": 0.5, "exposed_ms": 0.025}
    assert found["by_kind"]["reduce-scatter"] == {"kernels": 0.5, "ms": 0.05, "hidden": 0.1, "exposed_ms": 0.045}
    assert found["communication"] == {"kernels": 1.0, "ms": 0.1, "hidden": 0.3, "exposed_ms": 0.07}
    assert found["compute_ms"] == 0.105
    assert found["copy_ms"] == 0.02
    assert found["idle_ms"] == 0.025
    assert found["step_ms"] == 0.2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", "all-reduce"),
        ("ncclDevKernel_SendRecv(...)", "other communication"),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::direct_copy_kernel_cuda",
            "copy",
        ),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<...>", "copy"),
        ("void at::native::split_with_sizes_copy_out_contiguous_no_cast_kernel<...>", "copy"),
        ("triton_poi_fused__to_copy_view_1", "copy"),
        ("triton_poi_fused__to_copy_add_mul_1", "compute"),
        ("triton_per_fused__to_copy_native_layer_norm_0", "compute"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64_4x1x1", "compute"),
    ],
)
def test_kernels_by_name(overlap: ModuleType, name: str, kind: str) -> None:
    assert overlap.kind_of(name) == kind


def test_flops_of_the_models_are_those_of_the_peers_table(benchmark: Path) -> None:
    del benchmark
    shapes = importlib.import_module("zero.models").shapes()
    assert f"{shapes['gpt2-1.5b'].flops_per_token:.5g}" == "1.0274e+10"
    assert f"{shapes['llama-8b'].flops_per_token:.5g}" == "5.7913e+10"
