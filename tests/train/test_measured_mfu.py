import pytest

from glalm.cli import compose_config
from glalm.evals.options import TrainingRun
from glalm.model.decoder import model_cost
from glalm.train.measured_mfu import MEASURED, expected_mfu

H200 = "NVIDIA H200"


def mfu_of(mixer: str, parameters: int, length: int) -> float:
    return next(each.mfu for each in MEASURED[mixer] if (each.parameters, each.length) == (parameters, length))


def test_nearest_measurement_counts():
    assert expected_mfu(["gla"], 374_475_776, 2048, H200) == pytest.approx(mfu_of("gla", 374, 2048))
    assert expected_mfu(["gla"], 1_000_000_000, 3000, H200) == pytest.approx(mfu_of("gla", 1366, 2048))
    assert expected_mfu(["gla"], 300_000_000, 16384, H200) == pytest.approx(mfu_of("gla", 374, 32768))


def test_layers_of_two_mixers_take_the_time_of_both():
    gla, attention = mfu_of("gla", 374, 2048), mfu_of("attention", 374, 2048)
    time = 3 / gla + 1 / attention
    assert expected_mfu(["gla", "gla", "gla", "attention"], 374_000_000, 2048, H200) == pytest.approx(4 / time)


@pytest.mark.parametrize(
    "mixers, parameters, length, gpu",
    [
        (["gla"], 374_000_000, 2048, "NVIDIA H100 80GB HBM3"),
        (["gla"], 7_000_000_000, 2048, H200),
        (["gla"], 374_000_000, 256, H200),
        (["gla", "memsizer"], 374_000_000, 2048, H200),
    ],
)
def test_what_was_not_measured_is_unknown(mixers, parameters, length, gpu):
    assert expected_mfu(mixers, parameters, length, gpu) is None


@pytest.mark.parametrize(
    "preset, tokens_per_second",
    [
        ("gla_small", 1_200_000),
        ("gla_340m", 209_000),
        ("gla_1b3", 60_800),
        ("regla_340m", 187_000),
        ("retention_340m", 187_000),
        ("deltanet_340m", 198_000),
        ("gated_deltanet_340m", 183_000),
        ("kda_340m", 170_500),
        ("mamba2_340m", 144_000),
        ("mamba_340m", 112_000),
        ("attention_340m", 174_000),
    ],
)
def test_presets_have_the_speeds_that_were_measured(preset, tokens_per_second):
    """These are in docs/mixers.md and docs/performance.md."""
    config = compose_config(TrainingRun, "train", [f"model={preset}"]).model
    cost = model_cost(config, 2048)
    mfu = expected_mfu(config.layer_mixers(), cost.parameters, 2048, H200)
    assert 989e12 * mfu / cost.training == pytest.approx(tokens_per_second, rel=0.005)
