"""The exchange of states, by the ranks of a group that run in turn in this process. See also tests/train."""

from collections.abc import Callable

import pytest
import selective_scan_cases
import ssd_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm import kernels
from glalm.data.loader import flatten_batch, shard_batch
from glalm.kernels import chunk_gla, context_parallel, fused_recurrent_gla
from glalm.kernels.context_parallel import ContextShard

NAMES = ("q", "k", "v", "g")
PER_TOKEN = {"q", "k", "v", "g", "beta", "x", "dt", "B", "C", "z"}


def run_in_turns(function: Callable[[int], list], size: int, patch: pytest.MonkeyPatch) -> list[list]:
    """Return function(rank) of every rank, whose all-gathers return what the ranks sent.

    What they send must not depend on what they receive: the first round of turns collects it, the second has it all.
    """
    sent: list[list[torch.Tensor]] = [[] for _ in range(size)]
    results = []
    for is_last_round in (False, True):
        for rank in range(size):
            calls = iter(range(10))

            def all_gather(x, group, size, rank=rank, calls=calls, is_last_round=is_last_round):
                call = next(calls)
                if not is_last_round:
                    sent[rank].append(x)
                    return x.new_zeros(size, *x.shape)
                return torch.stack([messages[call] for messages in sent])

            patch.setattr(context_parallel, "all_gather", all_gather)
            result = function(rank)
            if is_last_round:
                results.append(result)
    return results


@settings(max_examples=12)
@given(st.data())
def test_shards_of_packed_sequences_equal_the_whole(data):
    """Documents begin anywhere, and gates forget anything from nothing to everything."""
    size = data.draw(st.integers(1, 4), "size")
    rows, T = data.draw(st.integers(1, 2), "rows"), size * data.draw(st.integers(1, 5), "length")
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * T, max_size=rows * T), "starts"))
    starts = starts.view(rows, T)
    starts[:, 0] = True
    r = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    heads = dict.fromkeys((*NAMES, "do"), 2)
    heads["q"] = heads["do"] = 2 * data.draw(st.integers(1, 2), "group")
    x = {name: torch.randn(rows, T, H, 3, generator=r, dtype=torch.float64) for name, H in heads.items()}
    x["g"] = -data.draw(st.sampled_from([0.0, 0.1, 1.0, 1000.0]), "forget") * x["g"].abs()

    def compute(batch: dict, context: ContextShard | None) -> list[torch.Tensor]:
        row = flatten_batch(batch)
        context = context and ContextShard(context.group, context.rank, context.size, row["rows"])
        inputs = [row[name].view(1, -1, heads[name], 3).detach().requires_grad_() for name in NAMES]
        o, _ = chunk_gla(*inputs, cu_seqlens=row["cu_seqlens"], context=context)
        grads = torch.autograd.grad(o, inputs, row["do"].view(o.shape))
        return [y.view(*batch["starts"].shape, *y.shape[2:]) for y in (o, *grads)]

    flat = {name: y.flatten(2) for name, y in x.items()}
    flat |= {"input_ids": starts.long(), "starts": starts}

    def compute_shard(rank: int) -> list[torch.Tensor]:
        shard = {name: y.unflatten(1, (size, -1))[:, rank] for name, y in flat.items()}
        located = shard_batch({"input_ids": starts.long(), "starts": starts}, T, rank, size)
        return compute(shard | located, ContextShard("turns", rank, size))

    with pytest.MonkeyPatch.context() as patch:
        found = run_in_turns(compute_shard, size, patch)
    for parts, expected in zip(zip(*found, strict=True), compute(flat, None), strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)


def draw_arguments(name: str) -> dict[str, torch.Tensor]:
    """Return float32 arguments of an operator for two sequences of 96 tokens that continue."""
    if name == "chunk_delta_rule":
        q, k, v, g, beta = torch.randn(5, 2, 96, 2, 24)
        gates = {"g": -g[..., 0].abs(), "beta": beta[..., 0].sigmoid()}
        return {"q": q, "k": k, "v": v, **gates, "initial_state": torch.randn(2, 2, 24, 24)}
    module, shape = {
        "selective_scan": (selective_scan_cases, (2, 96, 6, 3)), "chunk_ssd": (ssd_cases, (2, 96, 4, 2, 5, 6))
    }[name]  # fmt: skip
    args = module.random_arguments(*shape)
    del args["cu_seqlens"]
    return args


def compare_shards(name: str, limit: float, patch: pytest.MonkeyPatch, dtype=torch.float64, device="cpu") -> None:
    """Compare the results and gradients of an operator on three shards with those on whole sequences."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    args = {n: x.to(device, dtype if n in PER_TOKEN else wide) for n, x in draw_arguments(name).items()}
    options = {"output_final_state": True} if name != "selective_scan" else {}
    options |= {"normalize": True} if name == "chunk_delta_rule" else {}
    do = torch.randn_like(args["v" if name == "chunk_delta_rule" else "x"])

    def compute(rank: int | None) -> list[torch.Tensor]:
        cut = (lambda x: x) if rank is None else (lambda x: x.chunk(3, 1)[rank])
        leaves = {n: (cut(x) if n in PER_TOKEN else x).detach().requires_grad_() for n, x in args.items()}
        context = None if rank is None else ContextShard("turns", rank, 3)
        o, S = getattr(kernels, name)(**leaves, **options, context=context)
        return [o, S, *torch.autograd.grad(o, list(leaves.values()), cut(do))]

    shards = zip(*run_in_turns(compute, 3, patch), strict=True)
    for key, parts, expected in zip(("o", "S", *args), shards, compute(None), strict=True):
        if key == "S":
            found = parts[0]
        else:
            found = torch.cat(parts, 1) if key == "o" or key in PER_TOKEN else sum(parts)
        assert (found - expected).norm() <= limit * expected.norm(), key


@pytest.mark.parametrize("name", ["chunk_delta_rule", "chunk_ssd", "selective_scan"])
def test_shards_equal_whole_sequences(name, monkeypatch):
    compare_shards(name, 1e-12, monkeypatch)


def test_gradients_of_matrices_are_not_rounded_under_autocast(monkeypatch):
    monkeypatch.setattr(context_parallel, "all_gather", lambda x, group, size: x[None])
    local, initial = torch.randn(2, 1, 2, 5, 4)
    decay = torch.randn(1, 2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, final = context_parallel.exchange_states(local, decay, initial, ContextShard("alone", 0, 1), is_matrix=True)
        final.sum().backward()
    torch.testing.assert_close(decay.grad, torch.ones(1, 2, 5, 4) @ initial.mT)


def test_calls_that_make_no_sense_are_refused():
    q = torch.ones(1, 4, 1, 2)
    S0 = torch.zeros(1, 1, 2, 2)
    bounds = torch.tensor([0, 4])
    rows = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="give both or neither"):
        chunk_gla(q, q, q, -q, cu_seqlens=bounds, context=ContextShard("none", 0, 2))
    with pytest.raises(ValueError, match="no initial and no final states"):
        chunk_gla(q, q, q, -q, initial_state=S0, cu_seqlens=bounds, context=ContextShard("none", 0, 2, rows))
    with pytest.raises(ValueError, match="only the chunkwise operators"):
        fused_recurrent_gla(q, q, q, -q, context=ContextShard("none", 0, 2))
