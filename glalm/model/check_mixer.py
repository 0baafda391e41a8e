"""Check on tiny random inputs that a mixer does what glalm asks of every mixer."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from glalm.config.strict import ConfigError, require
from glalm.model.config import ModelConfig
from glalm.model.decoder import init_module
from glalm.model.mixers.base import Mixer, check_outputs

BATCH = 2
LENGTH = 12  # tokens
CUT = 5  # tokens of the first of two parts


def check_mixer(mixer: type[Mixer], config: ModelConfig | None = None, device: str = "cpu") -> None:
    """Raise ConfigError if a mixer breaks the contract of `Mixer.forward`; the message says by what.

    No token may see later ones. Two segments with the state carried between them, single steps, packed sequences, and
    a batch padded on the left must give what each sequence gives at once. Every parameter must get a gradient.

    Args:
        mixer: Its class.
        config: A small model's config; None: one of width 32.
        device: Where the mixer runs, in float32.
    """
    name = mixer.__name__
    config = config or ModelConfig(hidden_size=32, num_hidden_layers=1, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = mixer.build(config, 0).to(device)
        # Larger weights than a model starts with, so that what is wrong shows in the outputs.
        module.apply(lambda part: init_module(part, std=0.3))
        x = torch.randn(BATCH, LENGTH, config.hidden_size, device=device)
    flops = module.flops(LENGTH)
    require(isinstance(flops, int) and flops >= 0, f"{name}.flops must return an integer from 0 on, not {flops!r}")

    y, _ = check_outputs(module, x, module(x))
    y.square().sum().backward()
    for key, parameter in module.named_parameters():
        is_finite = parameter.grad is not None and bool(parameter.grad.isfinite().all())
        require(is_finite, f"{name}: the parameter {key} has no gradient, or not a finite one")
    module.eval()
    with torch.no_grad():
        expected = module(x)[0]
        _require_equal(name, "training and evaluation", expected, y.detach())
        changed = module(torch.cat([x[:, :CUT], -x[:, CUT:]], 1))[0]
        _require_equal(name, "a token, when only later ones change,", changed[:, :CUT], expected[:, :CUT])
        _check_state(name, module, x, expected)
        _check_layouts(name, module, x, expected)


def _check_state(name: str, module: Mixer, x: Tensor, expected: Tensor) -> None:
    """Check the state after a segment, and the outputs that follow from it."""
    first, state = module(x[:, :CUT], return_state=True)
    # StateCache.save writes no other structures.
    leaves = state if isinstance(state, tuple) else (state,)
    is_valid = bool(leaves) and all(isinstance(leaf, Tensor) and leaf.shape[:1] == (BATCH,) for leaf in leaves)
    require(
        is_valid,
        f"{name}: with return_state=True, forward must return a state: a tensor or a tuple of tensors whose first axis "
        f"is the {BATCH} sequences",
    )
    before = tree_map(torch.clone, state)
    rest, _ = module(x[:, CUT:], state=state, return_state=True)
    for old, leaf in zip(tree_leaves(before), leaves, strict=True):
        require(torch.equal(old, leaf), f"{name}: forward must not change the state that it is given")
    _require_equal(name, "two segments with the state carried over", torch.cat([first, rest], 1), expected)
    steps = [first]
    for t in range(CUT, LENGTH):
        y, state = module(x[:, t : t + 1], state=state, return_state=True)
        steps.append(y)
    _require_equal(name, "single steps from a state", torch.cat(steps, 1), expected)


def _check_layouts(name: str, module: Mixer, x: Tensor, expected: Tensor) -> None:
    """Check sequences that are packed into one row, the first one in two parts, and a row with padding on the left."""
    rest, _ = module(x[:1, CUT:])
    bounds = torch.tensor([0, CUT, LENGTH, 2 * LENGTH], device=x.device)
    packed, _ = module(x.flatten(0, 1)[None], cu_seqlens=bounds)
    apart = torch.cat([expected[0, :CUT], rest[0], expected[1]])
    _require_equal(name, "packed sequences (cu_seqlens)", packed[0], apart)
    padding = torch.ones(BATCH, LENGTH, 1, device=x.device)
    padding[0, :CUT] = 0
    padded, _ = module(x * padding, padding=padding)
    _require_equal(name, "a row that is padded on the left", padded[0, CUT:], rest[0])


def _require_equal(name: str, what: str, found: Tensor, expected: Tensor) -> None:
    """Raise ConfigError unless two outputs are equal up to rounding in float32."""
    error = (found.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().item()
    if not error <= 1e-4 * scale:
        raise ConfigError(
            f"{name}: the outputs of {what} must be those of the sequence at once, but differ by {error:.2g}, "
            f"where the largest is {scale:.2g}"
        )
