"""Decoding: rows of states that advance one token at a time, in place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from metastate import ops
from metastate.errors import ShapeError
from metastate.layers.channel_mix import ChannelMix
from metastate.layers.common import MATRIX, GroupNorm, LowRank, is_plain
from metastate.layers.meta_state import MetaState
from metastate.layers.surprise_memory import SurpriseMemory
from metastate.layers.time_mix import TimeMix
from metastate.model.block import RecurrentBlock
from metastate.model.lm import LanguageModel
from metastate.model.state import ModelState
from metastate.ops.threads import run_pieces

MATRICES = (torch.float32, torch.bfloat16)
GRAIN = 2**21  # bytes of weights a thread
# What the native kernels compute: these modules as they are written, with the eps that a norm has
# there, and no others.
KNOWN: dict[type[nn.Module], float | None] = {
    **dict.fromkeys((LanguageModel, RecurrentBlock, TimeMix, MetaState, ChannelMix, LowRank)),
    **dict.fromkeys((SurpriseMemory, nn.Embedding, nn.Linear, nn.ModuleList)),
    **{nn.LayerNorm: 1e-5, GroupNorm: 64e-5},
}
UNCAPTURED = 2  # steps that run kernel by kernel; they compile, and few tokens need no graph
_CAPTURING = threading.Lock()  # a process captures one graph at a time


def make_decoder(model: LanguageModel, rows: int) -> Decoder:
    """Return the fastest decoder of `model` here for up to `rows` texts at once."""
    kind = BatchDecoder if model.recurrent and model.embedding.weight.is_cuda else Decoder
    if runs_natively(model):
        kind = NativeDecoder
    # Whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        return kind(model, rows)


class Decoder:
    """Texts that advance together, one token each a step, through the model's own forward pass.

    Row by row, since a library's matrix products round a row differently in a batch: what a text
    becomes must not depend on its neighbours. Rows 0, 1, ... are in use. Subclasses are faster.
    """

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self.model = model
        self.states: list[ModelState] = [model.init_state(1)] * rows

    def put(self, row: int, state: ModelState) -> None:
        """Let `row` go on from `state`, one row of this model's, which is not changed.

        Raises:
            StateError: it is of another model, or of several rows.
        """
        state.check(self.model)
        state.check_single()
        self.states[row] = state

    def get(self, row: int) -> ModelState:
        """Return the state of `row`; later steps do not change it."""
        return self.states[row]

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Consume tokens[i] in row i; return logits [len(tokens), V], valid until the next step.

        Raises:
            ShapeError: there are none, more than rows, or ids that the model lacks.
        """
        logits, device = [], self.model.embedding.weight.device
        for row, x in enumerate(self._checked(tokens, len(self.states)).to(device)):
            y, self.states[row] = self.model(x.view(1, 1), self.states[row])
            logits.append(y[0, -1])
        return torch.stack(logits)

    def _checked(self, tokens: Sequence[int], rows: int) -> Tensor:
        """Return the tokens of a step, [n] int64 on the CPU; ShapeError as `step` says."""
        last = self.model.config.vocab_size - 1
        if not 1 <= len(tokens) <= rows or not 0 <= min(tokens) <= max(tokens) <= last:
            raise ShapeError(
                f"a step takes 1 to {rows} tokens, ids from 0 to {last}; got {list(tokens)!r:.80}"
            )
        return torch.tensor(tokens, dtype=torch.int64, device="cpu")


class BatchDecoder(Decoder):
    """All rows of a recurrent model in one forward pass, their states in one batch, in place.

    On a GPU the third step captures the pass as a CUDA graph and later ones replay it: one launch
    in place of hundreds. It always runs over all rows, so that a row's bits depend neither on what
    the others hold nor on how many are in use (but, as a library rounds another batch size in
    another order, on how many there are). The weights are those of now: training must not go on
    beside it.
    """

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self.model, self.tokens_seen = model, [0] * rows
        self.state = model.init_state(rows).map(
            lambda x: x.to(ops.state_dtype(x.dtype), copy=True).contiguous()
        )
        device = model.embedding.weight.device
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._in_use = torch.zeros(rows, dtype=torch.bool, device=device)
        self._run_pass, self._steps = self._pass, 0

    @torch.no_grad()
    def put(self, row: int, state: ModelState) -> None:
        """See Decoder.put."""
        state.check(self.model)
        state.check_single()
        self.tokens_seen[row] = state.tokens_seen
        for own, given in zip(self.state.parts, state.parts, strict=True):
            for name, x in vars(own).items():
                if x is not None:
                    x[row] = getattr(given, name)[0]

    def get(self, row: int) -> ModelState:
        """See Decoder.get."""
        return dataclasses.replace(self.state[row].clone(), tokens_seen=self.tokens_seen[row])

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """See Decoder.step."""
        rows = len(tokens)
        self._tokens[:rows, 0] = self._checked(tokens, len(self.tokens_seen))
        self._in_use[:rows], self._in_use[rows:] = True, False
        if self._steps == UNCAPTURED and self._tokens.device.type == "cuda":
            self._run_pass = self._captured()
        self._steps += 1
        logits = self._run_pass()
        for row in range(rows):
            self.tokens_seen[row] += 1
        return logits[:rows]

    def _pass(self) -> Tensor:
        """Let the rows in use consume their tokens; return the logits of all."""
        logits, new = self.model(self._tokens, self.state)
        for own, after in zip(self.state.parts, new.parts, strict=True):
            for name, x in vars(own).items():
                if x is not None:
                    in_use = self._in_use.view(-1, *[1] * (x.dim() - 1))
                    x.copy_(torch.where(in_use, getattr(after, name), x))
        return logits[:, -1]

    def _captured(self) -> Callable[[], Tensor]:
        """Return what replays `_pass`, the same kernels on the same memory; itself if it cannot."""
        device, kind = self._tokens.device, self._tokens.device.type
        graph = torch.cuda.CUDAGraph()
        try:
            with contextlib.ExitStack() as held:
                held.enter_context(_CAPTURING)
                held.enter_context(torch.cuda.device(device))
                held.enter_context(torch.cuda.stream(torch.cuda.current_stream()))  # put back
                # Autocast's cache of weights would not outlive this call; the graph would read on.
                dtype, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
                held.enter_context(torch.autocast(kind, dtype, enabled=on, cache_enabled=False))
                stream = torch.cuda.Stream(device)  # else that of the first device that captured
                # Other threads may copy states meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    logits = self._pass()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"decoding kernel by kernel: no CUDA graph ({reason})", stacklevel=2)
            return self._pass
        # The graph reads their memory, also when the model has been given others.
        self._kept = [x.detach() for x in (*self.model.parameters(), *self.model.buffers())]

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


