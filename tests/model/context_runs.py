"""Compare the shards of several processes with whole sequences in one, for every mixer that can share sequences.

Every process runs this script. It prints the name of each case, and fails at the first that differs.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from choices import CHOICES

from glalm import IGNORE_INDEX
from glalm.data.loader import flatten_batch, shard_batch
from glalm.kernels import chunk_delta_rule, chunk_gla, chunk_ssd, chunk_value_gla, selective_scan, short_conv
from glalm.kernels.context_parallel import ContextShard
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.mixers import MIXERS

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 24, "gate_low_rank_dim": 4}
VOCABULARY = 11
B, T, PAST = 2, 24, 5
# Documents that begin at, before and after the bounds of the shards; of a single token; and longer than two shards.
STARTS = ([0, 5, 6, 12, 23], [0, 1])


def build_model(choice: dict) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{**SIZES, "vocab_size": VOCABULARY, **choice})).double()
    with torch.no_grad():  # for gates and states that matter
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else None
    return model


def draw_batch(length: int, packed: bool) -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (B, length + 1), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone()}
    if packed:
        starts = torch.zeros(B, length + 1, dtype=torch.bool)
        for row, positions in zip(starts, STARTS, strict=True):
            row[[p for p in positions if p < length]] = True
        batch["labels"][starts[:, 1:]] = IGNORE_INDEX
        batch["starts"] = starts[:, :-1]
    return batch


def run_model(model: CausalLM, batch: dict, context: ContextShard | None, past: torch.Tensor | None) -> dict:
    """Return the sum of the losses, the gradients, and with a `past` the cache after the batch."""
    model.zero_grad()
    batch = flatten_batch(batch) if "starts" in batch else batch
    cache = None
    if past is not None:
        with torch.no_grad():
            cache = model(past, return_cache=True).cache
    options = {} if context is None else {"context": replace(context, rows=batch.get("rows"))}
    output = model(
        batch["input_ids"], batch["labels"], cache=cache, cu_seqlens=batch.get("cu_seqlens"),
        return_cache=past is not None, **options,
    )  # fmt: skip
    loss = output.loss * (batch["labels"] != IGNORE_INDEX).sum()
    loss.backward()
    leaves = {} if past is None else dict(enumerate(torch.utils._pytree.tree_leaves(output.cache.states)))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "seen": None if past is None else output.cache.seen, **leaves, **gradients}


def compare(name: str, choice: dict, context: ContextShard, length: int, packed: bool, past: torch.Tensor | None):
    model = build_model(choice)
    batch = draw_batch(length, packed)
    expected = run_model(model, batch, None, past)
    found = run_model(model, shard_batch(batch, length, context.rank, context.size), context, past)
    for key, value in expected.items():
        if key == "loss" or (isinstance(key, str) and "." in key):
            dist.all_reduce(found[key])
        if isinstance(value, torch.Tensor):
            tolerance = 1e-6 if key == "loss" else 1e-9  # The loss is float32.
            message = partial("{}: {}: {}".format, name, key)
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=message)
        else:
            assert found[key] == value, (name, key)


def iterate_cases() -> Iterator[tuple[str, dict, int, bool, torch.Tensor | None]]:
    past = torch.randint(VOCABULARY, (B, PAST), generator=torch.Generator().manual_seed(2))
    for name, choice in CHOICES.items():
        mixers = ModelConfig(**{**SIZES, **choice}).layer_mixers()
        if not all(MIXERS[mixer].supports_context for mixer in mixers):
            continue
        yield name, choice, T, False, None
        yield f"{name}, packed", choice, T, True, None
        yield f"{name}, continued", choice, T, False, past
        # Shards shorter than the past of a convolution.
        yield f"{name}, two tokens each", choice, 2 * dist.get_world_size(), False, past


def call_operator(name: str, x: dict[str, torch.Tensor], S0: torch.Tensor, context: ContextShard | None) -> tuple:
    """Return the outputs and the final state of an operator on inputs that are cut to a shard already."""
    q, k, v, g = x["q"], x["k"], x["v"], -x["g"].exp()
    options = {"initial_state": S0, "context": context}
    parameters = {"D": torch.tensor([0.5, -1.0]).double(), "dt_bias": torch.tensor([-1.0, 1.0]).double()}
    if name == "selective_scan":
        parameters["A"] = -torch.ones(2, 3).double()
        v, dt, z = (x[key][:, :, 0, :2] for key in ("v", "g", "w"))
        return selective_scan(v, dt, B=k[:, :, 0], C=q[:, :, 0], z=z, **parameters, **options)
    if name == "short_conv":
        weight = torch.linspace(-1, 1, 32).view(8, 4).double()
        return short_conv(v.flatten(2), weight, **options)
    options["output_final_state"] = True
    if name == "chunk_ssd":
        parameters["A"] = -torch.ones(2).double()
        return chunk_ssd(v, x["beta"], B=k[:, :, :1], C=q[:, :, :1], **parameters, **options)
    if name == "chunk_delta_rule":
        return chunk_delta_rule(q, k, v, x["beta"].sigmoid(), g, normalize=True, **options)
    if name == "chunk_value_gla":
        return chunk_value_gla(q, k, v, -x["w"].exp(), **options)
    return chunk_gla(q, k, v, g, **options)


def compare_states(name: str, context: ContextShard) -> None:
    """Compare the gradients of the initial state and of the inputs, where the loss depends on the final state, too."""
    r = torch.Generator().manual_seed(3)
    axes = {"q": (2, 3), "k": (2, 3), "v": (2, 4), "g": (2, 3), "w": (2, 4), "beta": (2,)}
    inputs = {key: torch.randn(B, T, *sizes, generator=r, dtype=torch.float64) for key, sizes in axes.items()}
    shape = {"selective_scan": (B, 2, 3), "short_conv": (B, 3, 8)}.get(name, (B, 2, 3, 4))
    S0, dS = torch.randn(2, *shape, generator=r, dtype=torch.float64)
    results = []
    for shard in (None, context):
        leaves = {key: x.clone().requires_grad_() for key, x in {**inputs, "S0": S0}.items()}
        cut = {key: leaves[key] if shard is None else leaves[key].chunk(shard.size, 1)[shard.rank] for key in inputs}
        o, S = call_operator(name, cut, leaves["S0"], shard)
        # The final state is the same on all processes, and each has a share of the loss.
        (o.square().sum() + (S * dS).sum() / (1 if shard is None else shard.size)).backward()
        results.append({key: x.grad for key, x in leaves.items() if x.grad is not None} | {"S": S.detach()})
    expected, found = results
    for key, value in expected.items():
        if key != "S":
            dist.all_reduce(found[key])
        torch.testing.assert_close(found[key], value, msg=partial("{}: {}: {}".format, name, key))


def main() -> None:
    dist.init_process_group("gloo")
    group = dist.distributed_c10d._get_default_group()
    context = ContextShard(group.group_name, dist.get_rank(), dist.get_world_size())
    for name in ("chunk_gla", "chunk_delta_rule", "chunk_value_gla", "chunk_ssd", "selective_scan", "short_conv"):
        compare_states(name, context)
    for name, *case in iterate_cases():
        if not sys.argv[1:] or name.startswith(sys.argv[1]):
            compare(name, case[0], context, *case[1:])
            if context.rank == 0:
                print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert "RANK" in os.environ, "start this script by torchrun"
    main()
    sys.stdout.flush()
    os._exit(0)  # A regular exit sometimes aborts in the destructor of a thread of gloo's.
