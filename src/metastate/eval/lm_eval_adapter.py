"""Our models as the model type `metastate` of lm-evaluation-harness (tested with 0.4.13).

Importing this module registers the type:

    import lm_eval, metastate.eval.lm_eval_adapter
    lm_eval.simple_evaluate(model="metastate", model_args="checkpoint=runs/a/best", tasks=["piqa"])

`metastate lm-eval` does that from the command line. Log-likelihoods come from `score_tokens`, so
they are the ones that `metastate eval-tasks` counts with.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metastate.data.tokenizer import Tokenizer
from metastate.errors import ConfigError, DataError, MetaStateError
from metastate.eval.zero_shot import Score, check_continuations, score_tokens
from metastate.infer.generate import generate
from metastate.infer.sampling import SamplingConfig
from metastate.model.io import check_finite, check_tokenizer, load, tokenizer_of
from metastate.model.lm import LanguageModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as cause:
    raise ConfigError(
        "this needs lm-evaluation-harness: pip install 'metastate[lm-eval]'"
    ) from cause

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", *LIMITS)  # of generation
MAX_TOKENS = 256  # tokens to write where a task does not say
Watch = Callable[[str, str], contextlib.AbstractContextManager[Callable[..., None]]]


@register_model("metastate")
class MetaStateLM(TemplateLM):
    """A LanguageModel and its tokenizer, as lm-evaluation-harness asks them.

    Attributes:
        watch: called with (what is done, its unit) when work begins; the context that it returns
            gives a function that is told (done, total).
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | LanguageModel,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str = 16,
        device: str = "cpu",
        max_batch_size: int | None = None,
    ) -> None:
        """Take a checkpoint's folder, or a model with its tokenizer.

        Args:
            checkpoint: a folder, or a LanguageModel, which stays on its device.
            tokenizer: of the model; read from the checkpoint where there is one.
            batch_size: texts a forward; lm-eval's "auto" is 16.
            device: for a checkpoint that is loaded here.
            max_batch_size: lm-eval gives it along; nothing is searched here.

        Raises:
            ConfigError: a model comes without its tokenizer, or batch_size is no number.
            CheckpointError, DataError: the checkpoint, or its tokenizer, cannot be read.
        """
        super().__init__()
        if isinstance(checkpoint, LanguageModel):
            if tokenizer is None:
                raise ConfigError("a model needs its tokenizer beside it")
            self._model = checkpoint
        else:
            self._model = load(checkpoint, device=device).eval()
            check_finite(self._model.state_dict(), checkpoint)
            tokenizer = tokenizer or tokenizer_of(self._model, checkpoint)
        check_tokenizer(self._model, tokenizer)
        self._tokenizer: Tokenizer = tokenizer
        self.watch: Watch = lambda *_: contextlib.nullcontext(lambda *_: None)
        if str(batch_size) != "auto" and not str(batch_size).isdigit():
            raise ConfigError(f"batch_size is {batch_size!r}; it must be a number, or auto")
        self.batch_size = 16 if str(batch_size) == "auto" else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The end of document, which stands before every context too."""
        return self._tokenizer.eod_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells caches of tokenised requests apart by."""
        return self._tokenizer.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the token ids of a text; there are no special ones to add."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Score]:
        """Score ((texts), context ids, continuation ids); every context begins a document.

        Raises:
            DataError: a continuation has no token of its own.
        """
        check_continuations([texts for texts, *_ in requests], [target for *_, target in requests])
        eod = self.eot_token_id
        # Text never gives an end of document: one in front is lm-eval's, for an empty context.
        pairs = [(context[context[:1] == [eod] :], target) for _, context, target in requests]
        return self._score(pairs, "log-likelihoods")

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p(whole text | end of document) of each, however long: the state carries."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        return [log_p for log_p, _ in self._score([([], text) for text in texts], "whole texts")]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop strings, greedily unless told to sample."""
        out = []
        with self.watch("generation", "texts") as show:
            for request in requests:
                context, settings = request.args
                stop = settings.get("until") or []
                text = generate(
                    self._model,
                    self._tokenizer,
                    context,
                    sampling=_sampling(settings),
                    max_tokens=_max_tokens(settings),
                    stop=[stop] if isinstance(stop, str) else stop,
                )
                out.append("".join(text))
                self.cache_hook.add_partial("generate_until", request.args, out[-1])
                show(len(out), len(requests))
        return out

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[Score]:
        with self.watch(what, "tokens") as show:
            return score_tokens(
                self._model, pairs, self.eot_token_id, batch_size=self.batch_size, progress=show
            )


