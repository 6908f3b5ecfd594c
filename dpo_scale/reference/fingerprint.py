"""What determines a reference log-prob, from the contents of the model's files.

In the key: the bytes of the weight files, the settings in config.json that shape the forward pass,
the Python code that comes with the model where it is trusted, the compute precision and the version
of the scoring path.

Not in the key: the model's name and folder, its tokenizer (each row's key holds the token ids that
it produced), attention kernels and layouts (equal up to rounding), and everything about the run:
ranks, batch, loss, learning rate. The same weights saved again, in other shards or as another file
type, have another key: scoring twice costs time, while a stale log-prob ruins a run unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_scale.errors import UserError
from dpo_scale.files import sha256_of_file

SCORING_VERSION = 1
"""Raise it when the scoring path changes a log-prob beyond rounding: all rows are scored again."""

_IRRELEVANT_CONFIG_KEYS = frozenset(
    """
    _name_or_path _commit_hash transformers_version architectures dtype torch_dtype
    use_cache return_dict output_attentions output_hidden_states output_scores
    id2label label2id problem_type
    _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    bos_token_id eos_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens
    begin_suppress_tokens remove_invalid_values exponential_decay_length_penalty
    return_dict_in_generate task_specific_params
    """.split()  # noqa: SIM905 - forty-five lines otherwise
)
"""Who saved the file, the form of the output, attention kernels, and generation, which scoring
never does.

