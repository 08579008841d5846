"""As much of lm-evaluation-harness as its adapter touches: for tests where it is missing."""

import importlib.util
import sys
import types
from types import SimpleNamespace

ADAPTER = "metastate.eval.lm_eval_adapter"


class TemplateLM:
    """Cuts texts into tokens as the harness's own does, and asks the model for token pairs."""

    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    def loglikelihood(self, requests, disable_tqdm=False):
        found = []
        for context, continuation in (request.args for request in requests):
            if not context:
                pair = [self.eot_token_id], self.tok_encode(continuation)
            else:
                bare = context.rstrip()
                ids, whole = self.tok_encode(bare), self.tok_encode(context + continuation)
                pair = ids, whole[len(ids) :]
            found.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(found, disable_tqdm=disable_tqdm)


class TaskManager:
    """Knows two tasks."""

    def __init__(self, include_path=None):
        self.all_tasks = ["piqa", "humaneval"]


def load_adapter(monkeypatch, evaluate=None):
    """Return a fresh adapter above the stand-in, whose `simple_evaluate` is `evaluate`."""

    def module(name, **content):
        made = types.ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("lm_eval", simple_evaluate=evaluate)
    module("lm_eval.tasks", TaskManager=TaskManager)
    module("lm_eval.api")
    module("lm_eval.api.model", TemplateLM=TemplateLM)
    module("lm_eval.api.registry", register_model=lambda name: lambda cls: cls)
    spec = importlib.util.find_spec(ADAPTER)
    adapter = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, ADAPTER, adapter)
    spec.loader.exec_module(adapter)
    return adapter
