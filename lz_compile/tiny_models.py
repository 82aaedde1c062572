"""Tiny random models of the architectures that the installed transformers knows, and calls of them.

Enters: a model type (``llama``, ``t5``, ``swin``).  Leaves: a float32 model in eval mode with a few layers, and
:class:`Call` objects that run it as users do: a forward pass without cache, and for models that generate a decode step.

A configuration is made small by the names of its fields (:data:`_SIZES`), sub-configurations included; what that rule
gets wrong for one model type stands in :data:`_OVERRIDES`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BATCH, LENGTH, CACHE = 2, 24, 32
# Fewer than a sliding window holds, so that every query sees a key.  A query that sees none gives NaN in float64.
PADDED = 5
_VOCABULARY, _HIDDEN, _HEADS, _HEAD = 128, 64, 4, 16

# Mappings of transformers.models.auto.modeling_auto, the first that knows a model type decides its class.
_MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "emb_dim"), _HIDDEN),
    **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "word_embed_proj_dim", "projection_dim"), _HIDDEN),
    **dict.fromkeys(("kv_channels", "head_dim", "d_kv", "attention_head_dim", "global_head_dim"), _HEAD),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        _HEADS,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), _VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"), 256),
    **dict.fromkeys(("sliding_window", "local_attention", "attention_chunk_size", "window_size"), 8),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_n_experts", "n_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "rotary_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "num_mel_bins": 16,
    "max_source_positions": 40,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "ssm_state_size": 16,
    "lru_width": _HIDDEN,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size_per_layer_input": 16,
}

# Layers in a model whose layers are of several kinds.
_MIXED_LAYERS = 4

# What a rule by name gets wrong, by model type.  None leaves the configuration's own value.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": _VOCABULARY, "pad_token_id": 0, "mask_token_id": 5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "xmod": {"default_language": "en_XX"},
}


class NotBuilt(Exception):
    """No tiny model of this architecture can be made or called here; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """A model type with its model class, such as ``llama`` and ``LlamaForCausalLM``."""

    name: str
    model: str

    def build(self, attention: str) -> Any:
        """The float32 model in eval mode, parameters bfloat16 can hold, seed 0.

        Raises:
            NotBuilt: the configuration or the model cannot be made.
        """
        import transformers

        try:
            cls = getattr(transformers, self.model)
            config = _fitting(tiny_config(self.name), getattr(cls, "config_class", None))
            torch.manual_seed(0)
            model = cls._from_config(config, attn_implementation=attention)
        except Exception as error:
            raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        for parameter in model.parameters():
            parameter.data = parameter.data.float().to(torch.bfloat16).float()
        return model.float().eval() if _has_reduced_buffers(model) else model.eval()


def _fitting(config: Any, wanted: Any) -> Any:
    """The configuration that the model class takes: the whole, or that of one part (text) of it."""
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return next((part for part in parts if isinstance(part, wanted)), config)


def _has_reduced_buffers(model: Any) -> bool:
    return any(b.is_floating_point() and b.dtype != torch.float32 for b in model.buffers())


def architectures() -> list[Architecture]:
    """One for each model class that the auto mappings of the installed transformers name, in their order.

    Where several model types share a class, the one it is named for stands for all.
    """
    from transformers.models.auto import modeling_auto

    found: dict[str, Architecture] = {}
    types: set[str] = set()
    for mapping in _MAPPINGS:
        for name, model in getattr(modeling_auto, mapping).items():
            model = model[0] if isinstance(model, (tuple, list)) else model
            known = found.get(model)
            if name not in types and (known is None or _named_for(model, name) > _named_for(model, known.name)):
                found[model] = Architecture(name, model)
            types.add(name)
    return list(found.values())


def _named_for(model: str, name: str) -> int:
    plain = name.replace("-", "").replace("_", "").lower()
    return len(plain) if model.lower().startswith(plain) else 0


# -- configurations ----------------------------------------------------------------------------------------------------


def tiny_config(name: str) -> Any:
    """The configuration of a model type with small sizes."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else type(AutoConfig.for_model(name))
    return _shrunk(cls(), _OVERRIDES.get(name, {}))


def _shrunk(config: Any, overrides: dict[str, Any]) -> Any:
    """The class of ``config`` again, with small sizes given to its constructor, which derives others from them."""
    settings = shrunk_fields(config)
    for name, value in overrides.items():
        if value is None:
            settings.pop(name, None)
        else:
            settings[name] = value
    for name in getattr(config, "sub_configs", None) or {}:
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            changes = overrides.get(name)
            settings[name] = _shrunk(inner, changes if isinstance(changes, dict) else {})
    return type(config)(**settings)


def shrunk_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that have to change, by name, sub-configurations left out."""
    names = _fields(config)
    settings: dict[str, Any] = {}
    for name in names:
        value = _value(config, name)
        if name in _SIZES and type(value) is int:
            settings[name] = min(value, _SIZES[name]) if name.startswith(("n_group", "topk_group")) else _SIZES[name]
    _fit_heads(config, settings, names)
    if "head_dim" in names and _value(config, "head_dim") is None:
        settings["head_dim"] = _HEAD
    if "qk_rope_head_dim" in settings and "head_dim" in settings:
        settings["head_dim"] = settings["qk_rope_head_dim"]
    _fit_stages(config, settings)
    _fit_layers(config, settings, names)
    _fit_tokens(config, settings)
    return settings


