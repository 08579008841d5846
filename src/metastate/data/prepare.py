"""Turn text into memory-mapped token files, once; an interrupted preparation goes on.

The documents, in order, are tokenised in blocks; each block becomes one file OUT/parts/NNNNNN.npz.
A second run reads the text again but tokenises only the blocks that are missing. When all are there
they are merged into the splits, data.json is written last, and the parts are removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from metastate.data.files import alone_in, atomic_write, write_json
from metastate.data.indexed import token_dtype, write_index
from metastate.data.loader import FORMAT, RECORD, PreparedData
from metastate.data.reading import TEXT_FIELD
from metastate.data.sources import SPLITS, Notes, Source, find_sources, told
from metastate.data.tokenizer import Tokenizer, identity, load_tokenizer
from metastate.errors import ConfigError, DataError

BLOCK_CHARACTERS = 1 << 22  # a block of text that is tokenised, and lost by a kill, at once
PIECE_CHARACTERS = 1 << 20  # a longer document is tokenised in pieces, cut at line ends
SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")
SMALL = 0.25  # part of its share below which a split is said to be too small
MIN_DOMAIN_DOCUMENTS = 20  # a domain of so many documents gets one into every split
BY_HASH = -1
Item = TypeVar("Item")


class _Text(NamedTuple):
    text: str
    domain: str
    split: int  # index into SPLITS, or BY_HASH


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: str | Tokenizer,
    out: str | os.PathLike[str],
    *,
    valid: Sequence[str | os.PathLike[str]] = (),
    test: Sequence[str | os.PathLike[str]] = (),
    fractions: tuple[float, float, float] = (0.98, 0.01, 0.01),
    text_field: str = TEXT_FIELD,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    say: Callable[[str], Any] = warnings.warn,
) -> PreparedData:
    """Tokenise `inputs` into the folder `out`: per split .bin, .idx and .docs.npy, and data.json.

    Splits: inputs named train.*, valid.* or test.* (and what `valid` and `test` give) go where they
    say, if they say more than one split; the rest is train. If nothing says valid, documents are
    drawn by the SHA-256 of their text, so equal documents never stand on both sides. Every split
    with a fraction above 0 gets a document if there are enough (valid from 2 documents on, test
    from 3), and one of every domain of 20 documents or more. A single document is cut by position.

    Args:
        inputs: see `find_sources`.
        tokenizer: see `load_tokenizer`.
        out: the folder to write; made if missing.
        valid: inputs for the valid split.
        test: inputs for the test split.
        fractions: of train, valid and test among the documents that are drawn by hash; they sum
            to 1, and the first is above 0.
        text_field: the name of the field that holds a record's text.
        overwrite: replace what `out` holds, whatever settings it was made with.
        progress: called with (bytes read, bytes in all or None where that is not known).
        say: is told, in one line, what of the inputs' folders is left out or read otherwise than
            its name says; data.json has it as `notes`. Also of `valid` or `test` without any text,
            or with far less of it than `fractions` say.

    Returns:
        The prepared data. If `out` was finished with the same inputs and settings: at once.

    Raises:
        DataError: an input is missing, is no text, or holds none; `out` holds data made with other
            settings; the disk is full. ConfigError: a package is missing, or fractions are wrong.
            BusyError: another process prepares into `out`.
    """
    folder = Path(out)
    possible = all(x >= 0 for x in fractions) and abs(sum(fractions) - 1) <= 1e-9  # no NaN is
    if len(fractions) != 3 or not possible or not fractions[0]:
        raise ConfigError(
            f"fractions are {tuple(fractions)}; three numbers for train, valid and test are needed "
            "that sum to 1, the first above 0"
        )
    tokenizer = load_tokenizer(tokenizer)
    notes: Notes = {}
    find = partial(find_sources, exclude=folder, text_field=text_field, notes=notes)
    sources = find(inputs) + find(valid, "valid") + find(test, "test")
    if notes:
        say(told(notes))
    if not sources:
        raise DataError("no input was given; name text files, folders, 'stdlib' or a dataset")
    sources, fractions = _settle_splits(sources, fractions)
    settings: dict[str, Any] = {
        "inputs": [[source.identity, source.split] for source in sources],
        "fractions": fractions,
        "tokenizer": identity(tokenizer.info()),
        "format": FORMAT,
    }
    if text_field != TEXT_FIELD:  # which earlier versions did not name
        settings["text_field"] = text_field
    settings = json.loads(json.dumps(settings))  # so that it compares equal to what is read back
    if not overwrite and (done := _finished(folder, settings)):
        return done
    with alone_in(folder, error=DataError):
        if overwrite:
            _remove(folder)
        elif done := _finished(folder, settings):  # by the one that held the folder until now
            return done
        parts = folder / "parts"
        if any(parts.glob("*.npz")):  # blocks that an interrupted run has tokenised
            old = _read_settings(parts / "settings.json")
            _same_settings(folder, old, settings, "an interrupted preparation")
        else:
            write_json(parts / "settings.json", settings, error=DataError)
        count = _write_parts(sources, tokenizer, parts, fractions, progress)
        blocks = [parts / f"{i:06d}.npz" for i in range(count)]
        record = _merge(blocks, folder, tokenizer, fractions)
        for name, given in (("valid", valid), ("test", test)):
            if given and not record["splits"][name]["documents"]:
                say(f"the inputs given for {name} hold no text: that split is empty")
        for line in _too_small(record["splits"], fractions):
            say(line)
        tokenizer.save(folder)
        record |= {"notes": notes, "settings": settings}
        write_json(folder / RECORD, record, error=DataError)
        shutil.rmtree(parts)
    return PreparedData.open(folder)


def _too_small(splits: dict[str, Any], fractions: tuple[float, ...]) -> Iterator[str]:
    """Yield a sentence for each split far below its share, as of two files the small one may be."""
    drawn = {name: f for name, f in zip(SPLITS, fractions, strict=True) if f}
    total = sum(splits[name]["tokens"] for name in drawn)
    for name, fraction in drawn.items():
        tokens = splits[name]["tokens"]
        if name != "train" and 0 < tokens < SMALL * fraction * total:
            yield (
                f"{name} holds {tokens:,} of {total:,} tokens, where {fraction:.3g} of all was "
                f"asked for: the documents are few; give texts for it with --{name}"
            )


def _finished(folder: Path, settings: dict[str, Any]) -> PreparedData | None:
    """Return the data in `folder`, None where none is finished; DataError where it is other."""
    if not (folder / RECORD).is_file():
        return None
    done = PreparedData.open(folder)
    _same_settings(folder, done.record.get("settings"), settings)
    return done


def _settle_splits(
    sources: list[Source], fractions: tuple[float, float, float]
) -> tuple[list[Source], tuple[float, float, float]]:
    """Decide whether the names say the splits; what they say is not drawn by hash."""
    said = {source.split for source in sources}
    if len(said) == 1:  # one file `test.txt`, or only train files: the name says nothing
        return [replace(source, split=None) for source in sources], fractions
    if "valid" in said:
        sources = [replace(source, split=source.split or "train") for source in sources]
        return sources, (1.0, 0.0, 0.0)
    if "test" in said:
        fractions = (1.0 - fractions[1], fractions[1], 0.0)
    return [replace(s, split=s.split if s.split == "test" else None) for s in sources], fractions


def _same_settings(folder: Path, old: Any, new: dict[str, Any], what: str = "data") -> None:
    if old == new:
        return
    old = old if isinstance(old, dict) else {}
    differ = ", ".join(key for key in new | old if old.get(key) != new.get(key))
    raise DataError(
        f"{folder} holds {what} with other settings ({differ} differ); give another --out, or "
        "--overwrite to prepare it anew"
    )


def _read_settings(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _remove(folder: Path) -> None:
    """Remove what `prepare` writes, nothing else; data.json first: no half may pass as whole."""
    (folder / RECORD).unlink(missing_ok=True)
    for split in SPLITS:
        for suffix in ("bin", "idx", "docs.npy"):
            (folder / f"{split}.{suffix}").unlink(missing_ok=True)
    shutil.rmtree(folder / "parts", ignore_errors=True)


def _texts(sources: list[Source], advance: Callable[[int], Any]) -> Iterator[_Text]:
    """Yield every text that is not empty; `advance` is told the bytes read since the last one."""
    for source in sources:
        split = BY_HASH if source.split is None else SPLITS.index(source.split)
        before = 0
        for text, domain, position in source.read():
            advance(position - before)
            before = position
            if text.strip("\0"):
                yield _Text(text, domain, split)


def _cut_single(texts: Iterator[_Text], fractions: tuple[float, float, float]) -> Iterator[_Text]:
    """Pass the texts on; one document alone is cut by position: train first, test last."""
    head = list(islice(texts, 2))
    if not head:
        raise DataError(
            "the inputs hold no text: every file or record is empty; give text to learn from"
        )
    if len(head) == 2 or head[0].split != BY_HASH or len(head[0].text) < len(SPLITS):
        return chain(head, texts)
    text, domain, _ = head[0]
    valid, test = (math.ceil(fraction * len(text)) for fraction in fractions[1:])
    cuts = [0, len(text) - valid - test, len(text) - test, len(text)]
    pieces = ((text[cuts[i] : cuts[i + 1]], i) for i in range(len(SPLITS)))
    return (_Text(piece, domain, i) for piece, i in pieces if piece)


def _blocks(items: Iterable[Item], text_of: Callable[[Item], str]) -> Iterator[list[Item]]:
    """Yield the items in lists of `BLOCK_CHARACTERS` or more; the last has what is left."""
    block, size = [], 0
    for item in items:
        block.append(item)
        size += len(text_of(item))
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _write_parts(
    sources: list[Source],
    tokenizer: Tokenizer,
    parts: Path,
    fractions: tuple[float, float, float],
    progress: Callable[[int, int | None], None] | None,
) -> int:
    """Tokenise the blocks that have no file yet; return how many blocks there are."""
    sizes = [source.num_bytes for source in sources]
    total = None if None in sizes else sum(size for size in sizes if size)
    done = count = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None and num_bytes:  # a packed file is read in large pieces
            progress(done, total)

    texts = _cut_single(_texts(sources, advance), fractions)
    for block in _blocks(texts, lambda text: text.text):
        path = parts / f"{count:06d}.npz"
        if not path.is_file():
            columns = _tokenise(block, tokenizer)
            atomic_write(path, partial(np.savez, **columns), error=DataError)  # type: ignore[arg-type]
        count += 1
    return count


def _pieces(text: str, at_spaces: bool = False) -> Iterator[str]:
    """Yield `text` in pieces of bounded size, cut behind a line end where there is one.

    With `at_spaces` the cuts are single spaces, of which no piece has any: see `joins_at_spaces`.
    A text, or the end of one, that has no such space is one piece.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        if at_spaces:
            cut = SINGLE_SPACE.search(text, limit)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.end()
            continue
        end = text.rfind("\n", start, limit) + 1
        end = end if end > start else limit
        yield text[start:end]
        start = end
    yield text[start:]


