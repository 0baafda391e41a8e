"""Every mixer with the choices of its options that compute in different ways: the rows of many tests."""

import pytest

CHOICES = {
    "gla": {},
    "gla scalar, convolution": {"gla": {"gate": "scalar", "short_conv": 4}},
    "gla fixed, no output gate": {"gla": {"gate": "fixed", "output_gate": False}},
    "gla ungated": {"gla": {"gate": "none"}},
    "gla grouped, clamped": {"num_heads": 4, "gla": {"num_kv_heads": 2, "min_log_gate": -0.04, "short_conv": 3}},
    "gla relu": {"gla": {"feature_map": "relu", "output_gate": False}},
    "attention": {"mixer": "attention"},
    "attention grouped": {"mixer": "attention", "attention": {"num_heads": 4, "num_kv_heads": 2}},
    "attention window": {"mixer": "attention", "attention": {"window": 7}},
    "linear": {"mixer": "linear"},
    "linear hedgehog": {"mixer": "linear", "linear": {"feature_map": "hedgehog"}},
    "linear identity": {"mixer": "linear", "linear": {"feature_map": "identity", "normalise": False}},
    "retention": {"mixer": "retention", "expand_k": 1.0, "expand_v": 2.0},
    "regla": {"mixer": "regla", "expand_k": 1.0},
    "regla, value axis": {"mixer": "regla", "regla": {"gate_axis": "value", "refined_gate": False}},
    "regla, elu1 and its sum": {"mixer": "regla", "regla": {"feature_map": "elu1", "output_norm": False}},
    "mamba": {"mixer": "mamba", "intermediate_size": 0},
    "mamba2": {"mixer": "mamba2", "mamba2": {"state_size": 16, "head_dim": 8, "groups": 2}},
    "deltanet": {"mixer": "deltanet", "expand_k": 1.0},
    "deltanet, no convolution": {"mixer": "deltanet", "deltanet": {"short_conv": 0}},
    "gated_deltanet": {"mixer": "gated_deltanet", "expand_k": 0.75, "expand_v": 1.5},
    "kda": {"mixer": "kda", "expand_k": 1.0},
    "transnormer": {"mixer": "transnormer", "expand_k": 1.0},
    "transnormer, norm attention": {
        "mixer": "transnormer",
        "transnormer": {"feature_map": "elu1", "decay": False, "lrpe": "all", "output_gate": False},
    },
    "transnormer_diag": {"mixer": "transnormer_diag", "transnormer_diag": {"block": 8}},
    "memsizer": {"mixer": "memsizer", "memsizer": {"slots": 6}},
    "hyena": {"mixer": "hyena", "hyena": {"filter_frequency": 3.0}},
    "hyena window": {"mixer": "hyena", "hyena": {"filter_length": 11, "filter_width": 8, "filter_features": 5}},
    "rpe_attention": {"mixer": "rpe_attention"},
    "rpe_attention window": {"mixer": "rpe_attention", "rpe_attention": {"features": 3, "window": 11}},
    "gla + attention": {"layers": "gla+attention", "attention": {"window": 9}},
}
EXACT = {"rtol": 1e-7, "atol": 1e-8}

every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