def _fields(config: Any) -> list[str]:
    """Names that the constructor takes, and those it maps to others."""
    known = [n for n in config.to_dict() if n not in (getattr(config, "sub_configs", None) or {})]
    names = dict.fromkeys([*known, *(getattr(config, "attribute_map", None) or {})])
    return [n for n in names if not _is_derived(config, n)]


def _is_derived(config: Any, name: str) -> bool:
    found = getattr(type(config), name, None)
    return isinstance(found, property) and found.fset is None


def _value(config: Any, name: str) -> Any:
    """A field; None too where the configuration has it for each layer apart and refuses to say one."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _fit_heads(config: Any, settings: dict[str, Any], names: list[str]) -> None:
    """Groups of query heads stay groups, multi-query stays multi-query."""
    for name in (
        "num_key_value_heads",
        "num_kv_heads",
        "multi_query_group_num",
        "n_head_kv",
        "swa_num_key_value_heads",
    ):
        value, heads = _value(config, name), _value(config, "num_attention_heads")
        if name in names and value is None:
            settings[name] = _HEADS
        elif name in names and type(value) is int and type(heads) is int:
            settings[name] = 1 if value == 1 else _HEADS if value >= heads else _HEADS // 2


def _fit_stages(config: Any, settings: dict[str, Any]) -> None:
    """Vision models with stages, each with depth and heads of its own, and rotary sections of images."""
    heads, depths = _value(config, "num_heads"), _value(config, "depths")
    if isinstance(heads, (list, tuple)) and isinstance(depths, (list, tuple)) and "embed_dim" in settings:
        settings.pop("hidden_size", None)
        settings |= {"embed_dim": 8 * heads[0], "depths": [min(depth, 2) for depth in depths], "image_size": 64}
        settings.pop("patch_size", None)
    rope = _value(config, "rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        settings["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}


def _fit_layers(config: Any, settings: dict[str, Any], names: list[str]) -> None:
    """Two layers, or enough to hold one of each kind where there are several."""
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_types"):
        kinds = _value(config, name)
        if name not in names or not isinstance(kinds, (list, tuple)) or not kinds:
            continue
        if len(set(map(str, kinds))) > 1:
            needed = max(list(map(str, kinds)).index(kind) for kind in set(map(str, kinds))) + 1
            layers = max(_MIXED_LAYERS, needed, settings.get("num_hidden_layers", 0))
            for field in ("num_hidden_layers", "n_layer", "num_layers"):
                if field in settings:
                    settings[field] = min(layers, len(kinds))
    layers = settings.get("num_hidden_layers", settings.get("n_layer", settings.get("num_layers")))
    original = _value(config, "num_hidden_layers")
    if layers is None or type(original) is not int:
        return
    for name in names:
        value = _value(config, name)
        if isinstance(value, (list, tuple)) and len(value) == original and original != layers:
            settings[name] = list(value[:layers])


def _fit_tokens(config: Any, settings: dict[str, Any]) -> None:
    """Special tokens must be words of the vocabulary; no two common ones may be equal."""
    common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    special = 90
    for name, value in config.to_dict().items():
        if name in common and (type(value) is int or isinstance(value, list) or name == "pad_token_id"):
            settings[name] = common[name]
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int:
            special += 1
            settings[name] = special


# -- calls -------------------------------------------------------------------------------------------------------------

# Runs the model that it is given (a compiled one, say) once and gives its output tensors.
Run = Callable[[Any], list[torch.Tensor]]


@dataclass(frozen=True)
class Call:
    """One way to call a model.

    ``prepare(model, seed)`` makes the inputs, and for a decode step the filled cache, with the model itself; what it
    gives may be run once.  ``valid``, bool ``[BATCH, LENGTH]``, marks rows of outputs that are no padding, None when
    all count.
    """

    name: str
    prepare: Callable[[Any, int], Run]
    valid: torch.Tensor | None = None


def calls(model: Any) -> list[Call]:
    """The calls of a model.

    Raises:
        NotBuilt: its inputs are of a kind that this module does not make.
    """
    made = _inputs(model, 0)
    valid = made.get("attention_mask") if "input_ids" in made and not model.config.is_encoder_decoder else None
    found = [Call("forward", _forward, valid.bool() if valid is not None else None)]
    if model.can_generate() and hasattr(model, "prepare_inputs_for_generation"):
        if model.config.is_encoder_decoder:
            found.append(Call("decode", _decode_after_encoder))
        elif "input_ids" in made:
            found.append(Call("decode", _decode))
    return found


def _forward(model: Any, seed: int) -> Run:
    inputs = _inputs(model, seed)
    if _takes(model, "use_cache"):
        inputs["use_cache"] = False
    return lambda compiled: _outputs(compiled(**inputs))


def _decode(model: Any, seed: int) -> Run:
    ids = _tokens(seed, LENGTH)
    cache = _cache(model, model.config)
    past = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    cache = getattr(past, "past_key_values", None) or cache
    return lambda compiled: _outputs(compiled(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True))


def _decode_after_encoder(model: Any, seed: int) -> Run:
    from transformers import DynamicCache, EncoderDecoderCache

    inputs = _inputs(model, seed)
    ids = inputs.pop("decoder_input_ids")
    config = model.config.get_text_config(decoder=True)
    cache = EncoderDecoderCache(_cache(model, config), DynamicCache(config=config))
    encoded = {name: inputs.pop(name) for name in list(inputs) if name != "attention_mask"}
    encoder = model.get_encoder()
    if _takes(encoder, "attention_mask") and "attention_mask" in inputs:
        encoded["attention_mask"] = inputs["attention_mask"]
    inputs["encoder_outputs"] = encoder(**encoded)
    past = model(decoder_input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, **inputs)
    inputs["past_key_values"] = past.past_key_values
    return lambda compiled: _outputs(compiled(decoder_input_ids=ids[:, -1:], use_cache=True, **inputs))


def _cache(model: Any, config: Any) -> Any:
    """A static cache where the class supports it, else one that grows."""
    from transformers import DynamicCache, StaticCache

    if getattr(model, "_can_compile_fullgraph", False):
        return StaticCache(config=config, max_cache_len=CACHE)
    return DynamicCache(config=config)


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _tokens(seed: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (BATCH, length), generator=generator)


def _normal(model: Any, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(model.dtype)


def _inputs(model: Any, seed: int) -> dict[str, Any]:
    """Arguments of one call: batch of 2, the first row shorter than the second where there is a mask."""
    config, main = model.config, model.main_input_name
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    wants_text = main == "input_ids" or (getattr(config, "text_config", None) is not None and "input_ids" in names)
    if main == "pixel_values" or (
        not model.can_generate() and wants_text and _vision(config) and "pixel_values" in names
    ):
        inputs["pixel_values"] = _pixels(model, seed)
    if main == "pixel_values_videos":
        vision = _vision(config) or config
        frames, size = getattr(vision, "num_frames", None) or vision.frames_per_clip, _pair(vision)
        inputs[main] = _normal(model, seed, BATCH, frames, getattr(vision, "num_channels", 3), *size)
    if main == "input_features":
        inputs["input_features"] = _features(model, seed)
    if main == "input_values":
        inputs["input_values"] = _waves(model, seed)
    if wants_text:
        inputs["input_ids"] = _tokens(seed, LENGTH)
        if "attention_mask" in names:
            mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
            mask[0, -PADDED:] = 0
            inputs["attention_mask"] = mask
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = _tokens(seed + 10, LENGTH // 2)
    if not inputs:
        raise NotBuilt(f"takes {main}, which is not made here")
    return inputs


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None)


def _pair(config: Any) -> tuple[int, int]:
    size = config.image_size
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)  # type: ignore[return-value]


def _pixels(model: Any, seed: int) -> torch.Tensor:
    config = _vision(model.config) or model.config
    size = _pair(config) if hasattr(config, "image_size") else (64, 64)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    if getattr(config, "num_frames", None):
        return _normal(model, seed, BATCH, config.num_frames, channels, *size)
    return _normal(model, seed, BATCH, channels, *size)


def _features(model: Any, seed: int) -> torch.Tensor:
    config = (
        getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", None) or model.config
    )
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    positions = getattr(config, "max_source_positions", None)
    if positions and model.config.model_type in ("whisper", "qwen2_audio", "voxtral"):
        return _normal(model, seed, BATCH, bins, 2 * positions)
    return _normal(model, seed, BATCH, 64, getattr(config, "feature_projection_input_dim", bins))


def _waves(model: Any, seed: int) -> torch.Tensor:
    if hasattr(model.config, "max_length") and hasattr(model.config, "num_mel_bins"):  # spectrograms
        return _normal(model, seed, BATCH, model.config.max_length, model.config.num_mel_bins)
    return _normal(model, seed, BATCH, 2000)


def _outputs(result: Any) -> list[torch.Tensor]:
    """The floating tensors of a model's answer that are not its cache."""
    if isinstance(result, torch.Tensor):
        return [result]
    for name in ("logits", "last_hidden_state", "logits_per_image", "prediction_logits", "sample"):
        value = getattr(result, name, None)
        if isinstance(value, torch.Tensor):
            return [value]
    values = result.to_tuple() if hasattr(result, "to_tuple") else tuple(result)
    found = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if not found:
        raise NotBuilt(f"gives a {type(result).__name__} without tensors")
    return found[:1]


def double(model: Any) -> Any:
    """A copy in float64, whose experts run one by one: the grouped product knows no float64."""
    result = copy.deepcopy(model).double()
    if hasattr(result, "set_experts_implementation"):
        result.set_experts_implementation("eager")
    return result
