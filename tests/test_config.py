import dataclasses
import math
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from glalm.cli import check_choices, check_flags, compose_config, protect_names, restore_names, store_defaults
from glalm.config.run import OptimConfig, RunConfig, TrainConfig, describe_differences, run_identity
from glalm.config.strict import ConfigError, build_dataclass, check_overrides, default_tree, flatten_tree
from glalm.evals.options import EvalConfig, ExtrapolationConfig, TrainEvalsConfig, TrainingRun
from glalm.model.config import ModelConfig
from glalm.train.optim import learning_rate
from glalm.train.state import BatchPlan

CONFIGS = Path(__file__).parent.parent / "configs"


def composed(*overrides: str, config: str = "train", cls: type = TrainingRun):
    return compose_config(cls, config, list(overrides))


@pytest.mark.parametrize("group", ["model", "data", "optim", "train", "track"])
def test_every_file_of_configs_builds(group):
    files = sorted((CONFIGS / group).glob("*.yaml"))
    assert files
    for file in files:
        steps = ["train.steps=30000"] if group == "optim" else []
        assert isinstance(composed(f"{group}={file.stem}", *steps), RunConfig)


@pytest.mark.parametrize("experiment", ["gla_340m", "gla_1b3", "attention_340m", "attention_1b3"])
def test_experiments_are_the_papers(experiment):
    """They have the steps, warm-up and rates of the GLA paper's appendix, and its batch on 1 to 256 GPUs."""
    config = composed(f"experiment={experiment}")
    steps, warmup, batch = {"340m": (28611, 954, 2**19), "1b3": (47684, 477, 2**21)}[experiment.split("_")[-1]]
    assert (config.steps, config.warmup_steps, config.tokens_per_step) == (steps, warmup, batch)
    assert config.name == experiment and config.model.mixer == experiment.split("_")[0]
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.weight_decay, optim.grad_clip) == (3e-4, 3e-5, 0.01, 1.0)
    assert (optim.name, optim.schedule, config.data.seq_len, config.data.document_boundaries) == (
        "adamw", "cosine", 2048, "ignore"
    )  # fmt: skip
    for world in (1, 2, 8, 64, 256):
        plan = BatchPlan.from_config(config, world)
        assert plan.micro_batch * plan.accumulation * world * 2048 == batch == plan.tokens_per_step


def test_experiment_of_a_million_tokens_is_shared_by_eight():
    config = composed("experiment=gla_340m_1m")
    plan = BatchPlan.from_config(config, 8)
    assert (plan.seq_len, plan.shard_length, plan.data_parallel, plan.context_parallel) == (2**20, 2**17, 1, 8)
    assert (
        BatchPlan.from_config(composed("experiment=gla_340m_1m", "train.tbptt_length=65536"), 8).shard_length == 2**13
    )


def test_budgets_of_the_ladder():
    tiny, small, paper = (composed(f"experiment=ladder_{size}") for size in ("tiny", "small", "340m"))
    assert (tiny.steps * tiny.tokens_per_step, tiny.data.path) == (240 * 8 * 128, "data/demo")
    assert (small.steps * small.tokens_per_step, small.tokens_per_step % (12 * 2048)) == (51_609_600, 0)
    assert (paper.steps, paper.warmup_steps, paper.data.path) == (13352, 954, "data/slimpajama")


def test_speedruns_have_one_budget():
    recipe = composed("experiment=gla_speedrun")
    paper = composed("experiment=gla_speedrun_paper")
    tokens = 1_153_433_600
    assert (recipe.steps, recipe.tokens_per_step) == (8_800, 2**17) and recipe.tokens_at(recipe.steps) == tokens
    assert (paper.steps, paper.tokens_per_step) == (2_200, 2**19) and paper.tokens_at(paper.steps) == tokens
    assert (recipe.warmup_steps, paper.warmup_steps) == (294, 74)  # 1/30 of the tokens
    assert dataclasses.replace(paper.optim, warmup_tokens=500_000_000) == composed("experiment=gla_340m").optim
    assert paper.model == composed("model=gla_small").model