Everything else counts, known or not: an unneeded pass is the smaller harm.
"""


@dataclass(frozen=True, slots=True)
class ReferenceFingerprint:
    """What was hashed. Two models with equal keys give equal log-probs, up to rounding."""

    scoring_version: int
    """SCORING_VERSION of the code."""
    dtype: str
    """Compute precision: bfloat16, float16 or float32."""
    weights: Mapping[str, str]
    """Weight file name -> SHA-256."""
    config: Mapping[str, Any]
    """The settings in config.json that shape the forward pass."""
    code: Mapping[str, str] = field(default_factory=dict)
    """File name of trusted Python code -> SHA-256; empty without trust_remote_code."""
    source: str = field(default="", compare=False)
    """The model's name or folder when it was hashed. For people; not in the key."""

    @property
    def key(self) -> str:
        """SHA-256 of all that shapes a log-prob, in hex."""
        text = json.dumps(self._hashed(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A value for json.dump, readable by people; from_json is its inverse."""
        return {"key": self.key, "source": self.source, **self._hashed()}

    @classmethod
    def from_json(cls, value: Any) -> ReferenceFingerprint:
        """Raises UserError for what to_json did not write, or what was edited since."""
        try:
            fingerprint = cls(
                scoring_version=value["scoring_version"],
                dtype=value["dtype"],
                weights=dict(value["weights"]),
                config=dict(value["config"]),
                code=dict(value["code"]),
                source=value["source"],
            )
            key = value["key"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a reference fingerprint: {error!r}") from error
        if fingerprint.key != key:
            raise UserError(f"a reference fingerprint that was edited: key {key!r} does not fit it")
        return fingerprint

    def _hashed(self) -> dict[str, Any]:
        return {
            "scoring_version": self.scoring_version,
            "dtype": self.dtype,
            "weights": dict(self.weights),
            "config": dict(self.config),
            "code": dict(self.code),
        }


def fingerprint_model(
    folder: Path,
    dtype: str,
    weight_digests: Mapping[str, str],
    *,
    trust_remote_code: bool = False,
) -> ReferenceFingerprint:
    """Fingerprint of a model folder whose weight files are hashed already (file name -> SHA-256).

    Code that config.json names in another hub repository is known by that name only: pin it with a
    revision.
    """
    expected = {path.name for path in weight_files(folder)}
    assert set(weight_digests) == expected, f"digests for {set(weight_digests)}, files {expected}"
    code = {}
    if trust_remote_code and "auto_map" in _read_json(folder / "config.json"):
        code = {path.name: sha256_of_file(path) for path in sorted(folder.glob("*.py"))}
    return ReferenceFingerprint(
        scoring_version=SCORING_VERSION,
        dtype=dtype.removeprefix("torch."),
        weights=dict(sorted(weight_digests.items())),
        config=_settings(folder, has_code=bool(code)),
        code=code,
        source=_source_name(folder),
    )


def settings_digest(folder: Path) -> str:
    """SHA-256 of what a model's config.json says that can change a log-prob, in hex."""
    settings = _without_irrelevant_keys(_read_json(folder / "config.json"))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that from_pretrained reads weights from, by name; safetensors come first.

    Raises UserError where they are not all there, or are an adapter's.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter; merge it into its base model and save that")
    if named := _read_json(folder / "config.json").get("transformers_weights"):
        return _files_of_name(folder, str(named))
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.exists():
            return [single]
        if index.exists():
            return _files_of_index(index)
    raise UserError(
        f"{folder}: no weights; expected model.safetensors or model.safetensors.index.json "
        "(or pytorch_model.bin or pytorch_model.bin.index.json)"
    )


def read_fingerprint(folder: Path) -> ReferenceFingerprint | None:
    """Which reference a folder says that it is for; None where its reference.json is missing or was damaged."""
    try:
        return ReferenceFingerprint.from_json(json.loads((folder / "reference.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):  # UserError is a ValueError
        return None


def readable_fingerprint(folder: Path) -> ReferenceFingerprint | None:
    """Which reference a folder says that it is for; None where that is missing, damaged, or may not be read."""
    try:
        return read_fingerprint(folder)
    except PermissionError:
        return None


def explain_difference(wanted: ReferenceFingerprint, stored: ReferenceFingerprint) -> list[str]:
    """Why a store does not serve, a line for each difference; empty if the keys are equal."""
    lines = []
    if wanted.scoring_version != stored.scoring_version:
        lines.append(f"scoring version {wanted.scoring_version}, store has {stored.scoring_version}")
    if wanted.dtype != stored.dtype:
        lines.append(f"precision {wanted.dtype}, store has {stored.dtype}")
    if wanted.weights.keys() != stored.weights.keys():
        lines.append(f"weight files {_names(wanted.weights)}, store has {_names(stored.weights)}")
    elif changed := _changed(wanted.weights, stored.weights):
        lines.append(f"weights differ in {_names(changed)}")
    for key in _changed(wanted.config, stored.config):
        ours, theirs = (json.dumps(c[key]) if key in c else "unset" for c in (wanted.config, stored.config))
        lines.append(f"config.json {key} {_short(ours)}, store has {_short(theirs)}")
    if changed := _changed(wanted.code, stored.code):
        lines.append(f"model code differs in {_names(changed)}")
    return lines


def _files_of_name(folder: Path, name: str) -> list[Path]:
    """The files behind `transformers_weights` of config.json, which goes before all others."""
    path = folder / name
    if path.parent != folder or not path.is_file() or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights is {name}, which is no safetensors file of this folder; "
            "fetch the model again, or remove the entry"
        )
    return _files_of_index(path) if name.endswith(".json") else [path]


def _files_of_index(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise UserError(f"{index}: no weight_map; the download or copy is damaged, fetch it again")
    files = sorted({index.parent / str(name) for name in weight_map.values()})
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise UserError(f"{index}: names {_names(missing)}, which is not there; fetch the model again")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; a model folder has one") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch the model again")
    return value


def _without_irrelevant_keys(config: Any) -> Any:
    """The config, and those nested in it (text_config), without what cannot change a log-prob."""
    if not isinstance(config, dict):
        return config
    return {key: _without_irrelevant_keys(value) for key, value in config.items() if key not in _IRRELEVANT_CONFIG_KEYS}


def _settings(folder: Path, *, has_code: bool) -> dict[str, Any]:
    """The settings in a model's config.json that shape the forward pass."""
    config = _read_json(folder / "config.json")
    if not has_code:
        config.pop("auto_map", None)  # nobody follows it
    return dict(_without_irrelevant_keys(config))


def _source_name(folder: Path) -> str:
    """`org/name@revision` for a folder in the hub cache, else the path."""
    folder = folder.absolute()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name[:12]}"
    return str(folder)


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names that only one of two mappings has, or that they map to different values."""
    absent = object()
    names = sorted(ours.keys() | theirs.keys())
    return [name for name in names if ours.get(name, absent) != theirs.get(name, absent)]


def _names(names: Mapping[str, Any] | list[str]) -> str:
    """A few names in full, many as the first two and a count."""
    listed = sorted(names)
    if len(listed) <= 3:
        return ", ".join(listed)
    return f"{', '.join(listed[:2])} and {len(listed) - 2} more"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
