import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glalm.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
from glalm.config.stages import StageConfig
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.train.optim import build_optimizers, learning_rate, set_learning_rate

TINY = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 8}


def learning_rates(steps: int = 110, **optim) -> list[float]:
    optim = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10} | optim
    config = RunConfig(optim=OptimConfig(**optim), train=TrainConfig(steps=steps))
    return [learning_rate(step, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_to_the_peak(schedule):
    found = learning_rates(schedule=schedule)
    assert found[0] == pytest.approx(0.1 + 0.9 / 10) and found[4] == pytest.approx(0.1 + 0.9 / 2)
    assert found[9] == 1.0 == max(found)
    assert found[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_cosine_and_linear():
    cosine, linear = learning_rates(), learning_rates(schedule="linear")
    assert cosine[59] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert cosine[34] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert linear[34] == pytest.approx(0.1 + 0.9 * 0.75)
    assert all(a > b for found in (cosine, linear) for a, b in itertools.pairwise(found[9:]))


def test_wsd_is_flat_and_then_decays():
    sqrt, linear = (
        learning_rates(schedule="wsd", decay_fraction=0.2, decay_shape=shape) for shape in ("sqrt", "linear")
    )
    for found in (sqrt, linear):
        assert set(found[9:88]) == {1.0} and found[88] < 1.0  # 22 of the 110 steps
    assert linear[98] == pytest.approx(0.1 + 0.9 * 0.5) and sqrt[98] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)))
    all_decay = learning_rates(20, schedule="wsd", decay_fraction=1.0, decay_shape="linear")[10:]
    assert all_decay == pytest.approx([0.1 + 0.09 * i for i in range(9, -1, -1)])  # no more than what warm-up leaves


def test_schedules_of_stages_follow_one_another_by_tokens():
    """Of a run with a warm-up of 2 steps. A step of the last stage has three times the tokens of one before."""
    stages = {
        "stable": StageConfig(tokens=400 * 256, schedule="constant"),
        "linear": StageConfig(tokens=400 * 256, schedule="linear", lr=0.5),
        "sqrt": StageConfig(tokens=1200 * 256, schedule="sqrt", lr=0.1, batch_size=300),
        "cosine": StageConfig(tokens=1200 * 256, schedule="cosine", lr=0.0, batch_size=300),
    }
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=2)
    config = RunConfig(optim=optim, train=TrainConfig(steps=None, batch_size=100, stages=stages))
    rates = [learning_rate(step, config) for step in range(1, config.steps + 1)]
    expected = [0.5, 1, 1, 1, 0.875, 0.75, 0.625, 0.5]
    expected += [0.5 - 0.4 * math.sqrt(i / 4) for i in (1, 2, 3, 4)]
    expected += [0.1 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3, 4)]
    assert rates == pytest.approx(expected)


def test_optim_schedule_goes_over_stages_without_schedules_by_tokens():
    """Half of the tokens are those of the first two of three steps."""
    stages = {"small": StageConfig(tokens=0.5), "large": StageConfig(tokens=0.5, batch_size=4)}
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0, schedule="linear")
    config = RunConfig(optim=optim, train=TrainConfig(steps=None, tokens=8 * 256, batch_size=2, stages=stages))
    assert [learning_rate(step, config) for step in (1, 2, 3)] == pytest.approx([0.75, 0.5, 0.0])


@pytest.mark.parametrize(
    "rule, factors", [("sqrt", (0.5, math.sqrt(0.5), 1)), ("linear", (0.25, 0.5, 1)), ("none", (1, 1, 1))]
)
def test_learning_rate_follows_the_batches_of_a_stage(rule, factors):
    """4, 2 and 1 steps of a quarter, a half and the whole of a batch of 8 windows: of 2,048 tokens each."""
    ramp = [(0.0, 512), (2048.0, 1024), (4096.0, 2048)]
    stages = {
        "ramp": StageConfig(tokens=6144, schedule="constant", batch_schedule=ramp, batch_rule=rule),
        "decay": StageConfig(tokens=4096, schedule="linear", lr=0.5),
    }
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0)
    data = DataConfig(seq_len=256)
    config = RunConfig(optim=optim, data=data, train=TrainConfig(steps=None, batch_size=8, stages=stages))
    assert [phase.steps for phase in config.phases] == [4, 2, 1, 2]
    rates = [learning_rate(step, config) for step in range(1, config.steps + 1)]
    assert rates == pytest.approx([*4 * factors[:1], *2 * factors[1:2], factors[2], 0.75, 0.5])


def test_schedule_without_warmup_and_all_warmup():
    assert learning_rates(1, warmup_steps=0) == [pytest.approx(0.1)]
    assert learning_rates(5, warmup_steps=5)[-1] == 1.0


def test_learning_rate_of_all_groups_is_set():
    made = build_optimizers(CausalLM(ModelConfig(**TINY)), OptimConfig(name="muon", lr=0.5))
    set_learning_rate(made, 0.25)
    groups = [group for optimizer in made for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == [0.25] * 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_which_parameters_decay_and_which_are_muons(name, tied):
    model = CausalLM(ModelConfig(**TINY, tie_word_embeddings=tied))
    made = build_optimizers(model, OptimConfig(name=name, weight_decay=0.5))
    found = {
        id(p): (type(optimizer).__name__, group["weight_decay"])
        for optimizer in made
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for parameter, p in model.named_parameters():
        matrix = p.ndim == 2 and "embeddings" not in parameter
        orthogonal = name == "muon" and matrix and "layers" in parameter
        assert found[id(p)] == ("Muon" if orthogonal else "AdamW", 0.5 if matrix else 0.0), parameter
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    assert len(found) == len(list(model.parameters()))


def test_one_step_equals_adamw():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    config = OptimConfig(weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, lr=0.01, min_lr=0.01)
    [optimizer] = build_optimizers(model, config)
    model.weight.grad = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -0.1]])
    optimizer.step()
    expected = before * (1 - 0.01 * 0.1) - 0.01 * model.weight.grad.sign()
    torch.testing.assert_close(model.weight.detach(), expected)


