"""Zero-shot tasks from local files: what is asked, and which answer is right.

A task is a list of items, an item a few pairs of texts (context, continuation), one of them right.
Prompts are those of lm-evaluation-harness 0.4, but that one space, not two, follows COPA's
connective.

The files, below one folder (in braces the fields of a line; `gold` counts from 0):

    lambada/lambada_test.jsonl              {"text"}: its last word is to be guessed
    hellaswag/hellaswag_val_full.txt.bz2    six lines an item: `activity_label: ctx` (no marks of
                                            WikiHow's, ctx_b in lower case), label 0-3, four endings
    mc_eval/piqa.jsonl, arc_easy.jsonl, arc_challenge.jsonl, openbook_qa.jsonl, copa.jsonl,
            boolq.jsonl                     {"query", "choices", "gold"}
    mc_eval/winogrande.jsonl                {"context_options", "continuation", "gold"}
    blimp/BLiMP.zip                         data/PARADIGM.jsonl: {"sentence_good", "sentence_bad"}
"""

from __future__ import annotations

import bz2
import difflib
import io
import json
import os
import random
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from metastate.errors import ConfigError, DataError


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        pairs: (context, continuation) of every alternative; a continuation begins with the space
            that separates it. LAMBADA has one pair, the right one.
        gold: index of the right pair.
        group: BLiMP's paradigm, else "".
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    group: str = ""


def _read_lambada(content: bytes, where: str) -> Iterator[Item]:
    for row, at in _json_lines(content, where):
        context, space, word = _text(row, "text", at).rpartition(" ")
        if not space or not word or not context.strip():
            raise DataError(f"{at}: `text` needs words, and a last one after a space")
        yield Item(((context, " " + word),))


def _read_hellaswag(content: bytes, where: str) -> Iterator[Item]:
    try:
        lines = _utf8(bz2.decompress(content), where).removesuffix("\n").split("\n")
    except (OSError, ValueError) as cause:
        raise DataError(f"{where} is no whole bzip2 file ({cause}); get it again") from cause
    if len(lines) % 6:
        raise DataError(f"{where} has {len(lines)} lines, no multiple of the six of an item")
    for i in range(0, len(lines), 6):
        context, label, *endings = lines[i : i + 6]
        at = f"{where}, item {i // 6}"
        if label not in ("0", "1", "2", "3"):
            raise DataError(f"{at}: the label is {label!r}; it must be 0, 1, 2 or 3")
        endings = [_without_marks(ending) for ending in endings]
        yield _choice_item(_without_marks(_begun(context)), endings, int(label), at)


def _begun(context: str) -> str:
    """Return HellaSwag's ctx as lm-eval joins it: `ctx_a + " " + ctx_b.capitalize()`.

    The released ctx has ctx_b, the beginning of the sentence to be ended, in lower case; it is what
    follows the last full stop, and nothing where the text ends with one.
    """
    *before, last = re.split(r"(?<=[.!?])\s+(?=[^.!?]+$)", context.rstrip())
    return " ".join([*before, last.capitalize()]) if before else last


def _without_marks(text: str) -> str:
    """Return a text of HellaSwag without WikiHow's marks, as lm-eval's `preprocess` does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _read_choices(prompt: Callable[[str], str]) -> Callable[[bytes, str], Iterator[Item]]:
    def read(content: bytes, where: str) -> Iterator[Item]:
        for row, at in _json_lines(content, where):
            query = _text(row, "query", at)
            yield _choice_item(prompt(query), row.get("choices"), row.get("gold"), at)

    return read


def _read_winogrande(content: bytes, where: str) -> Iterator[Item]:
    """Partial scoring: the same end of the sentence, behind either name."""
    for row, at in _json_lines(content, where):
        end = " " + _text(row, "continuation", at)
        contexts, gold = _checked(row.get("context_options"), row.get("gold"), at)
        yield Item(tuple((context, end) for context in contexts), gold)


def _read_blimp(content: bytes, where: str) -> Iterator[Item]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = sorted(n for n in archive.namelist() if re.fullmatch(r"data/\w+\.jsonl", n))
            files = [(name, archive.read(name)) for name in names]
    except (zipfile.BadZipFile, zlib.error, EOFError) as cause:
        raise DataError(f"{where} is no whole zip file ({cause}); get it again") from cause
    for name, lines in files:
        for row, at in _json_lines(lines, f"{where}:{name}"):
            sentences = [_text(row, key, at) for key in ("sentence_good", "sentence_bad")]
            yield Item(tuple(("", " " + s) for s in sentences), 0, PurePosixPath(name).stem)


def _answer(query: str) -> str:
    """Prompt of PIQA, ARC and BoolQ, whose files hold the question and its passage already."""
    return query.removeprefix("Passage: ").rstrip("\n") + "\nAnswer:"


def _connective(query: str) -> str:
    """Prompt of COPA: the premise runs on into its connective, without a comma."""
    return re.sub(r", (because|therefore)$", r" \1", query)


@dataclass(frozen=True)
class Task:
    """Where a task's items are, how to read them, which metrics are usual for it."""

    file: str
    read: Callable[[bytes, str], Iterator[Item]]
    metrics: tuple[str, ...] = ("acc", "acc_norm")


