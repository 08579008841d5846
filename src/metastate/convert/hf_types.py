"""What metastate.convert.hf meets transformers with: configuration, cache, World tokenizer."""

from __future__ import annotations

import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from metastate.config import ModelConfig
from metastate.convert.hf_folder import AUTO_MAP, AUTO_TOKENIZER, END, MODEL_TYPE, write_modeling
from metastate.data.tokenizer import WorldTokenizer
from metastate.errors import ConfigError, StateError
from metastate.mapping import from_dict, to_dict
from metastate.model.state import ModelState

try:
    from transformers import AddedToken, Cache, PreTrainedConfig, PreTrainedTokenizer
except ImportError as cause:
    raise ConfigError("this needs transformers 5: pip install 'metastate[hf]'") from cause


class MetaStateConfig(PreTrainedConfig):
    """A ModelConfig, of any architecture and without loss, as transformers wants it.

    MetaStateConfig(model={"hidden_size": 128, "num_heads": 2})

    Attributes:
        model: the settings of our ModelConfig, checked as strictly as there, all filled in.
        lineage: how the model grew.
        step: updates that metastate's own trainer made; transformers' Trainer does not count here.
        tokenizer: what metastate.data.tokenizer needs to rebuild the tokenizer.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range, or the config is newer
            than this program.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    model: dict[str, Any] | None = None
    lineage: list[Any] | None = None
    step: int = 0
    tokenizer: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        misplaced = sorted(kwargs.keys() & ModelConfig.__dataclass_fields__.keys())
        if misplaced:
            raise ConfigError(f"{misplaced[0]} belongs inside `model`, the settings of our model")
        if self.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings is True; our embedding and head are never tied")
        self.model_config = from_dict(ModelConfig, self.model or {}, "model")
        kwargs.setdefault("auto_map", AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The ModelConfig that `model` holds."""
        return from_dict(ModelConfig, self.model, "model")

    @model_config.setter
    def model_config(self, config: ModelConfig) -> None:
        self.model = to_dict(config)

    @property
    def vocab_size(self) -> int:
        """V; setting it is what `resize_token_embeddings` does."""
        return self.model_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model_config = self.model_config.replace(vocab_size=size)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.model_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return self.model_config.num_layers

    @property
    def num_attention_heads(self) -> int:
        """H."""
        return self.model_config.num_heads

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json, and the module that `trust_remote_code=True` imports."""
        self.auto_map = AUTO_MAP
        write_modeling(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: `save_pretrained` writes an import of this class, no copy of its source."""


class MetaStateCache(Cache):
    """The `past_key_values` of our models: a ModelState, which each forward replaces by the next.

    A ModelState never changes, so `copy.copy(cache)` is a fork that costs nothing, and
    `cache.state.save(path, config)` keeps it. A state from elsewhere is continued with
    `MetaStateCache(state)`; give `generate` the new tokens only.

    Attributes:
        state: after all tokens that were given; None before the first.
        length: how many columns of tokens it was given, padding included; `get_seq_length()`.
        mask: [B, length] bool, False where the column was padding; None where nothing was.
    """

    is_compileable = False
    is_croppable = False
    is_initialized = True

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.length = 0
        self.mask: Tensor | None = None

    def __repr__(self) -> str:
        return f"MetaStateCache(batch_size={self.batch_size}, length={self.length})"

    def __len__(self) -> int:
        """Return the number of layers held."""
        return 0 if self.state is None else len(self.state.layers)

    @property
    def batch_size(self) -> int:
        """Number of rows B; -1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return `length`."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether there is a state."""
        return self.state is not None

    def advance(self, state: ModelState, shape: tuple[int, ...], mask: Tensor | None) -> None:
        """Take the state after columns of `shape` [B, T]; `mask` is False where they were padding.

        A mask of None means that none was. Where one row was read so far, all go on from it.
        """
        if mask is not None or self.mask is not None:
            device = mask.device if self.mask is None else self.mask.device  # type: ignore[union-attr]
            old, new = (
                torch.ones(shape[0], columns, dtype=torch.bool, device=device)
                if m is None
                else m.expand(shape[0], -1)
                for m, columns in ((self.mask, self.length), (mask, shape[1]))
            )
            self.mask = torch.cat([old, new], 1)
        self.state, self.length = state, self.length + shape[1]

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.length, self.mask = None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, [B'] int64, in their order."""
        if self.state is not None:
            self.state = self.state[beam_idx]
        if self.mask is not None:
            self.mask = self.mask[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices`, as `reorder_cache`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row behind one another."""
        if self.state is not None:
            rows = torch.arange(self.state.batch_size).repeat_interleave(repeats)
            self.reorder_cache(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a recurrent state cannot give tokens back.

        Raises:
            StateError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise StateError(
                f"a cache of states cannot take {abs(tokens_to_remove)} tokens back; keep a "
                "copy.copy(cache) from before them (assisted generation needs cropping: leave it)"
            )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: only MetaStateForCausalLM writes this cache."""
        raise StateError(
            "this cache holds no keys and values; only a MetaStateForCausalLM fills it"
        )


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