def test_experiment_can_be_changed():
    config = composed("experiment=gla_340m", "model=mamba2_340m", "name=other", "train.log_every=3")
    assert (config.name, config.model.mixer, config.train.log_every, config.steps) == ("other", "mamba2", 3, 28611)


@pytest.mark.parametrize("config, cls", [("train", TrainingRun), ("eval", EvalConfig)])
def test_every_key_can_be_set(config, cls):
    def paths(tree, where=""):
        return [p for k, v in tree.items() for p in (paths(v, f"{where}{k}.") if isinstance(v, dict) else [where + k])]

    store_defaults(cls)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        overrides = [f"{path}=null" for path in paths(default_tree(cls))]
        check_overrides(overrides, cls, [])
        composed = compose(config, overrides)
        for path in paths(default_tree(cls)):
            assert OmegaConf.select(composed, path) is None


def test_overrides_reach_the_dataclasses():
    config = composed("model=gla_340m", "train.steps=5000", "optim.lr=1e-3", "optim.betas=[0.8,0.99]", 'name="x y é"')
    assert (config.model.hidden_size, config.train.steps, config.optim.lr) == (1024, 5000, 1e-3)
    assert config.optim.betas == (0.8, 0.99)
    assert config.folder == Path("runs") / "x y é"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stpes=3", "unknown key train.stpes; did you mean train.steps?"),
        ("modle=gla_tiny", "unknown key modle; did you mean model?"),
        ("seq_len=128", "unknown key seq_len; did you mean data.seq_len?"),
        ("+train.stepz=3", "did you mean train.steps?"),
        ("model.heads=4", "did you mean model.num_heads?"),
        ("train.steps.more=3", "unknown key train.steps.more"),
        ("zzz=3", "valid keys: name, runs_dir, seed, model"),
        ("learning_rate=1e-3", "unknown key learning_rate; did you mean optim.lr?"),
        ("step=5", "unknown key step; did you mean train.steps?"),
        ("nam=x", "unknown key nam; did you mean name?"),
    ],
)
def test_unknown_key_suggests_the_nearest(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_overrides([override], RunConfig, ["model", "data"])


def test_valid_command_lines_pass():
    args = ["model=gla_340m", "train.steps=3", "+track.project=x", "--help", "--multirun", "hydra.verbose=true"]
    check_overrides([*args, "hydra/job_logging=default", "~track"], RunConfig, ["model", "track"])


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"train": {"steps": "many"}}, "train.steps='many' must be an integer, not text"),
        ({"train": {"steps": 1.5}}, "train.steps=1.5 must be an integer"),
        ({"train": {"steps": True}}, "train.steps=True must be an integer"),
        ({"train": {"precision": "bf61"}}, "did you mean bf16?"),
        ({"model": {"tie_word_embeddings": 1}}, "must be true or false"),
        ({"model": {"hidden_size": 100, "num_heads": 3}}, "model.num_heads=3 does not divide"),
        ({"model": {"vocab_size": 0}}, "model.vocab_size must be positive"),
        (
            {"model": {"mixer": "mamba2", "mamba2": {"groups": 0}}},
            "model.mamba2.groups must be positive and finite, not 0",
        ),
        ({"model": {"expand_k": -1}}, "model.expand_k must be positive and finite, not -1.0"),
        ({"optim": {"eps": 0}}, "optim.eps must be positive and finite, not 0"),
        ({"optim": {"weight_decay": -0.1}}, "optim.weight_decay must not be negative, not -0.1"),
        ({"optim": {"weight_decay": math.inf}}, "optim.weight_decay must be finite, not inf"),
        ({"optim": {"lr": math.inf}}, "optim.lr must be finite, not inf"),
        ({"optim": {"eps": math.inf}}, "optim.eps must be positive and finite, not inf"),
        ({"train": {"z_loss": math.inf}}, "train.z_loss must be 0 or more, and finite, not inf"),
        ({"parallel": {"timeout_minutes": 1e300}}, "parallel.timeout_minutes=1e+300 is longer than a year"),
        ({"train": {"micro_batch_size": 0}}, "train.micro_batch_size must be positive, not 0"),
        ({"optim": {"min_lr": 1.0}}, "optim.min_lr=1.0 must lie between 0 and optim.lr"),
        ({"optim": {"betas": [0.9]}}, "optim.betas=[0.9] must be a list of 2 values"),
        (
            {"optim": {"warmup_steps": 2000}},
            "optim.warmup_steps=2000 is longer than train.steps=1000; set optim.warmup_steps=33 for 1/30",
        ),
        ({"name": "a/b"}, "must be one folder name"),
        ({"data": {"path": "gs://bucket/data"}}, "data.path=gs://bucket/data is a URL, but glalm reads"),
        ({"runs_dir": "s3://bucket/runs"}, "runs_dir=s3://bucket/runs is a URL"),
        ({"seed": -1}, "seed must be from 0 to 2^63 - 1, not -1"),
        ({"seed": 2**63}, "seed must be from 0 to 2^63 - 1, not 9223372036854775808"),
        ({"train": {"stesp": 3}}, "unknown key train.stesp; did you mean train.steps?"),
    ],
)
def test_bad_values_say_what_to_write(tree, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_dataclass(RunConfig, tree)


def test_extrapolation_settings_of_the_paper():
    config = composed("extrapolation=paper", "extrapolation.documents=4", config="eval", cls=EvalConfig).extrapolation
    assert (config.max_length, config.bucket, config.text, config.documents) == (28672, 2048, "stream", 4)
    assert composed(config="eval", cls=EvalConfig).extrapolation == ExtrapolationConfig()


def test_swiglu_width_is_the_papers():
    widths = [ModelConfig(hidden_size=d).intermediate_size for d in (1024, 2048)]
    assert widths == [2816, 5632]


def test_the_batch_is_divided_over_processes_and_micro_batches():
    def divide(world_size: int, **train) -> tuple[int, int]:
        plan = BatchPlan.from_config(RunConfig(train=TrainConfig(**train)), world_size)
        assert (plan.data_parallel, plan.context_parallel, plan.segments) == (world_size, 1, 1)
        return plan.micro_batch, plan.accumulation

    sizes = {"batch_size": 32, "micro_batch_size": 4}
    assert [divide(world_size, **sizes) for world_size in (1, 2, 8)] == [(4, 8), (4, 4), (4, 1)]
    assert divide(16, **sizes) == (2, 1) and divide(32, **sizes) == (1, 1)
    assert divide(2, batch_size=32) == (16, 1)
    assert divide(2, batch_size=30, micro_batch_size=4) == (3, 5)
    with pytest.raises(ConfigError, match="is 32 sequences, which cannot be divided evenly over 3 processes"):
        divide(3, **sizes)


def test_lengths_in_tokens():
    """The GLA paper trains its 340M model on 15B tokens in batches of 0.5M, with a warm-up over 0.5B."""
    tokens = {"steps": None, "tokens": 15e9, "batch_size": None, "batch_tokens": 2**19}
    tree = {"data": {"seq_len": 2048}, "optim": {"warmup_steps": None, "warmup_tokens": 5e8}, "train": tokens}
    config = build_dataclass(RunConfig, tree)
    assert (config.batch_size, config.steps, config.warmup_steps) == (256, 28611, 954)
    assert config.tokens_per_step * (config.steps - 1) < 15e9 <= config.tokens_per_step * config.steps
    longer = build_dataclass(RunConfig, tree | {"data": {"seq_len": 32768}})
    assert (longer.batch_size, longer.steps, longer.warmup_steps) == (16, 28611, 954)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"train": {"tokens": 10}}, "train.steps=1000 and train.tokens=10 are alternatives; set train.steps"),
        ({"train": {"batch_size": None}}, "set train.batch_size=N or train.batch_tokens=N: both are null"),
        ({"optim": {"warmup_tokens": 10}}, "optim.warmup_steps=100 and optim.warmup_tokens=10"),
        (
            {"train": {"batch_size": None, "batch_tokens": 1000}, "data": {"seq_len": 256}},
            "train.batch_tokens=1000 is not a multiple of data.seq_len=256; set train.batch_tokens=1024",
        ),
        (
            {"optim": {"warmup_steps": None, "warmup_tokens": 1e9}},
            "optim.warmup_tokens=1000000000 is longer than train.steps=1000",
        ),
        ({"train": {"memory_snapshot": True}}, "set train.profile_steps=[3,4]"),
        ({"train": {"profile_steps": [5, 4]}}, "train.profile_steps=[5,4] must be two steps in order"),
        ({"train": {"tokens": 1.5, "steps": None}}, "train.tokens=1.5 must be an integer"),
    ],
)
def test_lengths_that_do_not_fit(tree, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_dataclass(RunConfig, tree)


def test_identity_ignores_what_may_change():
    one = RunConfig()
    two = dataclasses.replace(one, name="other", train=dataclasses.replace(one.train, log_every=1))
    assert run_identity(one) == run_identity(two)
    three = dataclasses.replace(one, optim=OptimConfig(lr=1e-3))
    assert describe_differences(run_identity(one), run_identity(three)) == ["optim.lr: 0.0003 -> 0.001"]
    assert run_identity(TrainingRun(train_evals=TrainEvalsConfig(every=3))) == run_identity(one)


def test_evaluators_of_a_training_run_are_checked_strictly():
    for tree, message in [
        ({"evry": 3}, "unknown key train_evals.evry; did you mean train_evals.every?"),
        ({"every": "often"}, "train_evals.every='often' must be an integer"),
        ({"evals": ["genreate"]}, "train_evals.evals: no evaluator is called genreate; did you mean generate?"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            build_dataclass(TrainingRun, {"train_evals": tree})
    with pytest.raises(ConfigError, match=re.escape("did you mean train_evals.every?")):
        check_overrides(["train_evals.evry=3"], TrainingRun, [])


def test_a_list_of_choices_is_refused():
    """Hydra would merge their files: of track=[wandb,mlflow] the run would have MLflow alone."""
    for flags in ([], ["--config-dir", "mine"]):
        with pytest.raises(ConfigError, match=r"^track=\[wandb,mlflow\] is a list, .* Write track=wandb, or track=A,B"):
            check_choices([*flags, "seed=1", "track=[wandb,mlflow]"])
    check_choices(["track=wandb", "model=gla_tiny,attention_tiny", "train_evals.evals=[perplexity]"])


def test_folders_of_the_user_have_choices():
    for flags in (["--config-dir", "mine"], ["-cd", "mine"], ["hydra.searchpath=[file:///mine]"]):
        check_choices([*flags, "model=mine"])
    with pytest.raises(ConfigError, match=r"^model=mine is not a file of"):
        check_choices(["model=mine"])


def test_a_value_without_its_key_is_refused():
    for args in (["runs/demo"], ["seed=1", "demo"], ["--multirun", "demo"]):
        with pytest.raises(ConfigError, match=r"demo is no setting\. Write KEY=VALUE, such as name=demo; --help"):
            check_flags(args, EvalConfig)
    for args in (["--config-dir", "mine"], ["--help", "optim", "train"], ["~data.weights"], ["-cd", "mine", "seed=1"]):
        check_flags(args, TrainingRun)


@pytest.mark.parametrize("key", ["compile", "cuda_graph"])
def test_truth_values_are_not_given_as_numbers(key):
    """0 equals False and 1 equals True, but code that asks for `is False` would take 0 for true."""
    for value in (0, 1, 0.0, 1.0):
        with pytest.raises(ConfigError, match=rf"^train\.{key}={value} must be one of auto, True, False"):
            build_dataclass(RunConfig, {"train": {key: value}})
    for value in ("auto", True, False):
        assert getattr(build_dataclass(RunConfig, {"train": {key: value}}).train, key) is value


def test_infinite_clip_is_a_number():
    assert build_dataclass(RunConfig, {"optim": {"grad_clip": math.inf}}).optim.grad_clip == math.inf


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = build_dataclass(RunConfig, {"runs_dir": "~/runs", "data": {"path": "~/my data"}})
    assert (config.runs_dir, config.data.path) == ("/home/ada/runs", "/home/ada/my data")


def test_weights_of_sources_have_any_keys():
    assert composed("data.weights={books: 0.7, code: 1}").data.weights == {"books": 0.7, "code": 1.0}
    assert composed("+data.weights.books=0.5").data.weights == {"books": 0.5}
    check_overrides(["data.weights={a: 1}", "+data.weights.books=0.5"], RunConfig, ["data"])
    for tree, message in [
        ({"weights": [0.5]}, "data.weights=[0.5] must be a mapping: data.weights={a: 1, b: 2}"),
        ({"weights": {"books": "much"}}, "data.weights.books='much' must be a number"),
        ({"document_boundaries": "reset"}, "did you mean reset_state?"),
        ({"workers": 0}, "data.workers must be positive"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            build_dataclass(RunConfig, {"data": tree})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", "100", "model.vocab_size='100' must be an integer"),
        ("num_hidden_layers", 2.5, "model.num_hidden_layers=2.5 must be an integer"),
        ("mixer", None, "model.mixer=None must be text"),
        ("layers", [1], r"model.layers\[0\]=1 must be text"),
        ("gla", None, "model.gla must be a mapping"),
        ("tie_word_embeddings", "no", "model.tie_word_embeddings='no' must be true or false"),
        ("gate_logit_normalizer", float("inf"), "model.gate_logit_normalizer must be positive and finite, not inf"),
    ],
)
def test_types_of_model_options_are_checked(field, value, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{field: value})


@pytest.mark.parametrize("name", ["n" * 256, "é" * 128])
def test_a_name_longer_than_a_folders_may_be_is_refused(name):
    with pytest.raises(ConfigError, match=r"^name=.* has 256 bytes, and a folder's name at most 255"):
        RunConfig(name=name)
    assert RunConfig(name=name[:-1]).name == name[:-1]


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(["2010_01", "201001", "1e5", "1.10", "1_0.5", "true", "NULL", "nan", "-7", "a/b", "v1.2"]),
            st.from_regex(r"[0-9]{1,3}([._-][0-9]{1,2}){0,2}", fullmatch=True),
        ),
        st.integers(0, 9),
        min_size=1,
    )
)
@example({"2010_01": 3, "2010_02": 1})
def test_names_of_sources_on_a_command_line_stay_as_they_are(weights):
    text = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
    tree = OmegaConf.create({"data": {"weights": None}})
    override = OverridesParser.create().parse_override(protect_names([f"data.weights={{{text}}}"])[0])
    tree.data.weights = override.value()
    assert restore_names(OmegaConf.to_container(tree)) == {"data": {"weights": weights}}


