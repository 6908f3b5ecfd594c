"""Weights and configuration from a Hugging Face folder or hub name, inside or outside zero.Init."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from dpo_scale.data.planning import CostModel
from dpo_scale.errors import UserError
from dpo_scale.model.attention import ATTENTION, choose_kernel, register
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.recipe import ModelSection

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


WITHOUT_GATE = frozenset({
    "apertus", "apertus1p5_text", "arcee", "biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_neox_japanese", "gptj", "jais2", "mpt", "nanochat", "nemotron", "openai-gpt", "opt", "persimmon",
    "phi", "starcoder2", "xglm",
})  # fmt: skip
"""Kinds of models whose feed-forwards have two matrices, up and down; those of others have a gate beside them."""

WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack"]
"""Files of a hub model that only a run needs."""
NEVER_NEEDED = ["*.gguf", "*.onnx", "original/*"]


def resolve_folder(path: str, revision: str | None, setting: str = "model.path", *, weights: bool = True) -> Path:
    """The local folder of a model: the path itself, or the snapshot of a hub model in the hub's own cache.

    Args:
        weights: whether a hub model's weights are fetched too, which may take hours.

    Raises UserError for a name that is neither.
    """
    if os.path.isdir(path):
        return Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if not looks_local:
        try:
            ignored = NEVER_NEEDED if weights else [*NEVER_NEEDED, *WEIGHTS]
            return Path(snapshot_download(path, revision=revision, ignore_patterns=ignored))
        except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise UserError(
                f"{setting}: {path!r} is no folder here, and the hub says: {str(error).splitlines()[0]}"
            ) from error
    raise UserError(f"{setting}: there is no folder {path!r}")


def load_config(folder: Path, *, trust_remote_code: bool, setting: str = "model.path") -> Any:
    """The configuration of a causal language model. Raises UserError if the folder holds none that can be trained."""
    file = folder / "config.json"
    if not file.exists() and (folder / "adapter_config.json").exists():
        raise UserError(f"{setting}: {folder} holds an adapter alone; merge it into its model and save that")
    if not file.exists():
        raise UserError(f"{setting}: {folder} holds no config.json; it is no Hugging Face model folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{setting}: {file} is not valid JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{setting}: {file} holds no JSON object; copy the file again")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # an unknown kind of model, one with code of its own, or what checks of its values raise
        kind = "" if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: "
        raise UserError(f"{setting}: {file}: {kind}{' '.join(str(error).split())}") from error
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{setting}: {folder} is a {config.model_type} model; no causal language model is of that kind")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(f"{setting}: the weights of {folder} are quantized ({method}); training needs unquantized ones")
    return config


def check_vocabulary(largest_token_id: int, config: Any, setting: str) -> None:
    """Raise UserError if the data holds token ids that the model has no embedding for."""
    size = config.get_text_config().vocab_size
    if largest_token_id >= size:
        raise UserError(
            f"{setting}: the tokenizer gives token id {largest_token_id}, but the model embeds only {size} tokens; "
            "use the model's own tokenizer, or resize the embedding and save the model before training"
        )


def stored_elements(folder: Path) -> int | None:
    """Elements of all tensors in a folder's safetensors files, from their headers; None where there are none.

    Raises UserError for a file that is not whole, or may not be read.
    """
    elements = 0
    for path in folder.glob("model*.safetensors"):
        try:
            path.open("rb").close()  # of a file that may not be read, safe_open says that it is not there
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; have it made readable (chmod a+r)") from error
        try:
            with safe_open(path, framework="numpy") as file:
                names = list(file.keys())
                elements += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:
            raise UserError(f"{path}: cut short, or no safetensors file ({error}); copy the file again") from error
    return elements or None


def load_model(folder: Path, settings: ModelSection) -> CompletionLogProbs:
    """The causal language model with its completion log-prob head. Under an active ZeRO-3 plugin it is built sharded.

    Raises UserError if weights are missing from the files.
    """
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        folder,
        dtype=DTYPES[settings.dtype],
        trust_remote_code=settings.trust_remote_code,
        output_loading_info=True,
    )
    try:
        model, info = load(attn_implementation=ATTENTION)
        takes_interface = model._can_set_attn_implementation()
    except (KeyError, ValueError):  # models that look their attention up in a table of their own, as GPT-J does
        takes_interface = False
    if not takes_interface:  # it gets the masks of its own attention; the start-up check says that segments are lost
        model, info = load()
    missing = set(info["missing_keys"]) - set(model.all_tied_weights_keys or ())
    if missing:
        raise UserError(
            f"{folder}: weights are missing for {', '.join(sorted(missing)[:5])} ({len(missing)} in all); "
            "they would start at random"
        )
    if not settings.dropout:
        switch_dropout_off(model)
    model.config.use_cache = False
    return CompletionLogProbs(model)


def register_attention(settings: ModelSection, device: torch.device) -> None:
    """Make the recipe's attention kernel known to transformers; to be called before a model is built."""
    register(choose_kernel(settings.attention, device, DTYPES[settings.dtype]))


def switch_dropout_off(model: nn.Module) -> None:
    """Set every probability of dropout, and the jitter of routers, to zero.

    Models keep them in modules made for it, as numbers in others under many names, and in their configuration.
    """
    for holder in (model.config, *model.modules()):
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)


def checkpoint_activations(model: CompletionLogProbs, *, dropout: bool) -> None:
    """Recompute every decoder layer in the backward pass; only dropout needs the same random numbers again."""
    model.model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": dropout}
    )


def cost_model(config: Any) -> CostModel:
    """Multiply-accumulates of a decoder's forward, from its configuration; of a recurrent one, roughly."""
    text = config.get_text_config()
    setting = partial(_setting, text)
    hidden, layers, heads = setting("hidden_size"), setting("num_hidden_layers"), setting("num_attention_heads")
    head_size = setting("head_dim") or hidden // max(heads, 1)
    kv_heads = setting("num_key_value_heads") or heads
    matrices = 2 if text.model_type in WITHOUT_GATE else 3
    attention = 2 * hidden * head_size * (heads + kv_heads) if heads else 0
    return CostModel(
        per_token=max(1, layers * attention + matrices * hidden * _feed_forward_width(text)),
        per_scored_token=hidden * text.vocab_size,
        per_attended_position=2 * layers * heads * head_size,
    )


def _setting(config: Any, name: str) -> int:
    """A number of the configuration, of a list with one a layer their mean; 0 where there is none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # some layers have another (Gemma 4)
        value = vars(config)[name]
    return int(np.mean(value)) if isinstance(value, list | tuple) else int(value or 0)


def _feed_forward_width(text: Any) -> int:
    """Inner width of the feed-forward parts that a token passes, over all layers; of experts, those it is sent to."""
    setting = partial(_setting, text)
    layers, dense = setting("num_hidden_layers"), setting("intermediate_size") or 4 * setting("hidden_size")
    if not setting("num_experts_per_tok"):
        return layers * dense
    expert = setting("moe_intermediate_size") or dense
    sparse = expert * (setting("num_experts_per_tok") + setting("n_shared_experts"))
    sparse += setting("shared_expert_intermediate_size")
    dense_layers = setting("first_k_dense_replace") or len(getattr(text, "mlp_only_layers", None) or ())
    return (layers - dense_layers) * sparse + dense_layers * dense
