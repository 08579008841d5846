"""Tokenizers behind one interface: raw bytes, RWKV World, and every Hugging Face tokenizer.json.

No tokenizer ever turns text into its end-of-document token: that id marks document ends and
nothing else, whatever the text says.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import difflib
import hashlib
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from metastate.data.files import atomic_write, expanded
from metastate.errors import ConfigError, DataError

EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)
PAD = 128
UNKNOWN = "\U0010fffd"  # for private use: no vocabulary has it


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: `bytes`, `world` or `json`.
        name: what a person calls it.
        num_ids: every id is below it.
        eod_id: the token that ends a document; `encode` never gives it, `decode` drops it.
        joins_at_spaces: encode("a b") is encode("a") + encode("b"), as where a text gets a space
            before it: such texts are cut at spaces, which the next piece gets anyway.
        file_name: what `save` calls its file; None where there is none.
    """

    kind: str
    name: str
    num_ids: int
    eod_id: int
    joins_at_spaces: bool = False
    file_name: str | None = None
    path: str | None = None
    _content: bytes = b""

    @property
    def vocab_size(self) -> int:
        """V of a new model: `num_ids`, padded to a multiple of 128 (GPT-NeoX: 50,304)."""
        return -(-self.num_ids // PAD) * PAD

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, [length] integer arrays, without end of document."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids; what is no UTF-8 becomes U+FFFD, unknown ids nothing."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text, without an end of document."""
        return self.encode_batch([text])[0].tolist()

    def num_bytes(self, text: str) -> int:
        """Return how many bytes of UTF-8 the tokens of `text` stand for."""
        return len(text.encode("utf-8"))

    def info(self) -> dict[str, Any]:
        """Return what identifies this tokenizer, ready for JSON; `load_tokenizer` takes it back."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "num_ids": self.num_ids,
            "eod_id": self.eod_id,
            "sha256": hashlib.sha256(self._content).hexdigest() if self._content else None,
            "path": self.path,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Put the vocabulary into `folder`, so that data and checkpoints can be moved; bytes: none.

        Raises:
            DataError: the file cannot be written.
        """
        if self.file_name:
            atomic_write(Path(folder) / self.file_name, self._content, error=DataError)


class _ByteLevel(Tokenizer):
    """A tokenizer whose tokens are byte strings, so that decoding can be exact byte by byte."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of any ids; the end of document and unknown ids give none."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class ByteTokenizer(_ByteLevel):
    """UTF-8 bytes are the tokens; byte 0 ends a document, so NUL characters in text are dropped."""

    kind = name = "bytes"
    num_ids = 256
    eod_id = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the UTF-8 bytes of each text, [length] uint8."""
        return [
            np.frombuffer(text.replace("\0", "").encode("utf-8"), dtype=np.uint8) for text in texts
        ]

    def num_bytes(self, text: str) -> int:
        """Return the bytes of `text`, without the NUL characters that `encode_batch` drops."""
        return super().num_bytes(text) - text.count("\0")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the ids themselves, without end of document."""
        return bytes(i for i in ids if 0 < i < 256)


class WorldTokenizer(_ByteLevel):
    """RWKV World: greedy longest match over 65,529 byte strings; id 0 ends a document.

    Source: rwkv_vocab_v20230424.txt; `pyrwkv-tokenizer` holds it and matches fast. Without that
    package the match is done here, some ten times slower and with the same result.
    """

    kind = "world"
    num_ids = 65_536
    eod_id = 0
    file_name = "rwkv_vocab.txt"

    def __init__(self, path: str | os.PathLike[str], name: str = "world", fast: bool = True):
        """Read a vocabulary file; `fast=False` does without the package.

        Raises:
            DataError: the file is missing or no World vocabulary.
        """
        self.name, self.path = name, os.fspath(path)
        self._content = _read(self.path)
        self._bytes = self._parse()
        self._ids = {token: i for i, token in self._bytes.items()}
        # candidate lengths, longest first, by the first two bytes: most entries have one or two
        lengths: dict[bytes, set[int]] = defaultdict(lambda: {1})
        for token in self._ids:
            if len(token) > 1:
                lengths[token[:2]].add(len(token))
        self._lengths = {key: sorted(sizes, reverse=True) for key, sizes in lengths.items()}
        self._fast = None
        if fast and util.find_spec("pyrwkv_tokenizer"):
            from pyrwkv_tokenizer import RWKVTokenizer

            # the package cannot open a path that UTF-8 cannot say
            with contextlib.suppress(UnicodeEncodeError):
                self._fast = RWKVTokenizer(vocab_filepath=self.path)

    def _parse(self) -> dict[int, bytes]:
        table: dict[int, bytes] = {}
        try:
            for line in self._content.decode("utf-8").strip().split("\n"):
                index, rest = line.split(" ", 1)
                literal, size = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode("utf-8") if isinstance(token, str) else token
                if not isinstance(token, bytes) or len(token) != int(size):
                    raise ValueError("the length does not fit")
                table[int(index)] = token
            if {bytes([i]) for i in range(256)} - set(table.values()):
                raise ValueError("not every single byte is a token")
            if not 0 < min(table) <= max(table) < self.num_ids:
                raise ValueError(f"ids must be 1..{self.num_ids - 1}")
        except (ValueError, SyntaxError) as cause:
            raise DataError(
                f"{self.path} is not an RWKV World vocabulary after {len(table):,} tokens "
                f"({cause}); its lines are `id repr byte_length`"
            ) from cause
        return table

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the greedy longest matches of each text, [length] uint16."""
        if self._fast is not None:
            found = self._fast.encode_batch(list(texts))
        else:
            found = [self._match(text.encode("utf-8")) for text in texts]
        return [np.array(ids, dtype=np.uint16) for ids in found]

    def _match(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            for size in self._lengths.get(data[at : at + 2], (1,)):
                index = self._ids.get(data[at : at + size])
                if index is not None:
                    ids.append(index)
                    at += size
                    break
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the tokens' byte strings, joined."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids)


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json."""

    kind = "json"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, name: str, path: str | None = None):
        """Build the tokenizer from the bytes of a tokenizer.json.

        Raises:
            ConfigError: `tokenizers` is missing. DataError: no tokenizer, or no end of document.
        """
        tokenizers = _tokenizers()
        self.name, self.path, self._content = name, path, content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as cause:  # the library raises plain Exception
            raise DataError(f"{path or name} is not a tokenizer.json: {cause}") from cause
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        found = [name for name in EOD_NAMES if name in vocabulary]
        if not found:
            raise DataError(
                f"{path or name} has no end-of-document token; one of {', '.join(EOD_NAMES)} is "
                "needed"
            )
        self.eod_id = vocabulary[found[0]]
        self.num_ids = max(vocabulary.values()) + 1
        # Text that spells a special token is text, or a document could fake its own end; the end is
        # one even where the file has it as an ordinary token.
        self._tokenizer.add_special_tokens([found[0]])
        self._tokenizer.encode_special_tokens = True
        # the model's own vocabulary can still hold the end as a word, which is spelt then
        model = self._tokenizer.model
        letters = [_known(lambda c: [t.id for t in model.tokenize(c)], c) for c in found[0]]
        self._spelt_eod = [i for ids in letters for i in ids]
        unknown = _known(lambda c: self._tokenizer.encode(c, add_special_tokens=False).ids, UNKNOWN)
        if self.eod_id in self._spelt_eod + unknown:
            raise DataError(
                f"{path or name} gives its end-of-document token {found[0]!r} for characters that "
                "it does not know; a tokenizer with a token of its own for them, or for bytes, is "
                "needed"
            )
        a, b, both = (_known(self.encode, text) for text in ("a", "b", "a b"))
        self.joins_at_spaces = both == a + b

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, [length] int32; all cores work on a batch."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_eod(np.array(encoding.ids, dtype=np.int32)) for encoding in found]

    def _without_eod(self, ids: np.ndarray) -> np.ndarray:
        """Return `ids` with the characters of the end-of-document token in the place of itself."""
        if not (ids == self.eod_id).any():
            return ids
        spelt = {self.eod_id: self._spelt_eod}
        return np.array([i for t in ids.tolist() for i in spelt.get(t, [t])], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids; special and padded ids give none."""
        known = [int(i) for i in ids if 0 <= i < self.num_ids and i != self.eod_id]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def id_to_token(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it; None for ids of the padding."""
        return self._tokenizer.id_to_token(token)


class StreamDecoder:
    """Turn tokens that come one by one into text, whole characters only.

    The pieces joined, with `finish()` last, are the text that `decode` gives for all ids at once.
    """

    # A character has at most 4 bytes; a longer run of tokens that decodes to U+FFFD is no character
    # in the making, and decoding an ever longer run again would cost quadratic time.
    LIMIT = 64

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []  # emitted already; some tokenizers decode by what precedes
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take the next token id; return the text that is now certain, often empty."""
        if isinstance(self._tokenizer, _ByteLevel):
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        self._pending.append(int(token))
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._pending) < self.LIMIT:
            return ""
        self._before, self._pending = (self._before + self._pending)[-self.LIMIT :], []
        return text

    def finish(self) -> str:
        """Return what is left; an unfinished character becomes U+FFFD. The decoder starts anew."""
        text = self.unfinished
        self._utf8.reset()
        self._before, self._pending = [], []
        return text

    @property
    def unfinished(self) -> str:
        """What `finish` would return."""
        return self._utf8.getstate()[0].decode("utf-8", "replace") + self._new_text()

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._before + self._pending)[len(decode(self._before)) :]


def identity(info: dict[str, Any]) -> dict[str, Any]:
    """Return what of `Tokenizer.info()` tells one tokenizer from another: not its name or place."""
    return {key: value for key, value in info.items() if key not in ("name", "num_ids", "path")}


def is_vocabulary(vocab_size: int, num_ids: int) -> bool:
    """Return whether a model of `vocab_size` ids can be one of a tokenizer of `num_ids`.

    Others pad as well: GPT-2's 50,257 ids are 50,257 or 50,304, Qwen's 151,665 are 151,936 or
    152,064; a model with a hundredth of ids to spare is another tokenizer's.
    """
    return num_ids <= vocab_size <= max(-(-num_ids // PAD) * PAD, num_ids * 101 // 100)


def load_tokenizer(
    spec: str | os.PathLike[str] | dict[str, Any] | Tokenizer,
    folders: Sequence[str | os.PathLike[str]] = (),
) -> Tokenizer:
    """Return the tokenizer that `spec` names.

    Args:
        spec: `bytes`; `world`; the path of a tokenizer.json, of a World vocabulary (.txt) or of a
            folder that holds one; a name on the Hugging Face hub; or what `info()` returned.
        folders: where to look first when `spec` is an `info()` (a data folder, a checkpoint).

    Raises:
        ConfigError: a package is missing, or nothing has that name.
        DataError: the file is missing, broken, or another one than the recorded one.
    """
    if isinstance(spec, Tokenizer):
        return spec
    if isinstance(spec, dict):
        return _load_recorded(spec, folders)
    text = os.fspath(spec)
    if text == "bytes":
        return ByteTokenizer()
    if text == "world":
        return WorldTokenizer(_package_vocabulary())
    path = expanded(text)
    if path.is_dir():
        for name in (JsonTokenizer.file_name, WorldTokenizer.file_name):
            if (path / str(name)).is_file():
                return load_tokenizer(path / str(name))
        raise DataError(f"the folder {path} holds no tokenizer.json and no rwkv_vocab.txt")
    if path.is_file() or path.suffix in (".json", ".txt"):
        path = path.absolute()
        if path.suffix == ".txt":
            return WorldTokenizer(path, path.stem)
        name = path.stem if path.name != JsonTokenizer.file_name else path.parent.name
        return JsonTokenizer(_read(path), name, str(path))
    near = difflib.get_close_matches(text, ["bytes", "world"], n=1, cutoff=0.7)
    if near:  # a slip of the keyboard must not wait for the hub to time out
        raise ConfigError(f"unknown tokenizer {text!r}; did you mean {near[0]!r}?")
    try:
        found = _tokenizers().Tokenizer.from_pretrained(text)
    except ConfigError:
        raise
    except Exception as cause:  # no network, no such name: the library raises plain Exception
        raise ConfigError(
            f"tokenizer {text!r}: allowed are 'bytes', 'world', the path of a tokenizer.json, or a "
            f"name on the Hugging Face hub; there is no such file, and the hub says: {cause}"
        ) from cause
    return JsonTokenizer(found.to_str().encode("utf-8"), text)


def _load_recorded(info: dict[str, Any], folders: Sequence[str | os.PathLike[str]]) -> Tokenizer:
    kind, name = info.get("kind"), str(info.get("name"))
    if kind == "bytes":
        return ByteTokenizer()
    classes: dict[Any, type[Tokenizer]] = {"world": WorldTokenizer, "json": JsonTokenizer}
    if kind not in classes:
        raise DataError(f"the recorded tokenizer has kind {kind!r}; known: bytes, world, json")
    places = [Path(folder) / str(classes[kind].file_name) for folder in folders]
    places += [Path(info["path"])] if info.get("path") else []
    if kind == "world" and util.find_spec("pyrwkv_tokenizer"):
        places.append(_package_vocabulary())
    for place in places:
        if place.is_file():
            content = place.read_bytes()
            if hashlib.sha256(content).hexdigest() == info.get("sha256"):
                if kind == "world":
                    return WorldTokenizer(place, name)
                return JsonTokenizer(content, name, str(place.absolute()))
    raise DataError(
        f"the {kind} tokenizer {name!r} (sha256 {str(info.get('sha256'))[:12]}...) is not in "
        f"{', '.join(map(str, places)) or 'any known place'}; put its file there"
    )


def _package_vocabulary() -> Path:
    spec = util.find_spec("pyrwkv_tokenizer")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the World vocabulary needs pyrwkv-tokenizer: pip install 'metastate[cli]' (or give "
            "the path of rwkv_vocab_v20230424.txt)"
        )
    return Path(spec.origin).parent / "rwkv_vocab_v20230424.txt"


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as cause:
        raise ConfigError(
            "this tokenizer needs the `tokenizers` package: pip install 'metastate[cli]'"
        ) from cause
    return tokenizers


def _known(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Return the ids of `text`; none where the tokenizer has none and no token for the unknown."""
    try:
        return encode(text)
    except Exception:  # the library raises plain Exception
        return []


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as cause:
        raise DataError(f"cannot read the tokenizer {path}: {cause.strerror}") from cause
