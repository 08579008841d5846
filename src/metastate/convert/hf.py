"""Our models inside Hugging Face transformers 5.

    import metastate.convert.hf                                     # registers the Auto classes
    model = AutoModelForCausalLM.from_pretrained("a-folder-of-to_hf")

`to_hf` and `from_hf` convert on disk and do without transformers (metastate.convert.hf_folder).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metastate.convert.hf_folder import MODEL_TYPE, config_fields, from_hf, to_hf
from metastate.convert.hf_types import MetaStateCache, MetaStateConfig, MetaStateWorldTokenizer
from metastate.errors import CheckpointError, ConfigError, ShapeError, StateError
from metastate.model.io import adopt_record, check_finite
from metastate.model.lm import LanguageModel
from metastate.model.loss import IGNORE, head_loss
from metastate.model.state import ModelState

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationMixin,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as cause:
    raise ConfigError("this needs transformers 5: pip install 'metastate[hf]'") from cause

__all__ = [
    "MetaStateCache",
    "MetaStateConfig",
    "MetaStateForCausalLM",
    "MetaStateWorldTokenizer",
    "from_hf",
    "register",
    "to_hf",
]


class MetaStateForCausalLM(PreTrainedModel, GenerationMixin):
    """A LanguageModel, under `model`, with transformers' interface.

    It adds no tokens. In training every document begins behind an end of document, and so does
    what `metastate generate` reads. The tokenizers for bytes and World that `to_hf` writes put
    it in front; with another one begin input_ids with its `eos_token_id`.

    Rows may be padded anywhere, told by `attention_mask`: the result of every row is that of the
    row alone, since padding is skipped (the recurrent state does not see it). `generate` goes on
    from the last column, so there it must stand on the left.

    Args:
        config: a MetaStateConfig.
        model: the LanguageModel to wrap, not copied; None makes a fresh one. See `wrap`.
    """

    config_class = MetaStateConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["RecurrentBlock", "TransformerBlock"]
    _supports_context_parallel = False

    def __init__(self, config: MetaStateConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.model_config) if model is None else model
        adopt_record(self.model, vars(config))
        self.post_init()

    @classmethod
    def wrap(cls, model: LanguageModel) -> MetaStateForCausalLM:
        """Return `model`, in its mode, with transformers' interface; both share parameters."""
        config = MetaStateConfig(**config_fields(model, model.tokenizer_info))
        return cls(config, model).train(model.training)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a folder as every PreTrainedModel does, but no weight may be missing or foreign.

        Raises:
            CheckpointError: a file is truncated or corrupt, or the weights are not this model's, or
                not finite.
        """
        where = pretrained_model_name_or_path
        any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        with_info = kwargs.pop("output_loading_info", False)
        settings = kwargs | {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any
        try:
            loaded = super().from_pretrained(where, *args, **settings)
        except safetensors.SafetensorError as cause:
            raise CheckpointError(
                f"{where} holds no whole safetensors file ({cause}); it is corrupt or cut off"
            ) from None
        model, info = loaded
        for kind, names in info.items():
            if names and not (any_shape and kind == "mismatched_keys"):
                raise CheckpointError(f"{where}: {kind.replace('_', ' ')}: {sorted(names)[0]}")
        check_finite(model.state_dict(), str(where))
        return (model, info) if with_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Do nothing: `save_pretrained` writes an import of this class, no copy of its source."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything as it is: a LanguageModel initialises itself."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the vocabulary's size as every PreTrainedModel does; embedding and head follow."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.model_config
        return embedding

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass: our `activation_checkpointing`."""
        return self.model.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.activation_checkpointing = value

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of `forward`, as every GenerationMixin does.

        Raises:
            ConfigError: a row's last column is padding. `generate` goes on from the logits there.
        """
        mask = kwargs.get("attention_mask")
        if kwargs.get("is_first_iteration") and mask is not None and mask.dim() == 2:
            mask = mask.bool()
            if bool((mask.any(1) & ~mask[:, -1]).any()):
                raise ConfigError(
                    "a row of attention_mask ends with padding, and generate goes on from the last "
                    "column; pad on the left: tokenizer(..., padding_side='left')"
                )
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MetaStateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model.

        loss = sum_t -log p(label_{t+1} | tokens up to t) / (number of scored t, or
        num_items_in_batch); a label of -100, or one at or after padding, is not scored.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], or [B, past + T] where `past_key_values` has seen `past`
                columns; 0 marks padding, which may stand anywhere. With a non-empty cache, rows of
                new tokens that are padded run one after the other.
            past_key_values: a MetaStateCache to go on from. It then holds the state after input_ids
                (unless use_cache is False). One of one row is gone on from in every row. Gradients
                flow through it.
            inputs_embeds: refused.
            labels: [B, T] int64, the input_ids or -100; shifted here.
            use_cache: whether to return a cache; None: if one was given, and outside training.
            output_attentions: refused.
            output_hidden_states: whether to return what enters each block, [B, T, D] each, and
                what the head reads; zero at padding behind a cache.
            return_dict: False returns a tuple.
            logits_to_keep: make only the last so many logits, or those at these indices; 0: all.
            num_items_in_batch: what to divide the loss by, as transformers' Trainer asks.
            **kwargs: `position_ids` [B, T] of packed rows: a document starts at every 0, and
                positions count up from there. Nothing else, or it would be dropped silently.

        Raises:
            ConfigError: an argument is refused. ShapeError: tensors do not fit each other, or a row
            is padding alone. StateError: the cache is no MetaStateCache of this model and batch, or
            its columns had another mask.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ConfigError("this model takes input_ids; inputs_embeds are not supported")
        if input_ids.dim() != 2:
            raise ShapeError(f"input_ids must be [B, T]; got {list(input_ids.shape)}")
        if output_attentions or self.config.output_attentions:
            raise ConfigError("this model has no attention weights; leave output_attentions out")
        cache = past_key_values
        if cache is not None and not isinstance(cache, MetaStateCache):
            raise StateError(
                f"past_key_values is a {type(cache).__name__}; a MetaStateCache needed"
            )
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        mask = _mask(attention_mask, input_ids, cache)
        resets = _resets(kwargs.pop("position_ids", None), input_ids, mask)
        if unknown := [name for name, value in kwargs.items() if value is not None]:
            raise ConfigError(f"{unknown[0]!r} is no input of this model")

        state = None if cache is None else cache.state
        if state is not None and state.batch_size == 1 < len(input_ids):
            state = state.expand(len(input_ids))
        hidden, state, kl = self._features(
            input_ids, state, mask, resets, bool(output_hidden_states)
        )
        x = hidden[-1]
        loss = None
        if labels is not None:
            loss = self._loss(x, kl, labels, mask, num_items_in_batch)
        if isinstance(logits_to_keep, int):
            logits = self.model.head(x[:, -logits_to_keep:])
        else:
            logits = self.model.head(x[:, logits_to_keep])
        if use_cache:
            cache = MetaStateCache() if cache is None else cache
            cache.advance(state, input_ids.shape, mask)
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return out if return_dict else out.to_tuple()

    def _features(
        self,
        tokens: Tensor,
        state: ModelState | None,
        mask: Tensor | None,
        resets: Tensor | None,
        every: bool,
    ) -> tuple[list[Tensor], ModelState, Tensor | None]:
        """Return what `_run` does, padding skipped."""
        if mask is None:
            return self._run(tokens, state, resets, every)
        tokens = tokens.masked_fill(~mask, 0)  # padding may have any id
        resets = torch.zeros_like(mask) if resets is None else resets & mask
        if state is not None:
            return self._rows(tokens, state, mask, resets, every)
        if not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise ShapeError(f"row {row} of attention_mask is padding alone; a token is needed")
        config = self.model.config
        if config.architecture == "metastate" and config.meta_state.variational:
            # The KL term is a mean over all tokens that are run: none of them may be padding.
            return self._rows(tokens, None, mask, resets, every)
        # Move the padding of each row to its left and start a document at the first token.
        order = mask.int().argsort(dim=1, stable=True)
        resets = resets.gather(1, order)
        resets.scatter_(1, (~mask).sum(1, keepdim=True), True)
        hidden, state, kl = self._run(tokens.gather(1, order), None, resets, every)
        back = order.argsort(dim=1).unsqueeze(-1)
        return [x.take_along_dim(back, 1) for x in hidden], state, kl

    def _rows(
        self, tokens: Tensor, state: ModelState | None, mask: Tensor, resets: Tensor, every: bool
    ) -> tuple[list[Tensor], ModelState, Tensor | None]:
        """Return what `_run` does, row after row, without the padding (behind the state)."""
        if not self.model.recurrent:
            raise ConfigError(
                f"a {self.model.config.architecture} cannot skip padding behind a cache; give rows "
                "of equal length, or run them one by one"
            )
        if state is not None and state.batch_size != len(tokens):
            raise StateError(f"the cache has {state.batch_size} rows, input_ids {len(tokens)}")
        outputs, states, terms = [], [], []
        size = self.model.config.hidden_size
        for i, own in enumerate(mask):
            row = None if state is None else state[i]
            found = [self.model.ln_out.weight.new_zeros(1, 0, size)] * (
                self.model.config.num_layers + 1 if every else 1
            )
            if bool(own.any()):
                found, row, kl = self._run(tokens[i, own][None], row, resets[i, own][None], every)
                terms += [] if kl is None else [kl * own.sum()]
            assert row is not None
            states.append(row)
            at = own.nonzero().flatten()
            outputs.append([x.new_zeros(1, len(own), size).index_copy(1, at, x) for x in found])
        hidden = [torch.cat(rows) for rows in zip(*outputs, strict=True)]
        seen = (0 if state is None else state.tokens_seen) + tokens.shape[1]
        kl = torch.stack(terms).sum() / mask.sum() if terms else None
        return hidden, replace(ModelState.stack(states), tokens_seen=seen, extra={}), kl

    def _run(
        self, tokens: Tensor, state: ModelState | None, resets: Tensor | None, every: bool
    ) -> tuple[list[Tensor], ModelState, Tensor | None]:
        """Return what the head reads [B, T, D], before it the blocks' if `every`; state and KL."""
        entering: list[Tensor] = []
        hooks = []
        if every:
            hooks = [
                block.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
                for block in self.model.blocks
            ]
        try:
            x, state, kl = self.model.features(tokens, state, resets=resets)
        finally:
            for hook in hooks:
                hook.remove()
        return [*entering, x], state, kl

    def _loss(
        self,
        x: Tensor,
        kl: Tensor | None,
        labels: Tensor,
        mask: Tensor | None,
        num_items: int | Tensor | None,
    ) -> Tensor:
        size, head = self.model.config.vocab_size, self.model.head
        if labels.shape != x.shape[:2] or labels.dtype != torch.int64:
            raise ShapeError(
                f"labels must be int64 {list(x.shape[:2])}; got {labels.dtype} {list(labels.shape)}"
            )
        targets = labels[:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~(mask[:, :-1] & mask[:, 1:]), IGNORE)
        targets = F.pad(targets, (0, 1), value=IGNORE)
        scored = targets != IGNORE
        chosen = targets[scored]
        if not bool(((chosen >= 0) & (chosen < size)).all()):
            raise ShapeError(f"labels must be {IGNORE} or in 0..{size - 1}, the model's vocabulary")
        loss, _ = head_loss(head, x[scored], chosen)
        loss = loss if kl is None else loss + kl
        return loss if num_items is None else loss * (len(chosen) / num_items)


