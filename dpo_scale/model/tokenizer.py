"""Loading a tokenizer: a folder, a hub name, or a bare SentencePiece `tokenizer.model`.

transformers reads a bare SentencePiece model without its dummy prefix and whitespace rules, so that
its ids differ from SentencePiece's own. Here the model is converted rule by rule instead, and
compared with SentencePiece on a few texts. Known to differ: a combining mark right behind a
character that the NFKC map replaces, and unigram segmentations whose scores tie in the last bit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_scale.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
_CONFIG_FILE = "tokenizer_config.json"
SPACE = "▁"
"""SentencePiece's visible space (U+2581)."""
_TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*.*",
    "additional_chat_templates/*.jinja",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "special")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PROBES = (
    "Hello world",
    "  two  spaces and a tail ",
    "\n\nHuman: a line\n\nAssistant:",
    "été 漢字 \U0001f600",
    "x = 1\tand 2\r\n",
)
# Types of a piece in sentencepiece_model.proto.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_UNIGRAM, _BPE = 1, 2


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a hub model; UserError where there is none."""
    folder = Path(path)
    if folder.is_dir():
        files = tokenizer_files(path)
        if not files:
            raise UserError(
                f"{path}: no tokenizer in this folder; add tokenizer.json or a SentencePiece "
                f"{SENTENCEPIECE_FILE}, or set model.tokenizer"
            )
        if _is_bare_sentencepiece(folder):
            return convert_sentencepiece(folder / SENTENCEPIECE_FILE)
    elif folder.exists():
        raise UserError(f"{path}: a file; give the folder that holds the tokenizer")
    elif not _HUB_NAME.fullmatch(path):
        raise UserError(f"{path}: no such folder, and not the name of a hub model")
    # Whether mistral-common happens to be installed must not decide which tokenizer a folder with tekken.json has.
    of_mistral = {"mistral_format": False} if (folder / "tekken.json").is_file() else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **of_mistral
        )
    except Exception as error:  # the Rust code raises no narrower one, and a damaged file even a KeyError
        reason = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
        raise UserError(f"{path}: no tokenizer could be loaded ({reason}); check the folder or hub name") from error
    return tokenizer


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files of a folder that make its tokenizer, in a fixed order."""
    files = {file for pattern in _TOKENIZER_FILES for file in Path(path).glob(pattern) if file.is_file()}
    return sorted(files)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str, target: Path) -> None:
    """Write into `target` a tokenizer that plain AutoTokenizer loads with the same ids.

    Args:
        tokenizer: what `load_tokenizer(path)` gave.
        path: its folder, whose files are copied as they are where plain transformers reads them.
        target: an existing folder.
    """
    source = Path(path)
    if not source.is_dir() or _is_bare_sentencepiece(source):
        tokenizer.save_pretrained(target)
        return
    for file in tokenizer_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def convert_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE or unigram model as a fast tokenizer with the same ids.

    BOS goes in front of a text where the model has one, unless add_bos_token is false.
    Text behind a control symbol is encoded as SentencePiece encodes a text: with its dummy prefix.
    Raises UserError for a file that is no such model, or whose ids come out otherwise, and for files beside it that do
    not fit it.
    """
    model = _read_model(file)
    backend = _convert(model, file)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in _PROBES:
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise UserError(
                f"{file}: cannot be converted to the ids that SentencePiece gives for {text!r}; "
                "convert the model to tokenizer.json and put that file next to it"
            )
    settings = _tokenizer_config(file.parent)
    _add_stated_tokens(backend, file.parent, settings)
    trainer = model.trainer_spec
    special = {
        f"{name}_token": piece
        for name, id_, piece in (
            ("unk", trainer.unk_id, trainer.unk_piece),
            ("bos", trainer.bos_id, trainer.bos_piece),
            ("eos", trainer.eos_id, trainer.eos_piece),
            ("pad", trainer.pad_id, trainer.pad_piece),
        )
        if 0 <= id_ < len(model.pieces) and model.pieces[id_].piece == piece
    }
    add_bos = settings.pop("add_bos_token", True)
    bos = settings.get("bos_token") or special.get("bos_token")
    if bos and add_bos:
        if backend.token_to_id(bos) is None:
            raise UserError(
                f"{file.with_name(_CONFIG_FILE)}: bos_token {bos!r} is no piece of {SENTENCEPIECE_FILE}, "
                "and added_tokens_decoder gives it no id; name a piece"
            )
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    templates = _template_files(file.parent)
    if templates:
        settings["chat_template"] = templates["default"] if templates.keys() == {"default"} else templates
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **{**special, **settings}
    )


def _is_bare_sentencepiece(folder: Path) -> bool:
    """Whether the folder has a SentencePiece model, no tokenizer.json, and no class of its own."""
    if not (folder / SENTENCEPIECE_FILE).is_file():
        return False
    if (folder / "tokenizer.json").is_file() or (folder / "tekken.json").is_file():
        return False
    settings = _json_object(folder / _CONFIG_FILE)
    if "tokenizer_class" not in settings:
        return True
    return str(settings["tokenizer_class"]).removesuffix("Fast") in (
        "LlamaTokenizer",
        "PreTrainedTokenizer",
        "TokenizersBackend",
    )


def _json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, empty where there is none."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: holds no JSON object")
    return settings


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says of special tokens, BOS, template and length."""
    known = (*_NAMED_TOKENS, "chat_template", "model_max_length", "add_bos_token")
    settings = {}
    for name, value in _json_object(folder / _CONFIG_FILE).items():
        if name in known and value is not None:
            is_token = isinstance(value, dict) and "content" in value
            settings[name] = value["content"] if is_token else value
    return settings


