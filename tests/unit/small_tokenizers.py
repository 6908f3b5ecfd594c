"""Tokenizers of a few hundred pieces, trained in a second from the sentences below."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Human: Can you tell me where the river is?",
    "Assistant: The river is behind the mill, and the mill is old.",
    "Human: Is it safe to swim in the river?",
    "Assistant: I would not swim there, the water is cold and fast.",
    "the quick brown fox jumps over the lazy dog and asks the assistant a question",
    "Numbers such as 1, 2, 3 and 42; words such as été and naïve.",
] * 4

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Behaves as Qwen3's does: thoughts before the last question are left out, an answer behind it always has a block of
# thoughts, calls of tools keep theirs, and `enable_thinking: false` puts an empty block into the prompt.
THINKING = """
{%- if tools %}<|im_start|>system
tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last_question=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set thought = m.reasoning_content or '' %}{% set content = m.content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last_question and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{ content.lstrip('\\n') }}{% endif %}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def byte_level(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS: `<|end|>` is 0, `<|im_start|>` 1, `<|im_end|>` 2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=chat_template)


def train_sentencepiece(folder: Path, model_type: str, **settings: object) -> Path:
    """A folder with a bare `tokenizer.model` and the config of a small Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"vocab_size": 320, "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    with (folder / "tokenizer.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=stream,
            model_type=model_type,
            **{**defaults, **settings},
        )
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- vocabularies written out by hand, for tables of tokens that can be checked by eye -----------

BYTES = [f"<0x{value:02X}>" for value in range(256)]
CONTROLS = ["<|im_start|>", "<|im_end|>"]
LETTERS = ["▁", "a", "e", "i", "n", "o", "r", "s", "t", "u", "y", ":"]
# Best first; with the letters the parts of each.
WORDS = ["ye", "yes", "no", "sa", "say", "▁yes", "▁no", "▁say", "ey"]


def hand_byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE with eight merges, ChatML symbols, and no BOS."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_hand_byte_level(SPECIAL), eos_token="<|end|>", chat_template=CHATML
    )


def hand_tool_user() -> PreTrainedTokenizerFast:
    """The same merges behind other ids, with `<|begin|>` in front of a text, and of a chat with its tools."""
    backend = _hand_byte_level([*SPECIAL, "<|begin|>"])
    backend.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 3)])
    tools = "{% for tool in tools or [] %}<|im_start|>tool {{ tool.function.name }}<|im_end|>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template="{{ bos_token }}" + tools + CHATML,
    )


def _hand_byte_level(special: list[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("s", "a"), ("sa", "y")]
    merges += [("Ġ", "yes"), ("Ġ", "no"), ("Ġ", "say")]
    pieces = [*special, *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return backend


def hand_sentencepiece(folder: Path, model_type: str) -> Path:
    """A `tokenizer.model` of those pieces: dummy prefix, byte fallback, no other normalization."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    kinds |= dict.fromkeys(CONTROLS, 3) | dict.fromkeys(BYTES, 6)
    for piece in ["<unk>", "<s>", "</s>", *CONTROLS, *BYTES]:
        model.pieces.add(piece=piece, score=0.0, type=kinds[piece])
    if model_type == "bpe":
        # Worst first: their scores rank the pieces, not their places.
        for rank, piece in reversed(list(enumerate([*WORDS, *LETTERS]))):
            model.pieces.add(piece=piece, score=-float(rank), type=1)
    else:
        for piece in [*WORDS, *LETTERS]:
            model.pieces.add(piece=piece, score=-1.0 if piece in WORDS else -4.0, type=1)
    trainer = model.trainer_spec
    trainer.model_type = {"unigram": 1, "bpe": 2}[model_type]
    trainer.byte_fallback = True
    trainer.vocab_size = len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder
