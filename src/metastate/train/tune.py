"""State tuning: the weights stay as they are, the state that documents start from is trained."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from metastate.config import TrainConfig
from metastate.data.files import alone_in, write_tensors
from metastate.data.loader import BatchSource, PreparedData
from metastate.errors import CheckpointError, ConfigError, DivergedError, TrainingError
from metastate.layers.common import VECTOR, RecurrentState
from metastate.mapping import from_dict, to_dict
from metastate.model.lm import LanguageModel, arithmetic, evaluating
from metastate.model.loss import IGNORE, lm_loss
from metastate.model.state import ModelState
from metastate.model.state_file import StateFile, config_hash
from metastate.model.weights import weights_hash
from metastate.train.checkpoint import TrainerState, check_same_run, continued
from metastate.train.optim import (
    adopt_moments,
    learning_rate,
    make_optimizer,
    moments,
)
from metastate.train.signals import signals
from metastate.train.trainer import TrainResult

FORMAT, VERSION = "metastate-tuning", 1
WHAT = ("tokens", "state")
# model, start -> what eval.loss says of held-out text
Score = Callable[[LanguageModel, ModelState | None], dict[str, Any]]


class Start(nn.Module):
    """What is trained: the state before the first token, of one row.

    tokens  S = S_0 + V_P^T K_P a layer and head, S_0 the model's own; V_P = 0 and K_P random at
            first, so that tuning begins with what the model does
    state   S itself, from S_0 on, and M (from 0) where the model has one

    The last inputs that the token shifts know stay zero, as they do at every start of a document.
    """

    def __init__(self, model: LanguageModel, what: str, parameter_tokens: int, seed: int) -> None:
        super().__init__()
        if what not in WHAT:
            raise ConfigError(f"what is {what!r}; allowed: {', '.join(WHAT)}")
        if what == "tokens" and parameter_tokens < 1:
            raise ConfigError(f"parameter_tokens is {parameter_tokens}; 1 or more")
        if not model.recurrent:
            raise ConfigError(
                f"a {model.config.architecture} has no state to tune; tuning needs a recurrent "
                "model (metastate, rwkv7)"
            )
        self.base = model.init_state(1)
        self.what, self.parameter_tokens = what, parameter_tokens if what == "tokens" else 0
        generator = torch.Generator().manual_seed(seed)
        for i, layer in enumerate(self.base.layers):
            assert isinstance(layer, RecurrentState)
            S = layer.S
            if what == "state":
                own: dict[str, Tensor | None] = {"S": S, "M": layer.M}
            else:
                shape = (S.shape[1], parameter_tokens, S.shape[3])
                keys = torch.randn(shape, generator=generator) * S.shape[3] ** -0.5
                own = {"token_keys": keys.to(S), "token_values": S.new_zeros(shape)}
            for name, x in own.items():
                if x is not None:
                    self.register_parameter(f"layers:{i}:{name}", nn.Parameter(x.clone()))

    def forward(self) -> ModelState:
        """Return the state, one row that has seen nothing; gradients flow to the parameters."""
        layers = []
        for i, layer in enumerate(self.base.layers):
            assert isinstance(layer, RecurrentState)
            own: dict[str, Tensor] = {
                name.rpartition(":")[2]: p
                for name, p in self.named_parameters()
                if name.startswith(f"layers:{i}:")
            }
            if self.what == "tokens":
                with torch.autocast(layer.S.device.type, enabled=False):  # never rounded
                    own = {"S": layer.S + own["token_values"].mT @ own["token_keys"]}
            layers.append(replace(layer, **own))
        return replace(self.base, layers=tuple(layers))

    def file(self, model: LanguageModel, extra: dict[str, str]) -> StateFile:
        """Return what to save: the factors, a few kilobytes, or the whole state."""
        tensors = self().tensors()
        if self.what == "tokens":
            tensors = {name.replace(":", "."): p for name, p in self.named_parameters()}
        config = model.config
        hashes = (config_hash(config), weights_hash(model))
        return StateFile(tensors, 0, config.architecture, *hashes, extra)

    def optimizer_groups(self) -> dict[str, str]:
        """Return the optimizer group of each parameter: nothing is decayed."""
        return {name: VECTOR for name, _ in self.named_parameters()}


@dataclass(frozen=True)
class TuneResult(TrainResult):
    """How tuning ended; `out` is the file of the state of the best validation.

    Attributes:
        before: held-out loss from the model's own start, None without validation.
        file_bytes: size of the file.
    """

    before: float | None
    file_bytes: int


def tune(
    model: LanguageModel,
    config: TrainConfig,
    *,
    what: str = "tokens",
    parameter_tokens: int = 4,
    evaluate: Score | None = None,
    progress: Callable[..., None] | None = None,
    resume: bool = False,
) -> TuneResult:
    """Train the state that documents start from; no weight of `model` changes.

    The file config.out holds the state of the best validation so far (of the end, where there is
    none); `<out>.tuning` beside it, all that going on exactly needs, until the last step is made.
    The first SIGINT, SIGTERM or SIGHUP finishes the step and writes both.

    Args:
        model: recurrent, on its device and in its number format.
        config: data, out, steps, batch_size, context, accumulate, lr and its schedule, Adam's
            settings, clip, z_loss, seed, dtype, valid_every and checkpoint_every are used.
        what: "tokens" or "state", see `Start`.
        parameter_tokens: P, pairs a layer and head.
        evaluate: scores a model on held-out text from a start; `eval.loss.held_out` makes one.
        progress: called as progress(step, steps, loss=...) after every step.
        resume: go on from `<out>.tuning`.

    Raises:
        ConfigError: a setting is impossible, or config.out does not fit `resume`.
        BusyError: another process tunes config.out.
        DataError: the data is missing, broken, too short or of another vocabulary.
        CheckpointError: the file to go on from is damaged or of another model.
        TrainingError, StateError: the loss or a gradient is not finite (DivergedError); the disk is
            full.

    Source: initial states as prompts, as in RWKV's state tuning; parameter tokens: Meta-State,
    arXiv:2504.08247, section 3.
    """
    run = _Tuning(model, config, Start(model, what, parameter_tokens, config.seed), evaluate)
    with alone_in(run.out.with_name(f".{run.out.name}.lock")):  # other files there may be others'
        if resume and run.out.exists() and not run.kept.exists():
            raise ConfigError(
                f"the tuning of {run.out} has come to its end; for another one choose another --out"
            )
        if resume:
            run.restore()
        elif run.kept.exists():
            raise ConfigError(f"{run.kept} exists: go on with --resume, or choose another --out")
        elif run.out.exists():
            raise ConfigError(f"{run.out} exists already; choose another --out")
        with _frozen(model), signals(run.interrupt):
            return run.loop(progress)


class _Tuning:
    """One call of `tune`."""

    def __init__(
        self, model: LanguageModel, config: TrainConfig, start: Start, evaluate: Score | None
    ) -> None:
        if not config.out:
            raise ConfigError("out is missing; name a file for the state")
        if config.growth or config.carry_state:
            raise ConfigError("growth and carry_state have no meaning in state tuning")
        data = PreparedData.open(config.data)
        data.check_vocab(model.config.vocab_size, model.tokenizer_info)
        self.model, self.config, self.evaluate = model, config, evaluate
        self.source = BatchSource(
            data.split("train"), config.batch_size, config.context, config.seed
        )
        self.out = Path(config.out)
        self.kept = self.out.with_name(self.out.name + ".tuning")
        self.start = start
        self.optimizer = make_optimizer(start, config)  # type: ignore[arg-type]
        self.at = TrainerState(step=0, tokens=0, config=config, data=data.fingerprint)
        self.before: float | None = None
        self.loss: float | None = None
        self.signal: int | None = None

    def interrupt(self, number: int) -> None:
        """Note that a signal came; the loop ends after the step."""
        self.signal = number

    def loop(self, progress: Callable[..., None] | None) -> TuneResult:
        """Make the steps that are left."""
        config, shown = self.config, {}
        if self.evaluate is not None and self.before is None:
            self.before = self.score(None)
        if self.at.step < config.steps and not self.kept.exists():
            self.save()  # a state without it is one that came to its end
        while self.at.step < config.steps and self.signal is None:
            self.update()
            done, last = self.at.step, self.at.step == config.steps
            if self.evaluate is not None and (last or done % config.valid_every == 0):
                loss = self.score(self.start())
                shown = {"held_out": f"{loss:.4f}"}
                if loss < (math.inf if self.at.best_loss is None else self.at.best_loss):
                    self.at = replace(self.at, best_step=done, best_loss=loss)
                    self.write()
            if progress is not None:
                progress(done, config.steps, loss=f"{self.loss:.4f}", **shown)
            if not last and done % config.checkpoint_every == 0:
                self.save()
        at, complete = self.at, self.at.step >= config.steps
        if at.best_step is None:
            self.write()
        if not complete:
            self.save()
        try:
            file_bytes = self.out.stat().st_size
        except OSError as cause:
            raise TrainingError(f"{self.out} is gone, deleted while this ran ({cause})") from None
        result = TuneResult(
            self.out,
            at.step,
            at.tokens,
            self.loss,
            at.best_loss,
            at.best_step,
            None if complete else self.signal,
            self.signal,
            self.before,
            file_bytes,
        )
        if complete:  # and the state is in its file
            with contextlib.suppress(OSError):
                self.kept.unlink(missing_ok=True)
        return result

    def update(self) -> None:
        """Make one optimizer step of `accumulate` batches."""
        config, step = self.config, self.at.step
        first = step * config.accumulate
        batches = [self.source.batch(first + i) for i in range(config.accumulate)]
        counts = [int((b.targets != IGNORE).sum()) for b in batches]
        device = next(self.model.parameters()).device
        nats = 0.0
        for batch, count in zip(batches, counts, strict=True):
            with arithmetic(device, config.dtype):
                out = lm_loss(
                    self.model,
                    batch.tokens.to(device),
                    batch.targets.to(device),
                    resets=batch.resets.to(device) if config.document_reset else None,
                    start=self.start(),
                    z_loss=config.z_loss,
                )
            (out.loss * (count / sum(counts))).backward()
            nats += float(out.nll) * count
        parameters, norm = self.optimizer.gather()
        self.loss = nats / sum(counts)
        if not (math.isfinite(self.loss) and math.isfinite(float(norm))):
            raise DivergedError(
                f"step {step + 1}: the loss is {self.loss:.4g}, the gradient's norm "
                f"{float(norm):.4g}; what was written before is whole. --resume would make the "
                "same steps again; start anew with another --out and a lower --lr"
            )
        self.optimizer.advance(parameters, norm, config.clip, learning_rate(step, config))
        tokens = self.at.tokens + sum(b.tokens.numel() for b in batches)
        self.at = replace(self.at, step=step + 1, tokens=tokens)

    def score(self, start: ModelState | None) -> float:
        """Return the held-out loss from a start, None for the model's own."""
        assert self.evaluate is not None
        device = next(self.model.parameters()).device
        with torch.no_grad(), arithmetic(device, self.config.dtype):
            return float(self.evaluate(self.model, start)["nats_per_token"])

    def write(self) -> None:
        """Write the state file."""
        note = {
            "data": self.config.data,
            "steps": self.at.step,
            "nats_per_token": [self.before, self.at.best_loss],
        }
        self.start.file(self.model, {"tuning": json.dumps(note)}).write(self.out)

    def save(self) -> None:
        """Write all that going on needs."""
        tensors = moments(self.optimizer)
        tensors |= {f"parameter:{name}": p for name, p in self.start.named_parameters()}
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "trainer": json.dumps(to_dict(self.at)),
            "what": self.start.what,
            "number": str(self.start.parameter_tokens),
            "weights": weights_hash(self.model),
            "before": json.dumps(self.before),
        }
        write_tensors(self.kept, tensors, header)

    def restore(self) -> None:
        """Go back to where the file that `save` wrote says.

        Raises:
            ConfigError: there is none, it was made with other settings, or the state that it goes
                with is gone.
            CheckpointError: it is damaged, newer than this program, or of another model.
        """
        header, tensors = read_kept(self.kept)
        try:
            at = from_dict(TrainerState, json.loads(header["trainer"]), "trainer")
            what, number, weights = header["what"], int(header["number"]), header["weights"]
            before = json.loads(header["before"])
        except (KeyError, ValueError, TypeError, RecursionError, ConfigError) as cause:
            raise CheckpointError(f"{self.kept} is broken ({cause}); delete it") from None
        data = PreparedData.open(self.config.data)
        check_same_run(at, self.config, data.fingerprint, str(self.out))
        if at.best_step is not None and not self.out.exists():
            raise ConfigError(
                f"{self.out} is gone, which held the state of the best validation (step "
                f"{at.best_step}); put it back, or delete {self.kept} and start again"
            )
        start = self.start
        for name, old in (("what", what), ("parameter_tokens", number)):
            if old != (new := getattr(start, name)):
                raise ConfigError(f"{self.kept} has {name} {old!r}, this command asks for {new!r}")
        if weights != weights_hash(self.model):
            raise CheckpointError(f"{self.kept} was made with other weights; give that checkpoint")
        for name, p in start.named_parameters():
            found = tensors.get(f"parameter:{name}")
            if found is None or found.shape != p.shape:
                raise CheckpointError(f"{self.kept} lacks {name}, or has it in another shape")
            with torch.no_grad():
                p.copy_(found)
        try:
            adopt_moments(self.optimizer, tensors)
        except RuntimeError as cause:
            raise CheckpointError(f"{self.kept} has moments of another shape ({cause})") from None
        same = at.config.valid_tokens == self.config.valid_tokens
        self.at, self.before = continued(at, self.config), before if same else None


def read_kept(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return header and tensors of a `.tuning` file.

    Raises:
        ConfigError: there is none. CheckpointError: it is cut off, of another kind, or newer.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ConfigError(
            f"there is nothing to go on from at {path}; leave out --resume, or correct --out"
        ) from None
    except (safetensors.SafetensorError, OSError) as cause:
        raise CheckpointError(f"{path} is cut off or corrupt ({cause}); delete it") from None
    if header.get("format") != FORMAT or header.get("version") != str(VERSION):
        raise CheckpointError(f"{path} is no tuning of this version of metastate; delete it")
    return header, tensors


@contextlib.contextmanager
def _frozen(model: LanguageModel) -> Iterator[None]:
    """Ask no gradients of the weights, and run without training noise, for a while."""
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(asked[name])