class NativeDecoder(BatchDecoder):
    """All rows in one native call a token (ops/decode_kernels.py), their states in one batch.

    The weights are those of now: training must not go on beside it.
    """

    def __init__(self, model: LanguageModel, rows: int) -> None:
        from metastate.ops import decode_kernels as kernels

        self.model, self.ln0 = model, copy.deepcopy(model.ln0).float()
        self.tokens_seen = [0] * rows
        self.state = model.init_state(rows).map(lambda x: x.float().contiguous().clone())
        config = model.config
        blocks = cast(list[RecurrentBlock], list(model.blocks))
        mix, last = blocks[0].time_mix, blocks[-1]
        D, H, N = config.hidden_size, config.num_heads, config.attention_size // config.num_heads
        hidden = [block.channel_mix.key.out_features for block in blocks if block.channel_mix]
        F = max(hidden, default=0)
        low_ranks = (mix.decay, mix.icl_rate, last.time_mix.value_mix, mix.gate)
        ranks = [0 if x is None else x.A.shape[1] for x in low_ranks]
        self._kept: list[Tensor] = []  # what the addresses point to
        dtype = model.head.weight.dtype
        fields: list[dict[str, Tensor]] = []
        firsts = []  # where each block begins in the table
        for block, state in zip(blocks, self.state.layers, strict=True):
            firsts.append(len(fields))
            fields += self._layers(block, state, dtype)
        names = kernels.LAYER_FIELDS
        table = [[self._address(layer.get(name)) for name in names] for layer in fields]
        self._tokens = torch.zeros(rows, dtype=torch.int64, device="cpu")
        own = self._ends()
        ends = [own.get(name) for name in kernels.ENDS]
        sizes = kernels.buffer_sizes(D, H * N, F, config.vocab_size, ranks)
        kind: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever PyTorch's defaults are
        buffers = [torch.zeros(rows * size, **kind) for size in sizes]
        self.x, self.logits = buffers[kernels.X].view(rows, D), buffers[kernels.LOGITS]
        options, is_meta = config.meta_state, config.architecture == "metastate"
        flags = (
            kernels.META_STATE * is_meta
            + kernels.BY_RECEPTANCE * (is_meta and options.encoder_query == "receptance")
            + kernels.READS_ENCODING * (options.readout != "meta")
            + kernels.HAS_M * (options.readout != "encoding")
        )
        L = len(fields)
        self._counters = np.zeros(
            (L * kernels.NUM_PHASES + kernels.NUM_ENDS) * 2 * kernels.LINE, np.int64
        )
        arrays = (table, [self._address(x) for x in ends], [self._address(x) for x in buffers])
        self._arguments: tuple[Any, ...] = (
            *(np.array(x, np.int64) for x in arrays),
            *(self._counters, np.array(ranks, np.int64)),
            *(L, D, H, N, F, config.vocab_size, dtype.itemsize, flags, config.memory_heads or 0),
            L if config.memory_layer is None else firsts[config.memory_layer],
        )
        # Below a few MiB of weights a second thread takes longer to wake than to help.
        self._work = 1 + sum(x.nbytes for x in self._kept) // GRAIN
        self._token = kernels.token
        self._run(0)  # compile now, not while somebody waits for a token

    def _address(self, x: Tensor | None) -> int:
        if x is None:
            return 0
        x = x.detach().contiguous()
        self._kept.append(x)
        return x.data_ptr()

    def _ends(self) -> dict[str, Tensor]:
        """Return what comes after the blocks, by the kernel's names."""
        model, ln_out = self.model, self.model.ln_out
        own = {"ln_out_weight": ln_out.weight.float(), "ln_out_bias": ln_out.bias.float()}
        own["head"] = model.head.weight.data
        memory, state = model.surprise_memory, self.state.memory
        if memory is not None and state is not None:
            named = memory.named_parameters()
            own |= {name.replace(".", "_"): p.float() for name, p in named}
            own |= {"decay": memory.log_w().exp(), "rate": memory.rate.float().sigmoid()}
            own |= vars(state) | {"tokens": self._tokens}
        return own

    def _layers(
        self, block: RecurrentBlock, state: Any, dtype: torch.dtype
    ) -> list[dict[str, Any]]:
        """Return a block's tensors by the kernel's names: matrices in `dtype`, vectors float32.

        A feed-forward layer after the Meta-State layer is a row of its own, without time mixing.
        """
        mix, channels, meta = block.time_mix, block.channel_mix, block.meta_state
        vectors = {
            "ln1_weight": block.ln1.weight,
            "ln1_bias": block.ln1.bias,
            "mu": mix.mu,
            "w0": mix.decay.bias,
            "a0": mix.icl_rate.bias,
            "k_k": mix.k_k,
            "k_a": mix.k_a,
            "r_k": mix.r_k,
            "norm_weight": mix.norm.weight,
            "norm_bias": mix.norm.bias,
            "ln2_weight": block.ln2.weight,
            "ln2_bias": block.ln2.bias,
        }
        matrices = {
            "receptance": mix.receptance.weight,
            "key": mix.key.weight,
            "value": mix.value.weight,
            "output": mix.output.weight,
        }
        for name in ("decay", "icl_rate", "value_mix", "gate"):
            low_rank = getattr(mix, name)
            if low_rank is not None:
                matrices |= {f"{name}_A": low_rank.A.T, f"{name}_B": low_rank.B.T}
        if mix.value_mix is not None:
            vectors["v0"] = mix.value_mix.bias
        if meta is not None:
            matrices["meta_output"] = meta.output.weight
            for name, norm in (("encoding", meta.encoding_norm), ("meta", meta.meta_norm)):
                if norm is not None:
                    vectors |= {f"{name}_weight": norm.weight, f"{name}_bias": norm.bias}
        rows = [(vectors, matrices, vars(state))]
        if block.ln3 is not None:
            normed = {"ln2_weight": block.ln3.weight, "ln2_bias": block.ln3.bias}
            rows.append((normed, {}, {"channel_shift": state.channel_shift}))
        if channels is not None:
            rows[-1][0]["mu2"] = channels.mu
            rows[-1][1].update(hidden_key=channels.key.weight, hidden_value=channels.value.weight)
        return [
            {name: x.float() for name, x in vectors.items()}
            | {name: x.to(dtype) for name, x in matrices.items()}
            | tensors
            for vectors, matrices, tensors in rows
        ]

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """See Decoder.step."""
        rows, model = len(tokens), self.model
        self._tokens[:rows] = self._checked(tokens, len(self.tokens_seen))
        self.x[:rows] = self.ln0(model.embedding(self._tokens[:rows]).float())
        self._run(rows)
        for row in range(rows):
            self.tokens_seen[row] += 1
        return self.logits[: rows * model.config.vocab_size].view(rows, -1)

    def _run(self, rows: int) -> None:
        self._counters.fill(0)
        threads = min(torch.get_num_threads(), self._work)
        run_pieces(self._token, [(*self._arguments, rows)] * threads, threads)


