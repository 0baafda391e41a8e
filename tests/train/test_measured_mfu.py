import pytest

from glalm.cli import compose_config
from glalm.evals.options import TrainingRun
from glalm.model.decoder import model_cost
from glalm.train.measured_mfu import MEASURED, expected_mfu, interpolate_mfu

H200 = "NVIDIA H200"


def mfu_of(mixer: str, parameters: int, length: int) -> float:
    return next(each.mfu for each in MEASURED[mixer] if (each.parameters, each.length) == (parameters, length))


def test_measurements_are_kept_and_lie_between_their_neighbors():
    for mixer, measurements in MEASURED.items():
        for each in measurements:
            assert expected_mfu([mixer], round(1e6 * each.parameters), each.length, H200) == pytest.approx(each.mfu)
    short, long = mfu_of("gla", 374, 2048), mfu_of("gla", 374, 32768)
    assert expected_mfu(["gla"], 374_000_000, 8192, H200) == pytest.approx((short + long) / 2)
    assert expected_mfu(["gla"], 374_000_000, 16384, H200) == pytest.approx((short + 3 * long) / 4)


def test_size_between_two_is_between_their_values():
    """The geometric mean of two sizes has the mean of what is interpolated at either size."""
    at_8k = [(mfu_of("gla", size, 2048) + mfu_of("gla", size, 32768)) / 2 for size in (374, 1366)]
    between = round(1e6 * (374 * 1366) ** 0.5)
    assert expected_mfu(["gla"], between, 8192, H200) == pytest.approx(sum(at_8k) / 2)


def test_mfu_beyond_the_measurements_is_that_of_the_last():
    assert expected_mfu(["gla"], 2_000_000_000, 2048, H200) == pytest.approx(mfu_of("gla", 1366, 2048))
    assert expected_mfu(["mamba2"], 376_000_000, 65536, H200) == pytest.approx(mfu_of("mamba2", 376, 32768))
    assert expected_mfu(["deltanet"], 100_000_000, 1024, H200) == pytest.approx(mfu_of("deltanet", 374, 2048))


def test_interpolation_predicts_a_size_from_its_neighbors():
    others = [each for each in MEASURED["gla"] if each.parameters != 374]
    assert interpolate_mfu(others, 374, 2048) == pytest.approx(mfu_of("gla", 374, 2048), rel=0.02)


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
        ("gla_340m", 204_400),
        ("gla_1b3", 63_100),
        ("regla_340m", 187_000),
        ("retention_340m", 181_200),
        ("deltanet_340m", 196_300),
        ("gated_deltanet_340m", 181_300),
        ("kda_340m", 169_000),
        ("mamba2_340m", 144_000),
        ("mamba_340m", 112_700),
        ("mamba_1b3", 42_900),
        ("attention_340m", 191_000),
        ("attention_1b3", 62_000),
    ],
)
def test_presets_have_the_speeds_that_were_measured(preset, tokens_per_second):
    """These are in docs/performance.md, ReGLA's in docs/mixers.md."""
    config = compose_config(TrainingRun, "train", [f"model={preset}"]).model
    cost = model_cost(config, 2048)
    mfu = expected_mfu(config.layer_mixers(), cost.parameters, 2048, H200)
    assert 989e12 * mfu / cost.training == pytest.approx(tokens_per_second, rel=0.005)
