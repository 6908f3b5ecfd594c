"""Every setting of a run, typed and closed. Imports no torch, so that mistakes are reported in a second.

A recipe is one YAML file plus `section.field=value` overrides. Unknown keys, repeated keys and wrong types are
errors, all reported together. Each number has one owner: what stands here stands in no other file (the
DeepSpeed JSON owns stage, buckets and the policy's offload; the launcher owns ranks and nodes).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpo_scale.errors import RecipeError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Location = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or a name that may stand in its place; a `~` at its start is the home folder."""


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    path: Location
    """Folder or hub name of the causal language model that training starts from."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: Location | None = None
    """Folder or hub name of the tokenizer; null means the model's own."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of forward and backward. Master weights, optimizer state and accumulated gradients are fp32."""
    attention: Literal["auto", "varlen", "flash_attn", "flex", "sdpa"] = "auto"
    """Kernel behind the shared and packed layouts; auto takes the first that the machine has."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more compute."""
    dropout: bool = False
    """Keep the model's own dropout. DPO compares two models on the same text, so the default is off."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class ReferenceSection(Section):
    path: Location | None = None
    """Folder or hub name of the frozen reference; null means the policy's starting weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub reference."""
    schedule: Literal["upfront", "per_batch"] = "upfront"
    """upfront: score everything, release the reference, then train. per_batch: score each step's missing rows."""
    offload: Literal["none", "cpu", "nvme"] = "cpu"
    """Where the reference's shards rest between forwards (ds_configs/reference_*.json)."""
    nvme_path: Location | None = None
    """Node-local folder for offload: nvme."""
    cache_dir: Location | None = None
    """Store of reference log-probs, shared by runs; null means $XDG_CACHE_HOME/dpo_scale/reference."""
    rank_tokens: PositiveInt | None = None
    """Tokens in one scoring micro-batch on one rank; null means four times batch.rank_tokens."""

    @model_validator(mode="after")
    def _settings_belong_together(self) -> ReferenceSection:
        if self.offload == "nvme" and not self.nvme_path:
            raise ValueError("offload: nvme needs reference.nvme_path, a node-local folder")
        if self.revision and not self.path:
            raise ValueError("revision belongs to reference.path, which is not set; model.revision is the policy's")
        return self


class DataSource(Section):
    path: Location
    """File, folder, glob or hub dataset (name:split)."""
    columns: dict[str, str] | None = None
    """Field name that the reader expects -> column name in this source. An empty name hides a field of the source;
    completions.text, completions.score and completions.rank name keys inside of each completion."""
    rows: PositiveInt | None = None
    """Take this many rows (all, if there are fewer), drawn with run.seed and the same ones in every epoch; held-out
    ones are the same whatever run.seed is."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """How often an epoch takes each row: 2 takes all of them twice, 0.5 about half of them, drawn as for `rows`, 1.5
    all of them once and about half once more."""

    @model_validator(mode="after")
    def _one_amount(self) -> DataSource:
        if self.rows is not None and self.weight is not None:
            raise ValueError("rows and weight both say how much of a source is taken; keep one")
        return self

    @property
    def is_drawn_from(self) -> bool:
        """Whether the seed decides which rows are taken."""
        return self.rows is not None or (self.weight is not None and self.weight % 1 != 0)


class DataSection(Section):
    train: list[DataSource] = Field(min_length=1)
    """Sources of training pairs; a plain string stands for {path: ...}."""
    evaluate: list[DataSource] = []
    """Sources of held-out pairs."""
    max_length: PositiveInt = 2048
    """Longest prompt plus completion, in tokens."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt, in tokens; null: no limit but max_length."""
    max_completion_length: PositiveInt | None = None
    """Longest completion, in tokens; null: no limit but max_length."""
    truncation: Literal["drop", "keep_start_of_prompt", "keep_end_of_prompt", "keep_start"] = "drop"
    """What happens to a pair over a limit: dropped, its prompt cut at one end, or its completions cut at the end; what
    that cut cannot mend is dropped."""
    chat_template: Location | None = None
    """A file with a Jinja template, or the name of one of several that the tokenizer has; null means its own."""
    completion_pairs: Literal["best_against_worst", "best_against_random", "all_pairs"] = "best_against_worst"
    """Pairs of ranked or scored completions: the best and the worst; the best and a random other, drawn by the row's
    content (as UltraFeedback was binarized); or every two."""
    completion_margin: Annotated[float, Field(ge=0.0)] = 0.0
    """Two completions make a pair only if their scores (or ranks) differ by more than this."""
    on_bad_row: Literal["error", "skip"] = "error"
    """For rows that cannot be read: stop with their place and reason, or count and skip."""
    on_no_preference: Literal["error", "skip"] = "skip"
    """For pairs that carry no preference (equal or empty completions): stop, or count and skip."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenize; 0 means one for each core this job may use."""
    cache_dir: Location | None = None
    """Store of tokenized data; null means $XDG_CACHE_HOME/dpo_scale/tokens."""

    @field_validator("train", "evaluate", mode="before")
    @classmethod
    def _strings_are_paths(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value


class BatchSection(Section):
    global_pairs: PositiveInt
    """Pairs in one optimizer step, over all ranks."""
    rank_tokens: PositiveInt = 16384
    """Tokens in one training micro-batch on one rank; the number of micro-batches follows from it."""
    layout: Literal["auto", "shared", "packed", "padded"] = "auto"
    """How pairs become rows: prompt shared by both completions, packed end to end, or padded. auto: shared, else
    packed, else padded, by the start-up check."""


class LossSection(Section):
    type: Literal["sigmoid"] = "sigmoid"
    """The preference loss."""
    beta: Annotated[float, Field(gt=0.0)]
    """Strength of the pull to the reference. 0.1 is usual for sums, 2 to 10 for means; there is no default."""
    reduction: Literal["mean", "sum"] = "mean"
    """How a sequence's token log-probs become one number."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of pairs whose preference is the wrong way round (cDPO)."""

    @property
    def doubt(self) -> str:
        """What to say of a beta that is usual for the other reduction; empty for others."""
        if self.beta >= 1 if self.reduction == "mean" else self.beta <= 1:
            return ""
        return (
            f"loss.beta is {self.beta:g}: 0.1 is usual for sums, 2 to 10 for means; loss.reduction is {self.reduction}"
        )


class OptimSection(Section):
    learning_rate: Annotated[float, Field(ge=0.0)] = 5e-7
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """From the peak to zero over the rest of the run, after the warm-up; constant stays at the peak."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises from zero to the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay, applied to matrices only (norms and biases are spared)."""
    betas: Annotated[tuple[DecayRate, DecayRate], Field(strict=False)] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's denominator offset."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Clip the global gradient norm to this; 0 clips nothing."""


class EvaluateSection(Section):
    every_steps: PositiveInt | None = None
    """Steps between held-out passes; null: none between start (at_start) and end."""
    at_start: bool = True
    """Evaluate before the first step."""


class CheckpointSection(Section):
    every_steps: PositiveInt | None = None
    """Steps between checkpoints, beside every_minutes; null: none by steps. A stop and the end always leave one."""
    every_minutes: Annotated[float, Field(gt=0.0)] | None = 30.0
    """Minutes between checkpoints; null: none by the clock."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Keep for good the checkpoints whose step is a multiple of this."""


class TrackSection(Section):
    every_steps: PositiveInt = 10
    """Steps between two logged lines."""
    to: list[str] = ["jsonl"]
    """jsonl (always on), tensorboard, wandb and the other trackers that Accelerate offers; a plain string is one."""

    @field_validator("to", mode="before")
    @classmethod
    def _string_is_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class RunSection(Section):
    output_dir: Location
    """Folder of the run."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the order of pairs and of everything else that is drawn."""
    epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps even if epochs remain; pairs that no step reaches are not scored."""
    resume: Location = "auto"
    """auto: go on from the newest valid checkpoint; never: start anew at every start, which is not for jobs that
    queue themselves again; or the path of a checkpoint."""
    stop_after: Annotated[float, Field(gt=0.0)] | None = None
    """Commit a checkpoint and stop at about this many minutes of wall-clock time after the start: a step that would end
    later is not begun. Leave room for the checkpoint."""
    stall_after: Annotated[float, Field(gt=0.0)] | None = 30.0
    """Take a rank for stalled after this many minutes without progress in scoring, training or evaluation: every
    rank's stack is shown, and the run ends. null: never."""


class Recipe(Section):
    """All sections of a run."""

    model: ModelSection
    reference: ReferenceSection = ReferenceSection()
    data: DataSection
    batch: BatchSection
    loss: LossSection
    optim: OptimSection = OptimSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()
    run: RunSection

    @property
    def reference_path(self) -> str:
        """Folder or hub name of the reference."""
        return self.reference.path or self.model.path

    @property
    def reference_revision(self) -> str | None:
        """Revision of the reference."""
        return self.reference.revision if self.reference.path else self.model.revision

    @property
    def scoring_rank_tokens(self) -> int:
        """Tokens in one scoring micro-batch on one rank."""
        return self.reference.rank_tokens or 4 * self.batch.rank_tokens


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `section.field=value` overrides on top.

    Raises RecipeError, listing every mistake at once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give the path of a recipe file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8; save it in that encoding") from error
    try:
        document = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model, data, batch, ...)")
    sections = {name: {} if value is None else value for name, value in document.items()}
    mistakes = _apply_overrides(sections, overrides)
    try:
        recipe = Recipe.model_validate(sections)
    except ValidationError as error:
        mistakes += [_explain(item) for item in error.errors()]
    if mistakes:
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
        raise RecipeError(f"{path}: {count}\n" + "\n".join(f"  {line}" for line in mistakes))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def reference_cache_dir(recipe: Recipe | None = None) -> Path:
    """Where the stores of reference log-probs are, of a recipe or of those that say nothing else."""
    return Path((recipe and recipe.reference.cache_dir) or cache_root() / "reference")