def _add_stated_tokens(backend: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """Add the tokens that the folder states besides the pieces; UserError where one cannot have its stated id."""
    stated = _stated_tokens(folder, settings)
    for id_, token in sorted(stated.items()):
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        actual_id = backend.token_to_id(token.content)
        if actual_id != id_:
            raise UserError(
                f"{folder}: states id {id_} for the added token {token.content!r}, and behind the pieces of "
                f"{SENTENCEPIECE_FILE} and the other added tokens it has {actual_id}; "
                f"complete added_tokens_decoder in {_CONFIG_FILE}, or put a tokenizer.json there"
            )


def _stated_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """id -> token of added_tokens.json, which has no flags, and of added_tokens_decoder, which has them."""
    special = {settings.get(name) for name in _NAMED_TOKENS}
    # Never normalized: the dummy prefix would become a part of the token, which no text has in its middle.
    try:
        stated = {
            int(id_): AddedToken(content, special=content in special, normalized=False)
            for content, id_ in _json_object(folder / "added_tokens.json").items()
        }
        decoder = _json_object(folder / _CONFIG_FILE).get("added_tokens_decoder") or {}
        return stated | {
            int(id_): AddedToken(
                token["content"], normalized=False, **{flag: bool(token.get(flag)) for flag in _TOKEN_FLAGS}
            )
            for id_, token in decoder.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: added tokens in added_tokens.json or {_CONFIG_FILE} cannot be read ({error}); mend the file"
        ) from error


def _template_files(folder: Path) -> dict[str, str]:
    """Name -> text of the chat templates in files of their own."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def _read_model(file: Path) -> Any:
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{file}: not a SentencePiece model; convert the tokenizer to tokenizer.json") from error
    model: Any = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{file}: not a SentencePiece model of type unigram or BPE")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{file}: treat_whitespace_as_suffix is not supported")
    return model


def _convert(model: Any, file: Path) -> Tokenizer:
    """The Rust tokenizer with the model's vocabulary and the rules of its normalizer."""
    trainer = model.trainer_spec
    # A piece is listed once; a repeated one would shift the ids behind it.
    if len({piece.piece for piece in model.pieces}) != len(model.pieces):
        raise UserError(f"{file}: a piece is listed twice in the vocabulary")
    if trainer.model_type == _BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
        backend = Tokenizer(
            BPE(
                vocabulary,
                _merges(model),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                ignore_merges=True,  # a user-defined symbol has no merges that lead to it
            )
        )
    else:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        backend = Tokenizer(Unigram(scores, trainer.unk_id, trainer.byte_fallback))
    backend.normalizer = _normalizer(model.normalizer_spec)
    splitter = _pre_tokenizer(model)
    if splitter is not None:
        backend.pre_tokenizer = splitter
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    controls = [piece.piece for piece in model.pieces if piece.type == _CONTROL]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in controls])
    return backend


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to build a piece from two others, best piece first.

    SentencePiece joins the two neighbours whose joint piece scores best: the same in a list.
    """
    pieces = {piece.piece: -piece.score for piece in model.pieces if piece.type == _NORMAL}
    order = {name: index for index, name in enumerate(pieces)}
    merges = [
        (cost, order[name[:cut]], order[name[cut:]], name[:cut], name[cut:])
        for name, cost in pieces.items()
        for cut in range(1, len(name))
        if name[:cut] in pieces and name[cut:] in pieces
    ]
    return [(left, right) for _, _, _, left, right in sorted(merges)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """SentencePiece's order: character map, extra spaces, dummy prefix, visible spaces."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        # The Rust map sees whole graphemes: it would make one space of CR LF, SentencePiece two.
        steps.append(normalizers.Replace("\r\n", "\n\n"))
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _pre_tokenizer(model: Any) -> pre_tokenizers.PreTokenizer | None:
    """Splits that leave the ids as they are, or keep text from being read as a symbol."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    symbols = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    if symbols:
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = Regex("|".join(re.escape(symbol) for symbol in longest_first))
        steps.append(pre_tokenizers.Split(pattern, "isolated"))
    if model.trainer_spec.byte_fallback:
        # Text that spells a byte piece, `<0x0A>`, is text; the Rust model would take it for the byte.
        steps.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    # Where no piece has a space inside, words are encoded one by one, which is faster.
    if not any(SPACE in piece.piece[1:] for piece in model.pieces if piece.type == _NORMAL):
        steps.append(pre_tokenizers.Split(SPACE, "merged_with_next"))
    return pre_tokenizers.Sequence(steps) if steps else None