def store_bfloat16(model: LanguageModel) -> None:
    """Store the matrices in bfloat16, vectors and embedding as they are: half the bytes a token.

    Decoding then widens them and computes in float32; reading a prompt multiplies in bfloat16.
    The model can no longer train.
    """
    groups = model.optimizer_groups()
    for name, p in model.named_parameters():
        if groups[name] == MATRIX and p is not model.embedding.weight:
            p.requires_grad_(False)
            p.data = p.data.bfloat16()


def _is_as_written(module: nn.Module) -> bool:
    eps = KNOWN.get(type(module))
    affine = not isinstance(module, nn.LayerNorm) or isinstance(module.bias, Tensor)
    known = type(module) in KNOWN and eps == getattr(module, "eps", None)
    return known and affine and is_plain(module)


def runs_natively(model: LanguageModel) -> bool:
    """Say whether NativeDecoder serves `model`: the common options of a recurrent one, on a CPU.

    It calls no module, so one of another class (an adapter, a parametrization), with a hook or with
    a `forward` of its own is left to the forward pass.
    """
    config, weight = model.config, model.embedding.weight
    if (
        not all(map(_is_as_written, model.modules()))
        or not model.recurrent
        or weight.device.type != "cpu"
        or ops.resolve_backend(model.backend, weight.device) != "cpu"
        or os.name != "posix"
        or model.head.weight.dtype not in MATRICES
        or len(config.head_segments or ()) != 1
    ):
        return False
    if config.architecture == "rwkv7":
        return True
    options = config.meta_state
    needed = {
        "modulation": "input",
        "update": "delta",
        "query": "input",
        "encoding_norm": "l2",
        "output_norm": "group",
        "read": "key",
        "encoder_size": None,
        "encoder": "self_state",
        "activation": "none",
        "gate": False,
        "token_shift": False,
    }
    same_width = config.attention_size == config.hidden_size  # so every head has its own slice
    return same_width and all(getattr(options, k) == v for k, v in needed.items())