def test_numeric_names_of_sources_reach_the_config():
    assert composed("data.weights={2010_01: 3, 2010_02: 1}").data.weights == {"2010_01": 3.0, "2010_02": 1.0}
    assert protect_names(["name=a", "train_evals=[a]", "x='{1: 2}'"]) == ["name=a", "train_evals=[a]", "x='{1: 2}'"]


FLOATS = [path for path, value in flatten_tree(default_tree(TrainingRun)).items() if isinstance(value, float)]


@pytest.mark.parametrize("path", [*FLOATS, "data.weights.books", "train.guard.spike_factor"])
@pytest.mark.parametrize("value", ["nan", math.nan])
def test_nan_is_refused(path, value):
    tree = value
    for key in reversed(path.split(".")):
        tree = {key: tree}
    with pytest.raises(ConfigError, match=rf"{re.escape(path)}=nan must be a number"):
        build_dataclass(TrainingRun, tree)


STAGES = {"stable": {"tokens": 0.8}, "decay": {"tokens": 0.2}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": {"steps": 100}}, r"train\.steps=100: .* Set train\.steps=null"),
        ({"train": {"tokens": None}}, r"are shares of train\.tokens, which is null. Set train\.tokens=N"),
        ({"decay": {"tokens": 0.3}}, r"add up to 1\.1\. Make them add up to 1"),
        ({"decay": {"tokens": 2e6}}, r"some have shares of at most 1\. Write one kind for all"),
        ({"decay": {"tokens": None}}, r"train\.stages\.decay needs tokens: a number such as 8e9, or a share"),
        ({"decay": {"tokens": 1e6}, "stable": {"tokens": 1e6}}, r"Set train\.tokens=null, or write shares of it"),
        ({"decay": {"lr": 0.0}}, r"stages\.decay\.lr=0\.0 .* Write train\.stages\.decay\.schedule=linear"),
        ({"decay": {"schedule": "sqrt", "lr": math.inf}}, r"decay\.lr must be 0 or more, and finite, not inf"),
        ({"decay": {"schedule": "sqrt"}}, r"stages\.decay\.schedule=sqrt needs train\.stages\.decay\.lr=RATE"),
        ({"decay": {"schedule": "constant"}}, r"train\.stages\.stable has no schedule, and other stages have one"),
        ({"decay": {"batch_size": 2, "batch_tokens": 512}}, r"are alternatives; remove one of them"),
        ({"decay": {"seq_len": 300, "batch_tokens": 512}}, r"In train\.stages\.decay, .* is not a multiple of data"),
        ({"stable": {"batch_size": 10**6}}, r"train\.stages\.decay has no step, because a step has 1,024 tokens"),
        ({"decay": {"sequence": 3}}, r"unknown key train\.stages\.decay\.sequence; did you mean .*\.seq_len"),
        ({"decay": {"batch_schedule": [[5, 512]]}}, r"stages\.decay\.batch_schedule must begin at 0 tokens"),
        (
            {"decay": {"batch_schedule": [[0, 512], [0.5, 512], [9e4, 512]]}},
            r"batch_schedule has numbers of tokens and",
        ),
        ({"decay": {"seq_len_schedule": [[0, 64], [9e9, 128]]}}, r"stages\.decay has a piece that begins after 9,000"),
        ({"decay": {"seq_len_schedule": [[0, 0]]}}, r"seq_len_schedule: the batches and lengths must be positive"),
        (
            {"decay": {"batch_schedule": [[0, 512], [0.5, 100]]}},
            r"^train\.stages\.decay\.batch_schedule has batches of 100 .* 256 after 100,000,000 tokens; write 256$",
        ),
        (
            {"decay": {"batch_schedule": [[0, 900]], "seq_len_schedule": [[0, 300], [0.25, 400]]}},
            r"batches of 900 tokens, which do not fit the windows of 400 after 50,000,000 tokens; write 800$",
        ),
        ({"2nd": {"tokens": 0.1}}, r"train\.stages\.2nd: the name of a stage begins with a letter"),
        (
            {"train": {"tbptt_length": 64}, "decay": {"document_boundaries": "reset_state"}},
            r"In train\.stages\.decay, .* train\.tbptt_length carries the state on",
        ),
        ({"train": {"batch_size": 4, "tokens": 30_000}, "decay": {}}, r"=100 is longer than the 30 steps of the run;"),
    ],
)
def test_stages_that_do_not_fit_are_refused(changes, message):
    stages = {name: STAGES.get(name, {}) | changes.get(name, {}) for name in {**STAGES, **changes} if name != "train"}
    train = {"steps": None, "tokens": 10**9, "batch_size": 4, "stages": stages} | changes.get("train", {})
    with pytest.raises(ConfigError, match=message):
        build_dataclass(RunConfig, {"train": train})