def _tokenise(block: list[_Text], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Return the columns of a part: all tokens, and one value a document of the rest."""
    dtype = token_dtype(tokenizer.vocab_size)
    documents: list[list[np.ndarray]] = [[] for _ in block]
    numbered = (
        (number, piece)
        for number, text in enumerate(block)
        for piece in _pieces(text.text, tokenizer.joins_at_spaces)
    )
    for batch in _blocks(numbered, lambda pair: pair[1]):
        encoded = tokenizer.encode_batch([piece for _, piece in batch])
        for (number, _), ids in zip(batch, encoded, strict=True):
            documents[number].append(ids.astype(dtype))
    for pieces in documents:
        pieces.append(np.array([tokenizer.eod_id], dtype))
    names = sorted({text.domain for text in block})
    digests = (hashlib.sha256(text.text.encode("utf-8")).digest() for text in block)
    return {
        "tokens": np.concatenate(list(chain.from_iterable(documents))),
        "lengths": np.array([sum(map(len, pieces)) for pieces in documents]),
        "text_bytes": np.array([tokenizer.num_bytes(text.text) for text in block]),
        "hashes": np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64),
        "splits": np.array([text.split for text in block]),
        "domains": np.array([names.index(text.domain) for text in block]),
        "names": np.frombuffer(json.dumps(names).encode("utf-8"), np.uint8),
    }


def _merge(
    parts: list[Path], folder: Path, tokenizer: Tokenizer, fractions: tuple[float, float, float]
) -> dict[str, Any]:
    """Write every split's files from the parts; return what data.json says about them."""
    local = [json.loads(_load(path, "names")["names"].tobytes()) for path in parts]
    names = sorted(set(chain.from_iterable(local)))
    columns: dict[str, list[np.ndarray]] = {}
    for path, own in zip(parts, local, strict=True):
        place = np.array([names.index(name) for name in own])
        part = _load(path, "lengths", "text_bytes", "hashes", "splits", "domains")
        for key, column in (part | {"domains": place[part["domains"]]}).items():
            columns.setdefault(key, []).append(column)
    ends = np.cumsum([len(lengths) for lengths in columns["lengths"]])[:-1]
    table = {key: np.concatenate(value) for key, value in columns.items()}
    splits = _assign(table, fractions)
    record: dict[str, Any] = {}
    dtype = token_dtype(tokenizer.vocab_size)
    for index, name in enumerate(SPLITS):
        mine = splits == index
        digest = hashlib.sha256()

        def write(file: BinaryIO, mine: np.ndarray = mine, digest: Any = digest) -> None:
            for path, keep in zip(parts, np.split(mine, ends), strict=True):
                part = _load(path, "tokens", "lengths")
                tokens = part["tokens"][np.repeat(keep, part["lengths"])]
                digest.update(tokens)
                file.write(tokens)

        atomic_write(folder / f"{name}.bin", write, error=DataError)
        write_index(folder / name, table["lengths"][mine], dtype)
        docs = np.stack([table["domains"][mine], table["text_bytes"][mine]], 1)
        atomic_write(folder / f"{name}.docs.npy", partial(np.save, arr=docs), error=DataError)
        record[name] = _sizes(table, mine) | {
            "sha256": digest.hexdigest(),
            "domains": {
                domain: _sizes(table, mine & (table["domains"] == i))
                for i, domain in enumerate(names)
            },
        }
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.info(),
        "dtype": dtype.name,
        "domains": names,
        "splits": record,
    }


