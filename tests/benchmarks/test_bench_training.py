"""Run the training benchmark at sizes for a CPU, and check how it reads a profile."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glalm.model.decoder import CausalLM

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_training.py"


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("bench_training")


def check(result: dict) -> None:
    assert "error" not in result, result
    assert result["tokens_per_second"] == pytest.approx(2 * 64 / result["step_ms"] * 1e3)
    assert 7 < result["loss"] < 8.5 and result["first_step_seconds"] > 0  # a vocabulary of 2048, random tokens


@pytest.mark.slow
def test_row_of_our_model(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--steps", "2", "--warmup", "1", "--profile"]
    command += ["--models", "glalm", "--set", "optim.lr=1e-4", "--json", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    [result] = record["results"]
    check(result)
    assert result["profile"]["kinds"].keys() >= {"idle"} and record["changes"] == ["optim.lr=1e-4"]
    assert "| tiny | glalm |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="at a size for a CPU")
def test_row_of_llama(bench):
    arguments = SimpleNamespace(set=[], steps=1, warmup=1, estimate=False, profile=False)
    check(bench.measure("llama", bench.TINY, arguments))


def test_rows_have_a_name_or_a_shape(bench):
    assert bench.named_row("1b3") == ("1b3", bench.ROWS["1b3"])
    assert bench.named_row("340m:8x8192") == ("340m:8x8192", bench.Row("340m", 8, 8192))
    with pytest.raises(argparse.ArgumentTypeError, match="7b is none of 340m, 1b3"):
        bench.named_row("7b")


def test_fla_gets_the_widths_of_our_preset(bench):
    config = bench.compose_run_config(bench.ROWS["340m"], "gated_deltanet", []).model
    assert bench.fla_fields(config) == {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_heads": 6,
        "head_dim": 128,
        "expand_v": 2.0,  # in units of the keys' 768 channels
        "intermediate_size": 2112,
        "use_short_conv": True,
        "conv_size": 4,
    }


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gla", "retention", "deltanet", "gated_deltanet", "kda", "mamba", "mamba2"])
def test_fla_has_as_many_parameters(bench, mixer):
    models = pytest.importorskip("fla.models")
    config = bench.compose_run_config(bench.ROWS["340m"], mixer, []).model
    fields = bench.fla_fields(config)
    model_class = getattr(models, fields["architectures"][0])
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in model.parameters())
            for model in (model_class(model_class.config_class(**fields)), CausalLM(config))
        ]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_why_fla_has_no_row_is_one_line(bench):
    arguments = SimpleNamespace(
        set=["model=regla_tiny"], steps=1, warmup=1, accumulation=1, tiny=True, profile=False, estimate=False
    )
    result = bench.measure_in_process("fla", "tiny", arguments)
    assert result.keys() == {"error"}
    assert "flash-linear-attention has no model with layers of regla" in result["error"]


@pytest.mark.parametrize(
    "kernel, wanted",
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matmuls"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmuls"),
        ("cross_entropy_kernel", "loss, without its matmuls"),
        ("scan_kernel", "recurrent kernels"),
        ("rescale_head_kernel", "recurrent kernels"),
        ("join_segments_kernel", "recurrent kernels"),
        ("triton_red_fused__to_copy_add_mul_rms_norm_3", "norms and elementwise"),
        ("void multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser and clipping"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("something else", "other"),
    ],
)  # fmt: skip
def test_kind_of_kernel(bench, kernel, wanted):
    assert bench.kernel_kind(kernel) == wanted


def test_idle_time_is_not_covered_by_kernels(bench):
    assert bench.idle_time([(10, 12), (11, 15), (18, 20), (13, 14)]) == 3
    assert bench.idle_time([(1, 2)]) == 0


def test_communication_is_exposed_where_nothing_else_runs(bench):
    times = [("gemm", 0, 4), ("ncclKernel_AllReduce", 3, 6), ("gemm", 7, 9)]
    expected = {"matmuls": 6, "exposed communication": 2, "overlapped communication": 1, "idle": 1}
    assert bench.sum_kinds(times) == expected