def test_batches_and_segments_must_fit_the_windows_of_stages_and_not_those_of_validation():
    """Steps of the two pieces have 3 x 2048 and 2 x 3072 tokens. Without schedules they would have 6144 as well."""
    stages = {"all": {"tokens": 1.0, "seq_len_schedule": [[0, 2048], [0.5, 3072]]}}
    train = {"steps": None, "tokens": 6144 * 100, "batch_size": None, "batch_tokens": 6144, "stages": stages}
    tree = {"train": train | {"tbptt_length": 1024}, "optim": {"schedule": "wsd", "warmup_steps": 2, "lr": 1.0}}
    for length in (500, 10_000):
        config = build_dataclass(RunConfig, tree | {"data": {"seq_len": length}})
        assert [(phase.config.batch_size, phase.lr_factor) for phase in config.phases] == [(3, 1.0), (2, 1.0)]
        assert [learning_rate(step, config) for step in (2, 80, 100)] == pytest.approx([1.0, 1.0, 3e-5])
    with pytest.raises(ConfigError, match=r"parallel\.context=2 does not divide data\.seq_len=501"):
        build_dataclass(RunConfig, tree | {"data": {"seq_len": 501}, "parallel": {"context": 2}})


def test_shares_and_numbers_of_tokens_give_the_same_stages():
    """Of 1M tokens in batches of 4 x 256 and then 8 x 512: 800,000 / 1,024 steps rounded up, then 199,744 / 4,096."""
    decay = {"seq_len": 512, "batch_size": 8}
    shares = {"steps": None, "tokens": 10**6, "batch_size": 4, "micro_batch_size": 4}
    numbers = shares | {"tokens": None, "stages": {"stable": {"tokens": 8e5}, "decay": {"tokens": 2e5, **decay}}}
    shares["stages"] = {"stable": {"tokens": 0.8}, "decay": {"tokens": 0.2, **decay}}
    for train in (shares, numbers):
        config = build_dataclass(RunConfig, {"train": train})
        assert config.stage_steps == {"stable": range(1, 783), "decay": range(783, 832)}
        assert config.steps == 831 and config.tokens_at(782) == 800_768 and config.tokens_at(831) == 1_001_472
        assert [phase.config.train.micro_batch_size for phase in config.phases] == [4, 2]


