"""RWKV World as a transformers tokenizer: the same greedy match, in Python and pyrwkv-tokenizer."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from metastate.convert.hf_folder import AUTO_TOKENIZER, END, write_modeling
from metastate.data.tokenizer import WorldTokenizer
from metastate.errors import ConfigError

try:
    from transformers import AddedToken, PreTrainedTokenizer
except ImportError as cause:
    raise ConfigError("this needs transformers 5: pip install 'metastate[hf]'") from cause


class MetaStateWorldTokenizer(PreTrainedTokenizer):
    """RWKV World with WorldTokenizer's ids; a token's name is its bytes read as Latin-1.

    A text begins with the end of document, id 0, unless `add_special_tokens=False`. Text that
    spells the end of document stays text.

    Args:
        vocab_file: rwkv_vocab.txt.
        **kwargs: as every PreTrainedTokenizer takes.

    Raises:
        DataError: the file is missing or no World vocabulary.
    """

    vocab_files_names = {"vocab_file": str(WorldTokenizer.file_name)}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self._world = WorldTokenizer(vocab_file)
        self._auto_map = AUTO_TOKENIZER
        end = AddedToken(END, special=True, normalized=False)
        fixed = {
            "added_tokens_decoder": {0: end},
            "special_tokens_pattern": "bos",
            "split_special_tokens": True,
        }
        super().__init__(**kwargs | dict.fromkeys(("bos_token", "eos_token"), end) | fixed)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._world.vocab_size

    @cached_property
    def _vocab(self) -> dict[str, int]:
        tokens = (self._convert_id_to_token(i) for i in range(self.vocab_size))
        return {token: i for i, token in enumerate(tokens) if token}

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens' names and ids; ids that mean nothing are left out."""
        return dict(self._vocab)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._convert_id_to_token(i) for i in self._world.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return END if index == 0 else self._world.decode_bytes([index]).decode("latin-1")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return "".join(tokens).encode("latin-1").decode("utf-8", "replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy rwkv_vocab.txt, and write the module that `trust_remote_code=True` imports."""
        prefix = "" if filename_prefix is None else f"{filename_prefix}-"
        path = Path(save_directory) / f"{prefix}{WorldTokenizer.file_name}"
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        write_modeling(save_directory)
        return (str(path),)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Do nothing: `save_pretrained` writes an import of this class, no copy of its source."""