TASKS = {
    "lambada": Task("lambada/lambada_test.jsonl", _read_lambada, ("acc", "perplexity")),
    "hellaswag": Task("hellaswag/hellaswag_val_full.txt.bz2", _read_hellaswag),
    "piqa": Task("mc_eval/piqa.jsonl", _read_choices(_answer)),
    "arc_easy": Task("mc_eval/arc_easy.jsonl", _read_choices(_answer)),
    "arc_challenge": Task("mc_eval/arc_challenge.jsonl", _read_choices(_answer)),
    "winogrande": Task("mc_eval/winogrande.jsonl", _read_winogrande, ("acc",)),
    "openbookqa": Task("mc_eval/openbook_qa.jsonl", _read_choices(str)),
    "copa": Task("mc_eval/copa.jsonl", _read_choices(_connective), ("acc",)),
    "boolq": Task("mc_eval/boolq.jsonl", _read_choices(_answer), ("acc",)),
    "blimp": Task("blimp/BLiMP.zip", _read_blimp, ("acc", "acc_paradigms")),
}


def check_tasks(names: Sequence[str]) -> None:
    """Raise ConfigError unless every name is one of `TASKS`."""
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown task {name!r}; {hint}there are: {', '.join(TASKS)}")


def load_items(task: str, folder: str | os.PathLike[str], limit: int | None = None) -> list[Item]:
    """Read the items of a task from its file below `folder`.

    Args:
        task: a name in `TASKS`.
        folder: laid out as the head of this module says.
        limit: so many items (of BLiMP: of each paradigm), the first of a shuffled order, so that a
            smaller limit gives a part of what a larger one gives; None is all.

    Raises:
        ConfigError: no such task, or a limit below 1.
        DataError: the file is missing, cut off, or not in its format.
    """
    check_tasks([task])
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be 1 or more")
    path = Path(folder) / TASKS[task].file
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"task {task}: {path} is missing; the data folder must hold {TASKS[task].file}"
        ) from None
    except OSError as cause:
        raise DataError(f"task {task}: {path} cannot be read: {cause.strerror}") from cause
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in TASKS[task].read(content, str(path)):
        groups[item.group].append(item)
    if not groups:
        raise DataError(f"task {task}: {path} holds no items")
    if limit is not None:
        for items in groups.values():
            random.Random(0).shuffle(items)
    return [item for items in groups.values() for item in items[:limit]]


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise DataError(f"{where} is not UTF-8 text ({cause})") from cause


def _json_lines(content: bytes, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of JSON lines, each with the words that say where it stands."""
    for number, line in enumerate(_utf8(content, where).split("\n"), 1):
        if not line.strip():
            continue
        at = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as cause:
            raise DataError(f"{at} is no JSON ({cause}); the file is cut off or damaged") from cause
        if not isinstance(row, dict):
            raise DataError(f"{at} is no JSON object")
        yield row, at


def _text(row: dict[str, Any], key: str, at: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{at}: `{key}` must be text; it is {value!r}")
    return value


def _checked(choices: Any, gold: Any, at: str) -> tuple[list[str], int]:
    """Return alternatives and the index of the right one, or say what is wrong with them."""
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise DataError(f"{at}: the choices must be two or more texts; they are {choices!r}")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise DataError(f"{at}: `gold` must be 0 to {len(choices) - 1}; it is {gold!r}")
    return choices, gold


def _choice_item(context: str, choices: Any, gold: Any, at: str) -> Item:
    choices, gold = _checked(choices, gold, at)
    return Item(tuple((context, " " + choice) for choice in choices), gold)
