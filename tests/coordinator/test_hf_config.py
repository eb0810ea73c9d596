"""config.json -> ModelSpec: against transformers' own reading, and every refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_folders import BASE, FAMILIES, edit_json, save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.hf_config import read_hf_config
from protocol.errors import CheckpointInvalid, ConfigInvalid, ManyhandsError, ModelUnsupported
from protocol.specs import ActivationFormat, ModelSpec, RopeKind, RopeSpec, WeightFormat

ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write(folder: Path, family: str = "llama", **changes: Any) -> Path:
    values = {key: value for key, value in BASE.items() if key != "rope_parameters"}
    values |= {"architectures": [ARCHITECTURE[family]], "model_type": family, "rms_norm_eps": 1e-5, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return folder


def spec_of(folder: Path, family: str = "llama", **changes: Any) -> ModelSpec:
    return read_hf_config(write(folder, family, **changes)).spec


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_saved(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "some model", family)
    read = read_hf_config(tmp_path / "some model", weights=WeightFormat.INT8, activations=ActivationFormat.BFLOAT16)
    spec, config = read.spec, model.config
    attention = model.model.layers[0].self_attn
    assert (spec.name, spec.family) == ("some model", family)
    assert (spec.hidden, spec.layers, spec.vocab) == (32, 2, 97)
    assert (spec.heads, spec.kv_heads, spec.head_dim) == (4, 2, attention.head_dim)
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.qkv_bias == (attention.q_proj.bias is not None)
    assert spec.o_bias == (attention.o_proj.bias is not None)
    assert spec.mlp_bias == (model.model.layers[0].mlp.down_proj.bias is not None)
    assert spec.qk_norm == hasattr(attention, "q_norm")
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.sliding_windows == ((16, 16) if family == "mistral" else ())
    assert (spec.weights, spec.activations) == (WeightFormat.INT8, ActivationFormat.BFLOAT16)
    assert (read.eos_token_ids, read.bos_token_id, read.dtype) == ((2,), 1, "float32")


@pytest.mark.parametrize(
    ("dtype", "weights", "activations"),
    [("bfloat16", "bfloat16", "bfloat16"), ("float16", "float32", "float32"), (None, "float32", "float32")],
)
def test_formats_follow_the_checkpoint(tmp_path: Path, dtype: str | None, weights: str, activations: str) -> None:
    spec = spec_of(tmp_path, torch_dtype=dtype)
    assert (spec.weights, spec.activations) == (weights, activations)


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
@pytest.mark.parametrize(
    ("dtype", "activations"), [("bfloat16", "bfloat16"), ("float16", "float32"), (None, "float32")]
)
def test_quantised_weights_keep_the_activations_of_the_checkpoint(
    tmp_path: Path, weights: WeightFormat, dtype: str | None, activations: str
) -> None:
    folder = write(tmp_path, hidden_size=64, intermediate_size=96, head_dim=16, torch_dtype=dtype)
    spec = read_hf_config(folder, weights=weights).spec
    assert (spec.weights, spec.activations) == (weights, activations)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 48}, "hidden 48"),
        ({"intermediate_size": 72}, "intermediate 72"),
        ({"head_dim": 8}, "head_dim 16"),
    ],
)
def test_shapes_that_int4_can_not_group_are_refused(tmp_path: Path, changes: dict[str, int], named: str) -> None:
    folder = write(tmp_path, **{"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **changes})
    with pytest.raises(ModelUnsupported, match=named) as caught:
        read_hf_config(folder, weights=WeightFormat.INT4)
    assert "--dtype int8" in caught.value.remedy
    assert read_hf_config(folder, weights=WeightFormat.INT8).spec.weights is WeightFormat.INT8


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_SPEC = RopeSpec(
    theta=5e5, kind=RopeKind.LLAMA3, factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=32
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, RopeSpec(theta=10_000.0)),
        ({"rope_theta": 500000}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeSpec(theta=5e5)),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(theta=1e4, kind=RopeKind.LINEAR, factor=2)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, LLAMA3_SPEC),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, LLAMA3_SPEC),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, RopeSpec(theta=1e4)),
    ],
)
def test_both_rope_spellings(tmp_path: Path, changes: dict[str, Any], expected: RopeSpec) -> None:
    assert spec_of(tmp_path, **changes).rope == expected


WINDOWS = [
    ("mistral", {"sliding_window": None}, ()),
    ("mistral", {"sliding_window": 8}, (8, 8)),
    ("mistral", {}, (4096, 4096)),
    ("qwen2", {"sliding_window": 8}, ()),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (0, 8)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, ()),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, ()),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        (8, 0),
    ),
]


@pytest.mark.parametrize(("family", "changes", "expected"), WINDOWS)
def test_sliding_windows_as_transformers_computes_them(
    tmp_path: Path, family: str, changes: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert spec_of(tmp_path, family, **changes).sliding_windows == expected
    theirs = FAMILIES[family][0].from_pretrained(tmp_path)
    if family == "mistral":
        windows = [theirs.sliding_window or 0] * 2
    else:
        windows = [theirs.sliding_window or 0 if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
    assert (tuple(windows) if any(windows) else ()) == expected


def test_defaults_of_absent_and_null_keys(tmp_path: Path) -> None:
    assert spec_of(tmp_path, num_key_value_heads=None).kv_heads == 4
    assert spec_of(tmp_path, num_key_value_heads=...).kv_heads == 4
    assert spec_of(tmp_path, "mistral", num_attention_heads=16, num_key_value_heads=...).kv_heads == 8
    assert spec_of(tmp_path, "qwen3").head_dim == 128
    assert spec_of(tmp_path, architectures=...).family == "llama"
    assert spec_of(tmp_path, architectures=["Qwen2ForCausalLM"], model_type="qwen2").qkv_bias


def test_eos_of_generation_config_wins_as_in_transformers(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=[5, 6])
    assert read_hf_config(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3, 2]}')
    assert read_hf_config(tmp_path).eos_token_ids == (2, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_hf_config(tmp_path).eos_token_ids == (5, 6)


UNSUPPORTED = [
    ("llama", {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    ("llama", {"architectures": ..., "model_type": "phi3"}, "phi3"),
    ("llama", {"model_type": "mistral"}, "model_type"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"sliding_window": 5}, "sliding_window"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("llama", {"logit_scale": 0}, "logit_scale"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
    ("llama", {"torch_dtype": "float64"}, "float64"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    *(
        ("llama", {"quantization_config": {"quant_method": method}}, method)
        for method in ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8")
    ),
]


@pytest.mark.parametrize(("family", "changes", "named"), UNSUPPORTED)
def test_refuses_by_name_what_it_does_not_compute(
    tmp_path: Path, family: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelUnsupported, match=named) as caught:
        spec_of(tmp_path, family, **changes)
    assert "config.json" in str(caught.value)


INVALID = [
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": ...}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
    ({"vocab_size": 2**31}, "vocab_size"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"hidden_size": 33}, "head_dim"),
    ({"num_key_value_heads": 3}, "kv_heads"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"eos_token_id": [2, -1]}, "eos_token_id"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 5}}, "low_freq_factor"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
]


@pytest.mark.parametrize(("changes", "named"), INVALID)
def test_wrong_values_name_file_and_key(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointInvalid, match=named) as caught:
        spec_of(tmp_path, **changes)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": {"b": 1, "b": 2}}', "\xff", "[" * 100_000]
)
def test_invalid_json_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        read_hf_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *BASE,
    "rope_scaling",
    "rms_norm_eps",
    "layer_types",
    "sliding_window",
    "max_window_layers",
    "dtype",
    "head_dim",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(ARCHITECTURE)), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_hostile_values_give_a_spec_or_a_named_error(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    try:
        spec_of(tmp_path, family, **changes)
    except ManyhandsError as error:
        assert "config.json" in str(error)


def test_edits_survive_a_round_trip_of_transformers(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    edit_json(tmp_path / "config.json", unsloth_version="1", temperature=0.7)
    assert read_hf_config(tmp_path).spec.sliding_windows == (0, 8)


def test_the_number_of_ffn_tiles_may_be_chosen(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_hf_config(tmp_path).spec.ffn_tiles == 5
    assert read_hf_config(tmp_path, ffn_tiles=2).spec.ffn_tiles == 2
    with pytest.raises(ConfigInvalid, match="ffn_tiles"):
        read_hf_config(tmp_path, ffn_tiles=161)