def tokens_cache_dir(data: DataSection | None = None) -> Path:
    """Where the stores of tokenized data are, likewise."""
    return Path((data and data.cache_dir) or cache_root() / "tokens")


def cache_root() -> Path:
    """Where caches live unless the recipe says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_scale"


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads `5e-7` as a number (YAML 1.1 makes it a string)."""


def _mapping_without_repeats(loader: _RecipeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            line = node.value[index][0].start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: {key!r} stands here for the second time; keep one")
    return loader.construct_mapping(node, deep=True)


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
_RecipeLoader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply_overrides(sections: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write `section.field=value` settings into the sections; returns what is wrong with them."""
    mistakes = []
    for override in overrides:
        name, equals, value = override.removeprefix("--").partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot and field):
            hint = "; options of accelerate go before -m" if override.startswith("--") else ""
            mistakes.append(f"{override}: an override has the form section.field=value{hint}")
            continue
        target = sections.setdefault(section, {})
        if not isinstance(target, dict):
            mistakes.append(f"{override}: {section} is not a section")
            continue
        try:
            target[field] = yaml.load(value, Loader=_RecipeLoader)
        except yaml.YAMLError as error:
            mistakes.append(f"{override}: {error}")
    return mistakes


def _explain(item: Any) -> str:
    """One validation error as `section.field: reason, and a suggestion`."""
    location: tuple[Any, ...] = item["loc"]
    name = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{name}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{name}: required, and not set"
    if item["type"] == "model_type":
        fields = ", ".join(_known_keys(location))
        return f"{name}: a section of settings ({fields}), not {item['input']!r}"
    reason = item["msg"].removeprefix("Value error, ")
    return f"{name}: {reason} (got {item['input']!r})"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    if not location:
        return list(Recipe.model_fields)
    if location[0] == "data" and len(location) > 2:
        return list(DataSource.model_fields)
    section = Recipe.model_fields[str(location[0])].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return list(section.model_fields)
