"""Reads the config.json of a Hugging Face folder into a `ModelSpec`, or says which key can't be computed here.

Knows nothing of weights or tokenizers. A key that may change the arithmetic and isn't known is refused by name: a
wrong answer that looks right is worse than none. Defaults of absent keys are those of transformers 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.hf_keys import FIXED_KEYS, HARMLESS_KEYS, SHARED_KEYS
from coordinator.json_file import MAX_INT, JsonFields, read_json_object
from protocol.errors import CheckpointInvalid, ConfigInvalid, ModelUnsupported
from protocol.specs import (
    ActivationFormat,
    ModelSpec,
    RopeKind,
    RopeSpec,
    WeightFormat,
    default_ffn_tiles,
)

DEFAULT_ROPE_THETA = 10_000.0
DEFAULT_SLIDING_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28
QUANTISED = frozenset({WeightFormat.INT8, WeightFormat.INT4})
CHECKPOINT_DTYPES = ("float32", "bfloat16", "float16")
NAME_CHARS = 64
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What an architecture's code does whatever its config says, and the defaults of its config class."""

    model_type: str
    own_keys: frozenset[str]
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias_always: bool = False
    qk_norm: bool = False


_QWEN_WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
FAMILIES = {
    "LlamaForCausalLM": _Family(model_type="llama", own_keys=frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": _Family(model_type="mistral", own_keys=frozenset({"sliding_window"}), kv_heads=8),
    "Qwen2ForCausalLM": _Family(model_type="qwen2", own_keys=_QWEN_WINDOW_KEYS, kv_heads=32, qkv_bias_always=True),
    "Qwen3ForCausalLM": _Family(
        model_type="qwen3",
        own_keys=_QWEN_WINDOW_KEYS | {"attention_bias"},
        kv_heads=32,
        head_dim=128,
        qk_norm=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HfConfig:
    """What a model folder says of itself.

    `eos_token_ids` come from generation_config.json where it names any, else from config.json, as in transformers.
    `dtype` is the checkpoint's own: float32, bfloat16 or float16 (float32 when config.json doesn't say).
    """

    spec: ModelSpec
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str


def read_hf_config(
    folder: Path,
    *,
    weights: WeightFormat | None = None,
    activations: ActivationFormat | None = None,
    name: str = "",
    ffn_tiles: int | None = None,
) -> HfConfig:
    """Read `folder`/config.json (and generation_config.json where there is one).

    Absent formats follow the checkpoint: its own dtype (float32 for float16, which bfloat16 can't hold), and
    activations as the weights are, or as the checkpoint is for int8 and int4. `name` is by default the folder's.
    Raises CheckpointInvalid for a missing file or a wrong value, ModelUnsupported for arithmetic we don't do and for
    shapes that int4 can't group, ConfigInvalid for more `ffn_tiles` than columns.
    """
    path = folder / "config.json"
    config = JsonFields(read_json_object(path), str(path))
    architecture, family = _family_of(config)
    _refuse_unknown_keys(config, family)
    dtype = _dtype_of(config)
    own = WeightFormat.BFLOAT16 if dtype == "bfloat16" else WeightFormat.FLOAT32
    weights = weights or own
    activations = activations or ActivationFormat((own if weights in QUANTISED else weights).value)
    name = (name or folder.resolve().name or architecture)[:NAME_CHARS]
    spec = _spec(config, family, name, own, activations)  # first in a format that takes any shape
    try:
        spec = replace(spec, weights=weights)
    except ValueError as error:
        remedy = "use --dtype int8, which takes any shape"
        raise ModelUnsupported(f"{config.where}: {error}", remedy=remedy) from error
    if ffn_tiles is not None:
        try:
            spec = replace(spec, ffn_tiles=ffn_tiles)
        except ValueError as error:
            raise ConfigInvalid(f"{path}: {error}", remedy="ask for fewer FFN tiles") from error
    bos_token_ids = config.token_ids("bos_token_id")
    return HfConfig(
        spec=spec,
        eos_token_ids=_generation_eos(folder) or config.token_ids("eos_token_id"),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        dtype=dtype,
    )


def _spec(
    config: JsonFields, family: _Family, name: str, weights: WeightFormat, activations: ActivationFormat
) -> ModelSpec:
    heads, hidden = config.positive("num_attention_heads"), config.positive("hidden_size")
    head_dim = family.head_dim or (hidden // heads if hidden % heads == 0 else None)
    layers, intermediate = config.positive("num_hidden_layers"), config.positive("intermediate_size")
    if layers > MAX_LAYERS:  # before a list of that length is made
        raise config.invalid("num_hidden_layers", f"at most {MAX_LAYERS}")
    attention_bias = config.flag("attention_bias")
    try:
        return ModelSpec(
            name=name,
            family=family.model_type,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=_kv_heads(config, family, heads),
            head_dim=config.positive("head_dim", head_dim),
            intermediate=intermediate,
            vocab=config.positive("vocab_size"),
            max_positions=config.positive("max_position_embeddings"),
            norm_eps=config.number("rms_norm_eps"),
            rope=_rope(config),
            ffn_tiles=default_ffn_tiles(intermediate),
            weights=weights,
            activations=activations,
            qkv_bias=attention_bias or family.qkv_bias_always,
            o_bias=attention_bias,
            mlp_bias=config.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            tied_embeddings=config.flag("tie_word_embeddings"),
            sliding_windows=_sliding_windows(config, family, layers),
        )
    except ValueError as error:
        raise CheckpointInvalid(f"{config.where}: {error}") from error


def _family_of(config: JsonFields) -> tuple[str, _Family]:
    known = ", ".join(FAMILIES)
    by_type = {family.model_type: architecture for architecture, family in FAMILIES.items()}
    architectures = config.values.get("architectures")
    if architectures is None:
        architectures = [by_type.get(config.text("model_type", ""), config.text("model_type", "none named"))]
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise config.invalid("architectures", "a list of names")
    family = FAMILIES.get(architectures[0])
    if family is None:
        raise ModelUnsupported(
            f"{config.where}: architecture {architectures[0]!r:.80} is not supported",
            remedy=f"choose a model of one of these architectures: {known}",
        )
    if config.text("model_type", family.model_type) != family.model_type:
        raise config.unsupported("model_type", f"but its architecture is {architectures[0]}")
    return architectures[0], family


def _refuse_unknown_keys(config: JsonFields, family: _Family) -> None:
    """Raise ModelUnsupported at the first key that may change the arithmetic and that nobody here reads."""
    quantization = config.values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelUnsupported(
            f"{config.where} has 'quantization_config' ({method!r:.80}): quantised checkpoints are not supported",
            remedy="use the original float checkpoint; manyhands quantises by itself",
        )
    for key, value in config.values.items():
        if key in FIXED_KEYS:
            if value is not None and value != FIXED_KEYS[key]:
                raise config.unsupported(key, f"manyhands computes only {FIXED_KEYS[key]!r}")
        elif key in SHARED_KEYS or key in HARMLESS_KEYS or key in family.own_keys:
            continue
        elif value is not None and value is not False and value not in ("", [], {}):
            raise config.unsupported(key, f"which manyhands doesn't know for {family.model_type}")


def _dtype_of(config: JsonFields) -> str:
    dtype = config.text("dtype", config.text("torch_dtype", "float32")).removeprefix("torch.")
    if dtype not in CHECKPOINT_DTYPES:
        raise ModelUnsupported(f"{config.where}: dtype {dtype!r:.80} is none of {', '.join(CHECKPOINT_DTYPES)}")
    return dtype


def _kv_heads(config: JsonFields, family: _Family, heads: int) -> int:
    if "num_key_value_heads" in config.values:
        return config.positive("num_key_value_heads", heads)  # null: as many as heads
    return family.kv_heads or heads


def _rope(config: JsonFields) -> RopeSpec:
    """Both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5 (rope_scaling wins)."""
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    values = config.values.get(key) or {}
    if not isinstance(values, dict):
        raise config.invalid(key, "an object")
    rope = JsonFields(values, f"{config.where}, {key}")
    kind_name = rope.text("rope_type", rope.text("type", RopeKind.DEFAULT))
    if kind_name not in RopeKind.__members__.values():
        kinds = ", ".join(RopeKind)
        raise ModelUnsupported(f"{rope.where}: rope type {kind_name!r:.80} is not supported (known: {kinds})")
    for name, value in values.items():
        if name not in _ROPE_KEYS and value is not None and not (name == "partial_rotary_factor" and value == 1):
            raise rope.unsupported(name, "which manyhands doesn't know")
    kind = RopeKind(kind_name)
    theta = rope.number("rope_theta", config.number("rope_theta", DEFAULT_ROPE_THETA))
    if kind is RopeKind.DEFAULT:
        return RopeSpec(theta=theta)
    if kind is RopeKind.LINEAR:
        return RopeSpec(theta=theta, kind=kind, factor=rope.number("factor"))
    positions = rope.positive("original_max_position_embeddings", config.positive("max_position_embeddings"))
    try:
        return RopeSpec(
            theta=theta,
            kind=kind,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_positions=config.positive("original_max_position_embeddings", positions),
        )
    except ValueError as error:
        raise CheckpointInvalid(f"{rope.where}: {error}") from error


_ROPE_KEYS = frozenset(
    {
        "rope_theta",
        "rope_type",
        "type",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }
)


def _sliding_windows(config: JsonFields, family: _Family, layers: int) -> tuple[int, ...]:
    """Positions each layer looks back, itself included (key > query - window); 0 or no entry at all: every one."""
    window, first = 0, 0
    if family.own_keys >= _QWEN_WINDOW_KEYS:
        first = config.values.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
        if type(first) is not int or not 0 <= first <= MAX_INT:
            raise config.invalid("max_window_layers", "a whole number from 0 on")
        if config.flag("use_sliding_window"):
            window = _window(config)
    elif "sliding_window" in family.own_keys:
        window = _window(config)
    kinds = _layer_types(config, layers)
    if kinds is None:
        kinds = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and not window:
        raise config.invalid("layer_types", "no sliding layer, as no sliding window is set")
    if family.model_type == "mistral" and window and not all(sliding):
        raise config.unsupported("layer_types", "but every Mistral layer slides")
    return tuple(window if slides else 0 for slides in sliding) if any(sliding) else ()


def _window(config: JsonFields) -> int:
    """The window of config.json: null is none, absent is the default of transformers."""
    if config.values.get("sliding_window", DEFAULT_SLIDING_WINDOW) is None:
        return 0
    return config.positive("sliding_window", DEFAULT_SLIDING_WINDOW)


def _layer_types(config: JsonFields, layers: int) -> list[str] | None:
    kinds = config.values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise config.invalid("layer_types", f"a list of {layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelUnsupported(f"{config.where} has 'layer_types' with {kind!r:.80}, which manyhands doesn't know")
    return kinds


def _generation_eos(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    return JsonFields(read_json_object(path), str(path)).token_ids("eos_token_id")
