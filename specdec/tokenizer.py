"""The tokenizer of a checkpoint folder: text to ids, ids to text, chat template, end tokens.

Reads `tokenizer.json` with the `tokenizers` library, without transformers, plus what stands beside
it: `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json`, `config.json`.
Refuses decoders other than byte-level ones (all supported families have one): for these alone is
a token a fixed byte string, so that text can be streamed exactly and in constant time per token.
"""

import codecs
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel

from specdec.chat import ChatTemplate, Message
from specdec.errors import CheckpointError, PromptError


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.open`."""

    def __init__(self, backend: tokenizers.Tokenizer, folder: Path) -> None:
        """`backend`: a byte-level tokenizer; `folder`: where its companion files stand."""
        self.backend = backend
        self.folder = folder
        self._byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        settings = _read_object(folder / "tokenizer_config.json")
        self._special_tokens = _special_tokens(settings)
        self._template_source, self._template_origin = _template_source(folder, settings)

    @classmethod
    def open(cls, folder: Path | str) -> "Tokenizer":
        """Read the tokenizer of a checkpoint folder; CheckpointError names the broken file."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; a checkpoint needs its tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        # The library raises bare Exception for unreadable and ill-formed files alike.
        except Exception as error:
            raise CheckpointError(f"{path}: not a readable tokenizer: {error}") from error
        if not isinstance(backend.decoder, ByteLevel):
            found = type(backend.decoder).__name__ if backend.decoder is not None else "none"
            raise CheckpointError(f"{path}: decoder is {found}; only ByteLevel is supported")
        # Settings that a training run may have left in the file would cut or fill prompts silently.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, Path(folder))

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; `add_special` lets the tokenizer add its own start and end tokens.

        PromptError for lone surrogates, which no text has.
        """
        try:
            text.encode()
        except UnicodeError as error:
            raise PromptError(f"the prompt is not text: {error}") from error
        return list(self.backend.encode(text, add_special_tokens=add_special).ids)

    def detokenizer(self) -> "Detokenizer":
        """A fresh streaming decoder."""
        return Detokenizer(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes `token` stands for; none for an id outside the vocabulary (padded heads)."""
        text = self.backend.id_to_token(token)
        if text is None:
            return b""
        try:
            return bytes(self._byte_of[character] for character in text)
        except KeyError:  # an added token, written as plain text
            return text.encode()

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return self._template_source is not None

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._template_source is None:
            raise PromptError(f"{self.folder}: the checkpoint has no chat template; use --raw")
        return ChatTemplate(self._template_source, self._special_tokens, self._template_origin)

    def apply_template(self, messages: Sequence[Message]) -> str:
        """The prompt text of a chat, to be encoded with `add_special=False`."""
        return self._template.render(messages)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: the union of what the checkpoint's files name, ascending."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            values = _read_object(self.folder / name)
            inner = values.get("text_config")
            for part in (values, inner if isinstance(inner, dict) else {}):
                found.update(_ids(part.get("eos_token_id"), self.folder / name))
        eos_token = self._special_tokens.get("eos_token")
        if eos_token is not None:
            token = self.backend.token_to_id(eos_token)
            if token is None:
                raise CheckpointError(
                    f"{self.folder / 'tokenizer_config.json'}: eos_token {eos_token!r} is not in "
                    "tokenizer.json's vocabulary"
                )
            found.add(token)
        return tuple(sorted(found))


class Detokenizer:
    """Tokens in, text out, as soon as it is certain.

    Holds back only the bytes of an unfinished UTF-8 character (three at most), so a character is
    never split and a token costs the same whatever came before. The pieces of `add` and `finish`,
    joined, equal the library's own decoding of all tokens, special ones included.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that `token` completes, maybe empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character is unfinished, else nothing."""
        return self._decoder.decode(b"", final=True)


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte 0..255 in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in ascending order, take
    the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} when the file does not exist."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json, each given as text or as an object."""
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _template_source(folder: Path, settings: dict[str, Any]) -> tuple[str | None, str]:
    """The chat template and the file it stands in; chat_template.jinja wins over the config."""
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text: {error}") from error
    origin = str(folder / "tokenizer_config.json")
    value = settings.get("chat_template")
    if value is None or isinstance(value, str):
        return value, origin
    if isinstance(value, list):  # named templates: [{"name": "default", "template": "..."}, ...]
        named = {
            entry["name"]: entry.get("template")
            for entry in value
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
        if isinstance(named.get("default"), str):
            return named["default"], origin
        names = ", ".join(repr(name) for name in named)
        raise CheckpointError(f"{origin}: chat_template has no 'default' entry, only {names}")
    raise CheckpointError(
        f"{origin}: chat_template must be text or a list of named templates, "
        f"found {type(value).__name__}"
    )


def _ids(value: Any, path: Path) -> list[int]:
    """eos_token_id as it is written: absent, one id or a list of ids."""
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{path}: eos_token_id must be an id or a list of ids, found {value}")
    return ids