def test_resumed_run_may_change_the_micro_batches_of_stages_but_not_their_order():
    one = build_dataclass(RunConfig, {"train": {"steps": None, "tokens": 10**9, "stages": STAGES}})
    other = {"decay": {"tokens": 0.2}, "stable": {"tokens": 0.8, "micro_batch_size": 2}}
    other = build_dataclass(RunConfig, {"train": {"steps": None, "tokens": 10**9, "stages": other}})
    differences = describe_differences(run_identity(one), run_identity(other))
    assert differences == ["order of train.stages: 'stable, decay' -> 'decay, stable'"]


def test_keys_of_stages_are_set_and_checked_on_the_command_line():
    arguments = ["train.steps=null", "train.stages={a: {tokens: 1e6}, b: {tokens: 2e6, weights: {x: 1}}}"]
    config = composed(*arguments)
    assert [*config.train.stages] == ["a", "b"] and config.train.stages["b"].weights == {"x": 1.0}
    with pytest.raises(ConfigError, match=r"unknown key train\.stages\.b\.rate"):
        check_overrides(["train.stages.b.rate=1"], TrainingRun, [])
    valid = ["+train.stages.b.lr=1", "train.stages.b.weights.x=1", "train.stages.b.weights.a.b=1"]
    check_overrides(valid, TrainingRun, [])
    assert composed("experiment=gla_340m_stages").stage_steps["decay"] == range(22_890, 28_612)