def _load(path: Path, *columns: str) -> dict[str, np.ndarray]:
    """Return named columns of a part, read whole: a flipped bit shows when it is read."""
    try:
        with np.load(path, allow_pickle=False) as part:
            return {key: part[key] for key in columns}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as cause:
        raise DataError(
            f"{path} is broken ({cause}); remove it and run the same prepare again"
        ) from cause


def _sizes(table: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, int]:
    return {
        "documents": int(rows.sum()),
        "tokens": int(table["lengths"][rows].sum()),
        "text_bytes": int(table["text_bytes"][rows].sum()),
    }


def _assign(table: dict[str, np.ndarray], fractions: tuple[float, ...]) -> np.ndarray:
    """Return the split of every document, [documents] index into SPLITS.

    Args:
        table: a row a document. `splits`: index into SPLITS, or -1 where the hash decides;
            `hashes`: uint64, uniform; `domains`: index of the domain; `text_bytes`.
        fractions: of train, valid and test.
    """
    share = table["hashes"].astype(np.float64) / 2.0**64
    bounds = np.cumsum(fractions)[:-1]
    wanted = [index for index, fraction in enumerate(fractions) if fraction > 0]
    by_hash = np.minimum(np.searchsorted(bounds, share, side="right"), wanted[-1])  # by rounding
    drawn = table["splits"] == BY_HASH
    splits = np.where(drawn, by_hash, table["splits"])
    for domain in np.unique(table["domains"]).tolist():
        rows = drawn & (table["domains"] == domain)
        if rows.sum() >= MIN_DOMAIN_DOCUMENTS:
            _fill(splits, rows, drawn, table, wanted)
    # Of few texts one may be nearly all that there is: it is for training.
    if 0 in wanted and 0 < len(np.unique(table["hashes"][drawn])) < MIN_DOMAIN_DOCUMENTS:
        splits[drawn & (table["hashes"] == _longest(table, drawn))] = 0
    _fill(splits, drawn, drawn, table, wanted)
    return splits


def _longest(table: dict[str, np.ndarray], rows: np.ndarray) -> np.uint64:
    """Return the hash of the longest text among `rows`."""
    return table["hashes"][rows][np.argmax(table["text_bytes"][rows])]


def _fill(
    splits: np.ndarray,
    rows: np.ndarray,
    drawn: np.ndarray,
    table: dict[str, np.ndarray],
    wanted: list[int],
) -> None:
    """Give every wanted split that has none of `rows` one text of the split that has most.

    Equal texts among `drawn` move together, so that none ever stands on both sides. The longest
    text stays where its split has another.
    """
    hashes = table["hashes"]
    for index in wanted[: len(np.unique(hashes[rows]))]:
        texts = [np.unique(hashes[rows & (splits == i)]) for i in range(len(SPLITS))]
        if not len(texts[index]):
            _, most = max((len(found), i) for i, found in enumerate(texts))
            others = texts[most][texts[most] != _longest(table, rows)]
            splits[drawn & (hashes == (others if len(others) else texts[most])[-1])] = index