def _sampling(settings: dict[str, Any]) -> SamplingConfig:
    """Return our settings for lm-eval's; a seed of torch's, which lm-eval fixes, makes them one.

    As in lm-eval's own models a temperature asks for sampling, unless `do_sample` says no.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    temperature = _number(given, "temperature", 1.0 if given.get("do_sample") else 0.0)
    if not given.get("do_sample", temperature > 0) or temperature == 0:
        return SamplingConfig(temperature=0.0, seed=0)
    return SamplingConfig(
        temperature=temperature,
        top_k=int(_number(given, "top_k", 0)),
        top_p=_number(given, "top_p", 1.0),
        seed=int(torch.randint(2**31, ())),
    )


def _max_tokens(settings: dict[str, Any]) -> int:
    """Return how many tokens may be generated, by whichever of lm-eval's names says so."""
    name = next((name for name in LIMITS if settings.get(name) is not None), LIMITS[0])
    return int(_number(settings, name, MAX_TOKENS))


def _number(settings: dict[str, Any], name: str, default: float) -> float:
    given = settings.get(name)
    try:
        return float(default if given is None else given)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} of a generation is {given!r}; it must be a number") from None


def evaluate_tasks(
    lm: MetaStateLM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: str | None = None,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness, which fetches their data as it always does.

    Args:
        lm: the model.
        tasks: names of its tasks, tags or groups.
        limit: the first so many items of each task; None is all.
        include_path: a folder with further tasks in YAML.
        num_fewshot: solved items in front of each; None is what a task says itself, and a task
            that says 0 has none.
        gen_kwargs: settings of generation, as in "temperature=0.7,max_gen_toks=64"; they come
            before a task's own.
        confirm_run_unsafe_code: allow tasks that run what the model writes.

    Returns:
        By task: `items` (None for a group), `num_fewshot` as lm-eval says it, and `metrics`, by
        name `value` and `stderr` (or None).

    Raises:
        ConfigError: there is no such task or setting, or lm-eval cannot run it with these settings
            or with what is installed. DataError: its data cannot be had.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    if include_path is not None and not os.path.isdir(include_path):
        raise ConfigError(f"the folder {include_path} for further tasks does not exist")
    for part in gen_kwargs.split(",") if gen_kwargs else ():
        name, _, value = part.partition("=")
        if name not in SETTINGS or not value:
            raise ConfigError(
                f"gen_kwargs has {part!r}; KEY=VALUE is needed, KEY one of {', '.join(SETTINGS)}"
            )
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see lm-eval's own list"
            raise ConfigError(f"lm-eval has no task {name!r}; {hint}")
    try:
        found = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            gen_kwargs=gen_kwargs,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            task_manager=manager,
            log_samples=False,
        )
    except MetaStateError:
        raise
    except OSError as cause:  # no network, no such data set, no such file
        raise DataError(
            f"lm-eval cannot get the data of {', '.join(tasks)} ({cause}); `metastate eval-tasks` "
            "needs no network"
        ) from cause
    except ImportError as cause:
        raise ConfigError(
            f"lm-eval needs a package for {', '.join(tasks)} that is not installed ({cause}); "
            "install it, or leave that task out"
        ) from cause
    except (ValueError, RuntimeError) as cause:
        below = traceback.walk_tb(cause.__traceback__.tb_next if cause.__traceback__ else None)
        if any(frame.f_globals["__name__"].startswith("metastate.") for frame, _ in below):
            raise  # a fault of ours, or no memory, which no task can mend
        unsafe = "unsafe" in str(cause)
        todo = "--confirm-run-unsafe-code allows that" if unsafe else "mend that, or leave it out"
        raise ConfigError(f"lm-eval cannot run {', '.join(tasks)} ({cause}); {todo}") from cause
    samples, out = found.get("n-samples", {}), {}
    for name, own in found["results"].items():
        metrics = {}
        for key, value in own.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = own.get(f"{metric}_stderr,{chosen}")
            label = metric if chosen == "none" else f"{metric},{chosen}"
            metrics[label] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
            }
        out[name] = {
            "items": samples.get(name, {}).get("effective"),
            "num_fewshot": found.get("n-shot", {}).get(name),
            "metrics": metrics,
        }
    return out