def test_two_steps_equal_adamw_with_the_configs_betas():
    """Compare with Loshchilov and Hutter's formulas, with betas and eps that are not the defaults."""
    model = torch.nn.Linear(3, 2)
    config = OptimConfig(weight_decay=0.1, betas=(0.5, 0.75), eps=0.1, lr=0.01, min_lr=0.01)
    [optimizer] = build_optimizers(model, config)
    expected, m, s = model.weight.detach().double(), 0.0, 0.0
    for t in (1, 2):
        g = torch.randn(2, 3, generator=torch.Generator().manual_seed(t))
        model.weight.grad = g.clone()
        optimizer.step()
        m, s = 0.5 * m + 0.5 * g.double(), 0.75 * s + 0.25 * g.double() ** 2
        update = (m / (1 - 0.5**t)) / ((s / (1 - 0.75**t)).sqrt() + 0.1)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=0, atol=1e-7)


@given(
    batches=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=4),
    extra=st.integers(1, 3000),
    schedule=st.sampled_from(["cosine", "linear", "wsd"]),
    warmup=st.one_of(st.builds(dict, warmup_steps=st.just(0)), st.builds(dict, warmup_tokens=st.integers(1, 60))),
)
@settings(max_examples=80)
def test_a_total_of_tokens_holds_for_every_batch(batches, extra, schedule, warmup):
    """A run that is resumed with other batches ends within a step of its tokens, at the learning rate of the end."""
    total = sum(steps * batch for steps, batch in batches) + extra
    optim = OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "schedule": schedule, "warmup_steps": None} | warmup)
    if optim.warmup_steps is None:
        assume(optim.warmup_tokens <= extra)
    step, tokens, milestones = 0, 0, []
    trained = [0]  # tokens after each step
    for steps, batch in batches:
        assume(optim.warmup_tokens is None or -(-optim.warmup_tokens // batch) <= -(-total // batch))
        config = RunConfig(
            optim=optim,
            data=DataConfig(seq_len=1),
            train=TrainConfig(steps=None, tokens=total, batch_size=batch),
        )
        config.resume_at(step, tokens, milestones)
        assume(config.warmup_steps < config.steps)
        assert [config.tokens_at(n) for n in range(step + 1)] == trained
        assert total <= config.tokens_at(config.steps) < total + batch and config.steps > step
        assert learning_rate(config.steps, config) == pytest.approx(0.1)
        rates = [learning_rate(n, config) for n in range(1, config.steps + 1)]
        assert min(rates) + 1e-9 >= 0.1 and max(rates) <= 1 + 1e-9
        milestones = config.milestones
        trained += [tokens + n * batch for n in range(1, steps + 1)]
        step += steps
        tokens += steps * batch


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_another_batch_does_not_shift_the_schedule(schedule):
    """Where a run in small batches and one that continues in large ones have as many tokens, their rates are equal."""
    optim = OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=None, warmup_tokens=160)
    small, large = (
        RunConfig(optim=optim, data=DataConfig(seq_len=4), train=TrainConfig(steps=None, tokens=1600, batch_size=batch))
        for batch in (2, 8)
    )
    for resumed_at in (8, 40, 100):  # in the warm-up and after it
        large.resume_at(resumed_at, resumed_at * 8, small.milestones)
        assert large.steps == resumed_at + (200 - resumed_at) // 4
        for step in range(resumed_at + 1, large.steps + 1):
            same_tokens = resumed_at + (step - resumed_at) * 4
            assert large.tokens_at(step) == small.tokens_at(same_tokens)
            assert learning_rate(step, large) == pytest.approx(learning_rate(same_tokens, small), abs=1e-9)


def test_a_warm_up_in_steps_continues_where_it_was():
    config = RunConfig(
        optim=OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=10),
        data=DataConfig(seq_len=4),
        train=TrainConfig(steps=None, tokens=1600, batch_size=8),
    )
    config.resume_at(4, 4 * 8, [(0, 0, 2, 4)])
    assert learning_rate(5, config) == 0.5 and config.warmup_steps == 10


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Apply five of Muon's Newton-Schulz iterations to the singular values, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / x.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


def test_two_steps_equal_muon():
    model = CausalLM(ModelConfig(**TINY))
    w = model.model.layers[0].mlp.down_proj.weight
    [muon, _] = build_optimizers(model, OptimConfig(name="muon", weight_decay=0.1, momentum=0.5, lr=0.01, min_lr=0.01))
    expected, momentum = w.detach().double(), 0.0
    for seed in range(2):
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
        muon.step()
        momentum = 0.5 * momentum + 0.5 * w.grad.double()
        update = orthogonal(0.5 * w.grad + 0.5 * momentum) * 0.2 * math.sqrt(max(w.shape))  # AdamW's size
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
    moved = 0.01 * 0.2 * math.sqrt(max(w.shape) * min(w.shape))
    assert (w.double() - expected).norm() < 0.05 * moved  # Muon multiplies in bfloat16
