"""Learn a byte-level BPE vocabulary from prepared bytes, to compare on tokens in place of bytes.

    metastate prepare DIR_OF_PILELITE --tokenizer bytes --out runs/pilelite-bytes
    python recipes/train_bpe.py --data runs/pilelite-bytes --vocab-size 1024 --out runs/bpe1024.json
    metastate prepare DIR_OF_PILELITE --tokenizer runs/bpe1024.json --out runs/pilelite-bpe1024

The merges are counted by the `tokenizers` library on the beginnings of training documents, drawn
with a fixed seed, so the same text gives the same file. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.data.files import atomic_write
from metastate.data.loader import PreparedData
from metastate.errors import ConfigError

LONGEST, CHARACTERS = 20_000, 20_000_000  # bytes of a document, characters in all
END = "<|endoftext|>"


def texts(data: PreparedData) -> Iterator[str]:
    """Yield beginnings of training documents in a fixed random order, CHARACTERS in all."""
    documents, count = data.split("train").dataset, 0
    for i in np.random.default_rng(0).permutation(len(documents.lengths)):
        text = bytes(np.asarray(documents[i][:LONGEST]).astype(np.uint8)).decode("utf-8", "replace")
        yield text
        count += len(text)
        if count > CHARACTERS:
            return


def main() -> None:
    """Count, merge and write the vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared with --tokenizer bytes")
    parser.add_argument("--vocab-size", type=positive, default=1024)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    data = PreparedData.open(args.data)
    if data.tokenizer.name != "bytes":
        raise ConfigError(f"{args.data} holds tokens of {data.tokenizer.name}, not bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    atomic_write(args.out, tokenizer.to_str(pretty=True).encode("utf-8"))
    print(f"{args.out}: {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    sys.exit(exit_code(main))
