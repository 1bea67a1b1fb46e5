"""The benchmarks beside torch's own strategies, run small on the CPU: they compare like with like, and survive a row that fails."""

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
def tensor_benchmark(benchmark: Path) -> Path:
    return benchmark.with_name("tensor_vs_peers.py")


@pytest.fixture
def overlap(benchmark: Path) -> ModuleType:
    del benchmark
    return importlib.import_module("beside_peers.overlap")


def run(benchmark: Path, out: Path, *options: str, model: str = "tiny") -> tuple[str, list[dict[str, object]]]:
    """Two ranks, a tiny model. Returns what was printed, and the rows of the report."""
    command = [
        sys.executable,
        str(benchmark),
        "--model",
        model,
        "--processes",
        "2",
        "--micro-batches",
        "2",
        "--compile",
        "no",
    ]
    command += ["--warmup-steps", "1", "--timed-steps", "2", "--out", str(out), *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    report = out / f"{model}.json"
    assert report.exists(), finished.stdout + finished.stderr
    return finished.stdout, json.loads(report.read_text())["rows"]


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


@pytest.mark.slow
def test_tensor_ranks_train_the_same_sequences(tensor_benchmark: Path, tmp_path: Path) -> None:
    pytest.importorskip("colossal_tensor")
    contestants = ["fsdp2-z3", "torch-tp2", "tp2", "tp2+sequence_parallel=false", "tp2+micro=2"]
    printed, rows = run(tensor_benchmark, tmp_path, "--contestants", ",".join(contestants), model="tiny-llama")
    assert [row.get("failed") for row in rows] == [None] * len(contestants), printed
    first: list[list[float]] = [list(map(float, row["losses_first"])) for row in rows]  # type: ignore[call-overload]
    for step in zip(*first, strict=True):
        assert max(step) - min(step) < 2e-3, f"bfloat16 keeps 8 bits: {first}"
    assert "they agree in three digits" in printed


@pytest.mark.slow
def test_pipelines_train_the_same_sequences(benchmark: Path, tmp_path: Path) -> None:
    """Each also records a step, and the idle parts of it add up."""
    pytest.importorskip("colossal_pipeline")
    contestants = [
        "fsdp2-z3+micro=1",
        "pp-zbv",
        "torch-pp-1f1b",
        "torch-pp-interleaved",
        "torch-pp-zbv+compile=false",
    ]
    script = benchmark.with_name("pipeline_vs_peers.py")
    options = ["--small", "--contestants", ",".join(contestants), "--sequences", "4"]
    printed, rows = run(script, tmp_path, *options, model="small-llama")
    assert [row.get("failed") for row in rows] == [None] * len(contestants), printed
    assert "they agree in three digits" in printed
    for row in rows[1:]:
        assert 0 < float(str(row["idle"])) < 1, f"{row['contestant']}: {row['idle']}"
        assert len(row["time_line"]) == 2  # type: ignore[arg-type]
    parts = [float(str(rows[1][f"idle_{name}"])) for name in ("bubble", "messages", "other")]
    assert sum(parts) == pytest.approx(float(str(rows[1]["idle"])))
    assert (tmp_path / "small-llama-time-lines.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "micro_size", "sections"),
    [
        ("zero3+prefetch=2", 2, {"zero": {"stage": 3, "prefetch": 2}}),
        ("zero3-keep", 2, {"zero": {"stage": 3, "keep_parameters": "microbatch"}}),
        ("tp4+sequence_parallel=false", 8, {"tensor": {"size": 4, "sequence_parallel": False}}),
        (
            "tp2-zero1+overlap=plain+zero.bucket_bytes=99",
            4,
            {"tensor": {"size": 2, "overlap": "plain"}, "zero": {"stage": 1, "bucket_bytes": 99}},
        ),
        (
            "pp4-zbv-zero1+zero.bucket_bytes=99+micro=4",
            4,
            {"pipeline": {"size": 4, "schedule": "zbv"}, "zero": {"stage": 1, "bucket_bytes": 99}},
        ),
    ],
)
def test_options_follow_a_name(benchmark: Path, name: str, micro_size: int, sections: dict[str, object]) -> None:
    del benchmark
    row = importlib.import_module("beside_peers.rows").Row("tiny", name, 2)
    config = importlib.import_module("beside_peers.config").config_of(row, 4)
    assert config["parallel"] == sections
    assert config["batch"] == {"global_size": 8, "micro_size": micro_size}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ddp+bucket=1", "ddp has no option bucket"),
        ("tp3", "3 tensor ranks do not divide 4 processes"),
        (
            "zero4",
            "zero4 is none of ddp, fsdp2-z3, fsdp2-z2, torch-tpN, torch-tpN-async, torch-ppN-SCHEDULE, zeroS, zero3-keep, tpN, "
            "tpN-zeroS, ppN-SCHEDULE and ppN-SCHEDULE-zeroS (S: a stage, 0 to 3)",
        ),
        ("pp3-1f1b", "3 pipeline ranks do not divide 4 processes"),
        ("torch-pp2-1f1b", "torch's pipelines are measured over all 4 processes"),
    ],
)
def test_names_that_stand_for_nothing(benchmark: Path, name: str, problem: str) -> None:
    del benchmark
    assert importlib.import_module("beside_peers.kinds").kind_problems(name, 4) == [problem]


def test_copies_from_other_gpus_are_communication(overlap: ModuleType) -> None:
    megabyte = 10**6
    kernels = [
        overlap.Kernel("Memcpy DtoD (Device -> Device)", 0.0, 100.0, 35 * megabyte),
        overlap.Kernel("Memcpy DtoD (Device -> Device)", 100.0, 120.0, 35 * megabyte),
        overlap.Kernel("Memcpy PtoP (Device -> Device)", 120.0, 130.0, 10),
        overlap.Kernel("Memcpy HtoD (Pinned -> Device)", 130.0, 330.0, 10 * megabyte),
        overlap.Kernel("void c10d::symmetric_memory::barrier_kernel(...)", 330.0, 331.0),
    ]
    assert [kernel.kind for kernel in kernels] == ["peer copy", "copy", "peer copy", "copy", "peer signal"]


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
    shapes = importlib.import_module("beside_peers.models").shapes()
    assert f"{shapes['gpt2-1.5b'].flops_per_token:.5g}" == "1.0274e+10"
    assert f"{shapes['llama-8b'].flops_per_token:.5g}" == "5.7913e+10"
    assert f"{shapes['llama-8b-4096'].flops_per_token:.5g}" == "5.147e+10"
