"""The language model: embedding, blocks, head; one forward for training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metastate import ops
from metastate.config import ATTENTION, ModelConfig
from metastate.errors import ConfigError, ShapeError, StateError
from metastate.layers.attention import Sight
from metastate.layers.common import Growth, Packing, declared_groups, is_plain, linear, normal_
from metastate.layers.surprise_memory import MemoryState, SurpriseMemory
from metastate.model.block import RecurrentBlock, TransformerBlock
from metastate.model.state import ModelState


class LanguageModel(nn.Module):
    """A causal language model of any of our architectures, fixed by its ModelConfig.

    x = embedding(tokens) (then ln0 in the recurrent ones);  x = block(x), L times;
    logits = head(ln_out(x));  a surprise memory corrects what enters a block, or the head

    Attributes:
        config: the ModelConfig.
        backend: of metastate.ops, "auto" unless set.
        activation_checkpointing: recompute each block in the backward pass instead of keeping it.
        lineage: how this model grew, oldest growth first: sizes, `step` at that time, hashes of the
            weights before (`parent`) and after (`child`), and the config `before`.
        step: optimizer updates that metastate.train made, those of its parents included; those of
            another training loop do not count.
        tokenizer_info: what metastate.data.tokenizer needs to rebuild its tokenizer, or None.
        stored: its tensors as the file that it was loaded from has them, or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = "auto"
        self.activation_checkpointing = False
        self.lineage: list[dict[str, Any]] = []
        self.step = 0
        self.tokenizer_info: dict[str, Any] | None = None
        self.stored: dict[str, Tensor] | None = None
        self._empty: dict[torch.dtype, ModelState] = {}
        D, V = config.hidden_size, config.vocab_size
        self.recurrent = config.architecture not in ATTENTION
        self.embedding = nn.Embedding.from_pretrained(torch.empty(V, D), freeze=False)
        if self.recurrent:
            nn.init.uniform_(self.embedding.weight, -1e-4, 1e-4)
            self.head = linear(D, V, 0.5 * max(1.0, V / D) ** 0.5)
            self.ln0: nn.Module = nn.LayerNorm(D)
            blocks: list[nn.Module] = [RecurrentBlock(config, i) for i in range(config.num_layers)]
        else:
            normal_(self.embedding.weight, 0.02)
            self.head = nn.Linear(D, V, bias=False)
            normal_(self.head.weight, 0.02)
            blocks = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = nn.LayerNorm(D)
        self.surprise_memory = SurpriseMemory(config) if config.memory_heads else None

    def init_state(self, batch_size: int) -> ModelState:
        """Return the detached state before the first token for `batch_size` rows."""
        if batch_size < 1:
            raise ShapeError(f"batch_size is {batch_size}; at least 1 is needed")
        layers = tuple(block.init_state(batch_size) for block in self.blocks)  # type: ignore[operator]
        memory = self.surprise_memory
        return ModelState(
            layers, memory=None if memory is None else memory.init_state(batch_size)
        ).detach()

    @property
    def empty_state(self) -> ModelState:
        """One row's state on the meta device: what every state of this model must look like."""
        dtype = next(self.blocks[0].parameters()).dtype  # which states follow
        if dtype not in self._empty:
            self._empty[dtype] = self.init_state(1).to("meta")
        return self._empty[dtype]

    def features(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        resets: Tensor | None = None,
        start: ModelState | None = None,
        group: dist.ProcessGroup | None = None,
        state_only: bool = False,
    ) -> tuple[Tensor, ModelState, Tensor | None]:
        """Run everything but the head.

        Args:
            tokens: [B, T] int64 ids below the vocabulary size.
            state: what came before, from `init_state` or an earlier call; None means nothing. It is
                not changed. Gradients flow through it unless it was detached.
            resets: [B, T] bool, True where a document starts: the state returns to its start there.
            start: one row to start from in place of `init_state`: where there is no state, and, S
                and M of it, at every reset. Gradients flow through it. For recurrent models.
            group: the ranks that share the rows: each gives T tokens of them, in the order of the
                ranks, and all call this together. `state` is then the same on every rank, and the
                state returned is the one after this rank's tokens.
            state_only: only the state of the results is of use: leave out what it does not depend
                on, as the last block's feed-forward layer where no surprise memory follows.

        Returns:
            ln_out(x) [B, T, D], corrected where a surprise memory stands there, the state after the
            last token, and the KL term of variational encoders, weighted, or None.

        Raises:
            ShapeError: tokens or resets have the wrong shape, dtype or range.
            StateError: the state is of another model or batch size, or `start` not of one row.
            ConfigError: a `group` for a model that is not recurrent; a surprise memory beside a
                head that is no plain nn.Linear.
        """
        self._check_tokens(tokens, resets)
        batch, length = tokens.shape
        if start is not None:
            if not self.recurrent:
                raise StateError("only a recurrent model can start from a state other than its own")
            if not torch.compiler.is_compiling():
                start.check(self)
            first = start.expand(batch)  # refused where it is not one row
            state = first if state is None else state
        if state is not None and not torch.compiler.is_compiling():
            state.check(self)
            if state.batch_size != batch:
                raise StateError(
                    f"the state holds {state.batch_size} rows, the tokens have {batch}; take rows "
                    "of it with state[i]"
                )
        before = [None] * len(self.blocks) if state is None else state.layers
        x = self.embedding(tokens)
        kl: Tensor | None = None
        layers: list[Any] = []
        last, memory = len(self.blocks) - 1, self.surprise_memory
        place = None if memory is None else self.config.memory_layer
        before_head = memory is not None and place is None
        state_only = state_only and not before_head
        if group is not None and not self.recurrent:
            raise ConfigError(
                "only a recurrent model can hand on its state; a transformer's sequences cannot be "
                "split over processes here"
            )
        packing = None
        if (self.recurrent or memory is not None) and (resets is not None or group is not None):
            resets = tokens.new_zeros(tokens.shape, dtype=torch.bool) if resets is None else resets
            packing = Packing.from_resets(resets, group)
        after: MemoryState | None = None
        if self.recurrent:
            assert self.config.head_size is not None
            backend = ops.resolve_backend(self.backend, tokens.device, self.config.head_size)
            x, v_first = self.ln0(x), None
            for i, (block, old) in enumerate(zip(self.blocks, before, strict=True)):
                if packing is not None and start is not None:
                    packing = replace(packing, start=start.layers[i])  # type: ignore[arg-type]
                if i == place:
                    x, after = self._remember(x, tokens, packing, state, start)
                args = (x, old, v_first, packing, backend, state_only and i == last)
                x, new, v_first, term = self._run(block, *args)
                layers.append(new)
                if term is not None:
                    kl = term if kl is None else kl + term
        else:
            sight = Sight.of(length, before[0], resets, tokens.device)  # type: ignore[arg-type]
            for i, (block, old) in enumerate(zip(self.blocks, before, strict=True)):
                if i == place:
                    x, after = self._remember(x, tokens, packing, state, start)
                x, new = self._run(block, x, old, sight, state_only and i == last)
                layers.append(new)
        seen = 0 if state is None else state.tokens_seen
        if kl is not None:
            kl = kl * self.config.meta_state.kl_weight
        h = self.ln_out(x)
        if before_head:
            h, after = self._remember(h, tokens, packing, state, start)
        return h, ModelState(tuple(layers), seen + length, memory=after), kl

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        resets: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Return logits [B, T, V] and the state after the last token; arguments as `features`."""
        x, state, _ = self.features(tokens, state, resets=resets, group=group)
        return self.head(x), state

    def read(self, tokens: Tensor, state: ModelState | None = None) -> ModelState:
        """Return the state after the tokens, as `features` does, without what it does not need."""
        return self.features(tokens, state, state_only=True)[1]

    def _remember(
        self, u: Tensor, tokens: Tensor, packing: Packing | None, *states: ModelState | None
    ) -> tuple[Tensor, MemoryState]:
        """Return u corrected by the surprise memory; `states` are the one before and the start."""
        memory = self.surprise_memory
        assert memory is not None
        if type(self.head) is not nn.Linear or not is_plain(self.head):
            raise ConfigError(
                "a surprise memory reads the weights of the head, and this head is not a plain "
                "one (an adapter, quantised, elsewhere, a bias, a hook); merge or remove that"
            )
        backend = ops.resolve_backend(self.backend, tokens.device, memory.head_size)
        own, fresh = (None if s is None else s.memory for s in states)
        return self._run(memory, u, tokens, self.head.weight, own, packing, fresh, backend)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _check_tokens(self, tokens: Tensor, resets: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise ShapeError(
                f"tokens must be int64 [B, T], B and T at least 1; got {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        if resets is not None and (resets.shape != tokens.shape or resets.dtype != torch.bool):
            raise ShapeError(
                f"resets must be bool {list(tokens.shape)}; got {resets.dtype} {list(resets.shape)}"
            )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                raise ShapeError(
                    f"token ids run from {int(low)} to {int(high)}, the vocabulary from 0 to "
                    f"{self.config.vocab_size - 1}; use the model's own tokenizer"
                )

    def optimizer_groups(self) -> dict[str, str]:
        """Return the optimizer group of each parameter: MATRIX, VECTOR or DECAY_BASE.

        What a layer says of a parameter counts before what the layers say that it is made of.
        """
        groups: dict[str, str] = {}
        for path, module in self.named_modules():
            for name, group in declared_groups(module).items():
                groups.setdefault(f"{path}.{name}", group)
        return {name: groups[name] for name, _ in self.named_parameters() if name in groups}

    def growth_axes(self) -> dict[str, Growth]:
        """Return the axes that growth lengthens and the rule of new entries, by parameter."""
        names = {name for name, _ in self.named_parameters()}
        declared = {
            f"{path}.{name}": axes
            for path, module in self.named_modules()
            for name, axes in getattr(module, "GROWS", {}).items()
        }
        return {name: axes for name, axes in declared.items() if name in names}

    def count_parameters(self) -> dict[str, int]:
        """Return parameters by part, `total`, and `non_embedding` (the head left out too)."""
        counts: dict[str, int] = {}
        for name, p in self.named_parameters():
            pieces = name.split(".")
            part = pieces[2] if pieces[0] == "blocks" else pieces[0]
            part = "norms" if part.startswith("ln") else part
            counts[part] = counts.get(part, 0) + p.numel()
        total = sum(counts.values())
        inner = total - counts["embedding"] - counts["head"]
        return counts | {"total": total, "non_embedding": inner}

    def flops_per_token(self, context: int) -> tuple[int, int]:
        """Return (forward, backward) FLOPs a token in training at length `context`.

        Matrix products count 2 a weight forward and 4 backward. An N x N state costs, a head and
        token, 10 N^2 for the recurrence (2 N^2 each for removal read, decay, two rank-1 writes and
        read, though the decay adds nothing) and 2 N^2 for another reader, 26 N^2 and 10 N^2
        backward, of both 6 N^2 to make S again, which no backend here keeps. Attention costs 4 D a
        visible key forward (8 backward), (T + 1) / 2 keys on average. A surprise memory is one such
        recurrence. Elementwise work, and what else is computed again to save memory, is left out.
        """
        config = self.config
        matrices = sum(p.numel() * self._products(n, p) for n, p in self.named_parameters())
        forward, backward = 2 * matrices, 4 * matrices
        if config.memory_heads:
            own = config.hidden_size**2 // config.memory_heads
            forward, backward = forward + 10 * own, backward + 26 * own
        if not self.recurrent:
            attention = int(4 * config.attention_size * (context + 1) / 2) * config.num_layers
            return forward + attention, backward + 2 * attention
        assert config.head_size is not None
        unit = config.num_heads * config.head_size**2
        writers, readers = config.num_layers, 0
        for layer in range(config.num_layers):
            if config.second_layers(layer)[0]:
                readers += 1
                writers += config.meta_state.readout != "encoding"
        forward += (10 * writers + 2 * readers) * unit
        backward += (26 * writers + 10 * readers) * unit
        return forward, backward

    def _products(self, name: str, p: Tensor) -> int:
        """Return in how many matrix products of a token the parameter is a factor."""
        no_factor = (".mu", ".r_k", ".token_keys", ".token_values")
        if p.dim() < 2 or name == "embedding.weight" or name.endswith(no_factor):
            return 0
        if name.endswith(".receptance.weight"):
            reads_twice = self.config.second_layers(int(name.split(".")[1]))[0]
            return 2 if reads_twice and self.config.meta_state.asks_by_receptance else 1
        return self.config.num_heads if name.endswith(".projection") else 1

    def state_bytes(self, batch_size: int = 1, tokens: int = 0) -> int:
        """Return the bytes of the state after `tokens` tokens; constant in a recurrent model."""
        if self.recurrent:
            return self.init_state(batch_size).num_bytes
        config, size = self.config, self.embedding.weight.element_size()
        cache = 2 * config.num_layers * config.attention_size * size * batch_size * tokens
        memory = self.surprise_memory
        return cache + (0 if memory is None else memory.init_state(batch_size).num_bytes)


def ask_as(model: LanguageModel, grown: LanguageModel) -> None:
    """Ask gradients of the parameters of `grown` as of those of `model` that have their names."""
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in grown.named_parameters():
        p.requires_grad_(asked.get(name, True))


def sketch(config: ModelConfig) -> LanguageModel:
    """Return the model of `config` on the meta device, without memory for its values."""
    with torch.device("meta"):
        return LanguageModel(config)


def arithmetic(device: torch.device | str, dtype: str) -> torch.autocast:
    """Return the context in which a model runs whose products are in `dtype`: autocast or nothing.

    bfloat16 is of the matrix products alone, the weights stay as they are; the other names do
    nothing here.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and then every module of it back in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
