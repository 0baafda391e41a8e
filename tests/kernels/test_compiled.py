"""Compile every kernel of launch.GLA for Hopper, which needs no GPU, and count how many programs fit.

A multiprocessor's shared memory and registers bound how many programs it runs at once.
"""

import math
import re
import subprocess
import tempfile

import pytest
import torch
import triton
from interpreter import INTERPRETED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from glalm.kernels.triton import gla, launch, segments

SHARED, REGISTERS, WARPS = 227 * 1024, 65536, 64  # of a multiprocessor
KIBIBYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of shared memory for one program
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
# The measured times rest on this many programs on a multiprocessor. One fewer makes a kernel a third to a half slower.
KERNELS = ("rescale", "scan_forward", "scan_states", "scan_segment_starts", "scan_backward", "gradients")
PROGRAMS = {
    (256, 512): dict(zip(KERNELS, (3, 1, 2, 2, 1, 2), strict=True)),
    (128, 256): dict(zip(KERNELS, (3, 2, 4, 4, 1, 2), strict=True)),
    (64, 64): dict(zip(KERNELS, (4, 4, 4, 4, 4, 2), strict=True)),
}


@pytest.fixture
def launches(monkeypatch):
    """The (kernel, arguments, constants, options) of every launch. No kernel runs."""
    recorded = []
    for module in (gla, segments):
        monkeypatch.setattr(module, "launch", lambda kernel, programs, *call: recorded.append((kernel, *call)))
    return recorded


def run_both_passes(K: int, V: int, gate: str, T: int, group: int = 1) -> None:
    """Run forward and backward. A long sequence of one head is cut into segments."""
    sizes = (group, K), (1, K), (1, V), (group, V)
    q, k, v, do = (torch.zeros(1, T, heads, n, dtype=torch.bfloat16) for heads, n in sizes)
    g = {"head": k[..., 0], "fixed": torch.zeros(1), "none": None}.get(gate, k)
    normalizer = 16.0 if gate == "logits" else None
    _, _, saved = gla.forward(q, k, v, g, 1.0, normalizer, None, False, None, True)
    gla.backward(q, k, v, g, 1.0, normalizer, None, None, saved, do, None)


def compile_kernel(kernel, args: tuple, constants: dict, options: dict, capability: int = 90) -> tuple[int, int]:
    """Return the bytes of shared memory and the registers of a thread on GPUs of this compute capability."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    types = {name: type_name(x, name in constants) for name, x in values.items()}
    at = {name: (kernel.arg_names.index(name),) for name in types}
    constant = {at[name]: values[name] for name in types if types[name] == "constexpr"}
    unaligned = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    pointers = [name for name in types if types[name].startswith("*") and name not in unaligned]
    aligned = {at[name]: [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, types, constant, aligned)
    options = {name: value for name, value in options.items() if value is not None}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return found.metadata.shared, count_registers(found.asm["cubin"])


def type_name(x, constant: bool) -> str:
    """Return the name that Triton gives to the type of an argument."""
    if constant or x is None:
        return "constexpr"
    if isinstance(x, TensorDescriptor):
        return f"tensordesc<{TYPES[x.base.dtype]}{x.block_shape}>"
    return f"*{TYPES[x.dtype]}" if isinstance(x, torch.Tensor) else {int: "i32", float: "fp32"}[type(x)]


def count_registers(cubin: bytes) -> int:
    """Return the registers of a thread of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1])


def launch_name(kernel, constants: dict, args: tuple) -> str:
    """Return the name that the table of launch configurations gives to a launch."""
    if kernel.__name__ == "scan_kernel":
        values = dict(zip(kernel.arg_names, args, strict=False))
        if values["out"] is None:
            return "scan_segment_starts" if values["states"] is None else "scan_states"
        return "scan_backward" if constants["REVERSE"] else "scan_forward"
    return kernel.__name__.split("_")[0]


def find_config(sizes: tuple[int, int], name: str, gate: str, constants: dict) -> launch.LaunchConfig:
    """Return the configuration that the table has for a launch."""
    fixed = name == "gradients" and gate in ("fixed", "none")
    variant = "_pairwise" if constants.get("PAIRWISE") else "_fixed_gate" if fixed else ""
    return getattr(launch.GLA[9, *sizes], name + variant)


def check_parameters(launches: list) -> None:
    """Check that every launch gives a kernel all of its parameters: the arguments in order, and the others by name."""
    assert launches
    for kernel, args, constants, _ in launches:
        assert {*kernel.arg_names[len(args) :]} == {*constants}, kernel.__name__


@pytest.mark.parametrize("gate", ["channel", "logits", "head", "fixed", "none"])
def test_launches_give_every_parameter(gate, launches):
    run_both_passes(64, 64, gate, T=2048)
    check_parameters(launches)
    assert "join_segments_kernel" in {kernel.__name__ for kernel, *_ in launches}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("gate", "T"), [("channel", 128), ("logits", 2048), ("head", 2048), ("fixed", 128), ("none", 128)]
)
@pytest.mark.parametrize("sizes", PROGRAMS, ids=str)
def test_as_many_programs_fit_as_the_table_assumes(sizes, gate, T, launches):
    assert (9, *sizes) in launch.GLA
    run_both_passes(*sizes, gate, T)
    names = set()
    for kernel, args, constants, options in launches:
        name = launch_name(kernel, constants, args)
        if name != "join":
            assert options == find_config(sizes, name, gate, constants).options, name
        shared, used = compile_kernel(kernel, args, constants, options)
        warps = options.get("num_warps", 4)
        fit = min(REGISTERS // (warps * math.ceil(used * 32 / 256) * 256), SHARED // (shared + 1024), WARPS // warps)
        assert fit >= (1 if constants.get("PAIRWISE") else PROGRAMS[sizes].get(name, 1)), (name, used, shared)
        names.add(name)
    assert names >= PROGRAMS[sizes].keys() - ({"scan_segment_starts"} if T == 128 else set())


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("gate", ["logits", "head"])
@pytest.mark.parametrize("capability", KIBIBYTES)
def test_shared_memory_suffices_where_heads_share_a_state(capability, gate, launches, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: capability // 10)
    run_both_passes(256, 512, gate, 128, group=3)
    assert launches
    for kernel, args, constants, options in launches:
        shared, _ = compile_kernel(kernel, args, constants, options, capability)
        assert shared <= KIBIBYTES[capability] * 1024, (kernel.__name__, shared)