def _mask(given: Tensor | None, tokens: Tensor, cache: MetaStateCache | None) -> Tensor | None:
    """Return which of the new columns are tokens, [B, T] bool; None where all are."""
    if given is None:
        return None
    batch, length = tokens.shape
    past = 0 if cache is None else cache.length
    if given.shape not in {(batch, length), (batch, past + length)}:
        raise ShapeError(
            f"attention_mask must be {[batch, length]} or, with the {past} columns that the cache "
            f"has seen, {[batch, past + length]}; got {list(given.shape)}"
        )
    mask = given.bool()
    if cache is not None and mask.shape[1] > length:
        seen = torch.ones_like(mask[:, :past]) if cache.mask is None else cache.mask
        seen = seen.expand(batch, -1) if len(seen) == 1 else seen
        if not torch.equal(mask[:, :past], seen):
            raise StateError(
                "attention_mask hides other columns than it did when the cache read them; a state "
                "cannot forget single tokens: start without a cache"
            )
    mask = mask[:, -length:]
    return None if bool(mask.all()) else mask


def _resets(positions: Tensor | None, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return where documents start, [B, T] bool, from the `position_ids` of packed rows."""
    if positions is None:
        return None
    if positions.shape != tokens.shape:
        raise ShapeError(f"position_ids must be {list(tokens.shape)}; got {list(positions.shape)}")
    later, before = positions[:, 1:], positions[:, :-1]
    wrong = (later != 0) & (later != before + 1)
    if mask is not None:
        wrong = wrong & mask[:, 1:] & mask[:, :-1]
    if bool(wrong.any()):
        raise ConfigError(
            "position_ids must be 0 where a document starts and count up by 1 from there; other "
            "positions mean nothing to this model"
        )
    return positions == 0


def register() -> None:
    """Make transformers' Auto classes know our folders; importing this module does it."""
    AutoConfig.register(MODEL_TYPE, MetaStateConfig, exist_ok=True)
    AutoModelForCausalLM.register(MetaStateConfig, MetaStateForCausalLM, exist_ok=True)
    AutoTokenizer.register(
        MetaStateConfig, slow_tokenizer_class=MetaStateWorldTokenizer, exist_ok=True
    )


register()
