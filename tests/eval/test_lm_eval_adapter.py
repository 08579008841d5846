"""The adapter against lm-evaluation-harness itself, and above a stand-in where it is missing."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import zero_shot_files as files
from lm_eval_stand_in import ADAPTER, load_adapter
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import ConfigError, DataError, ShapeError
from metastate.eval.zero_shot import evaluate_items, loglikelihoods
from metastate.eval.zero_shot_data import TASKS, load_items
from metastate.infer.generate import generate
from metastate.infer.sampling import SamplingConfig
from tiny_models import tiny

BYTES = ByteTokenizer()


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'metastate\[lm-eval\]'"):
        __import__(ADAPTER)


@pytest.fixture
def harness():
    """The adapter above lm-evaluation-harness itself."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from metastate.eval import lm_eval_adapter

    return lm_eval_adapter


@pytest.fixture(params=["harness", "stand-in"])
def adapter(request, monkeypatch):
    if request.param == "harness":
        return request.getfixturevalue("harness")
    return load_adapter(monkeypatch)


@pytest.fixture
def model():
    return tiny(std=0.3).eval()


@pytest.fixture
def lm(adapter, model):
    return adapter.MetaStateLM(model, BYTES, batch_size=3)


def requests(kind, arguments):
    try:
        from lm_eval.api.instance import Instance
    except ImportError:  # the stand-in
        return [SimpleNamespace(args=args) for args in arguments]
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("task", TASKS)
def test_log_likelihoods_are_ours(task, lm, model, tmp_path):
    items = load_items(task, files.write(tmp_path / "data"))
    pairs = [pair for item in items for pair in item.pairs]
    theirs = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (a, greedy), (b, also) in zip(theirs, loglikelihoods(model, BYTES, pairs), strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy == also


def test_a_continuation_without_a_token_is_named(lm):
    with pytest.raises(DataError, match="'' of 'They' has no token"):
        lm.loglikelihood(requests("loglikelihood", [("They", "")]), disable_tqdm=True)


def test_rolling_is_the_whole_text_behind_an_end_of_document(lm, model):
    texts = ["A text. " * 90, "x", ""]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
    for text, log_p in zip(texts, found, strict=True):
        expected = loglikelihoods(model, BYTES, [("", text)])[0][0] if text else 0.0
        assert log_p == pytest.approx(expected, abs=1e-3)
    ids = torch.tensor([[0, *texts[0].encode()]])
    with torch.no_grad():
        each = model(ids[:, :-1])[0].log_softmax(-1).gather(2, ids[:, 1:, None])
    assert found[0] == pytest.approx(each.sum().item(), abs=1e-2)


def test_generation_stops_where_it_should(lm, model):
    greedy = SamplingConfig(temperature=0.0)
    whole = "".join(generate(model, BYTES, "The", sampling=greedy, max_tokens=20))
    stop = whole[5:7]
    settings = [{"until": [], "max_gen_toks": 20}, {"until": stop, "max_gen_toks": 20}]
    settings += [{"until": ["\0never"], "max_gen_toks": 4, "do_sample": False}]
    done = lm.generate_until(requests("generate_until", [("The", s) for s in settings]))
    assert done[0] == whole
    assert done[1] == whole[: whole.index(stop)]
    assert whole.startswith(done[2]) and len(done[2]) < len(whole)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_limit_may_have_any_of_its_names(lm, name):
    settings = [{"until": [], key: 3, "top_k": None} for key in ("max_gen_toks", name)]
    one, other = lm.generate_until(requests("generate_until", [("The", s) for s in settings]))
    assert one == other and 0 < len(one.encode()) <= 9


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0.7, "do_sample": False}, 0),
        ({"temperature": 0.0, "do_sample": True}, 0),
        ({"do_sample": True}, 1),
    ],
)
def test_a_temperature_asks_for_sampling(adapter, settings, temperature):
    assert adapter._sampling(settings).temperature == temperature


def test_sampling_follows_torch_s_seed(lm):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts += lm.generate_until(requests("generate_until", [("The", settings)]))
    assert texts[0] == texts[1] != texts[2]


YAML = {
    "piqa": """
output_type: multiple_choice
doc_to_text: "{{query}}Answer:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "lambada": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}


@pytest.mark.parametrize("task", YAML)
def test_whole_tasks_give_the_same_figures(task, harness, model, tmp_path):
    """The harness's own prompts, metrics and standard errors, on the same file."""
    data, tasks = files.write(tmp_path / "data"), tmp_path / "tasks"
    tasks.mkdir()
    file = data / TASKS[task].file
    if task == "piqa":
        words = ["dry it", "wet it for a long time", "look"]
        rows = [
            {"query": f"Question: {i}?\n", "choices": [words[i % 3], words[(i + 1) % 3]]}
            for i in range(24)
        ]
        files.write_lines(file, [row | {"gold": i % 2} for i, row in enumerate(rows)])
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
    head = f"task: local_{task}\ntest_split: test\nnum_fewshot: 0\n{source}"
    (tasks / f"{task}.yaml").write_text(head + YAML[task])
    lm = harness.MetaStateLM(model, BYTES, batch_size=3)
    theirs = harness.evaluate_tasks(lm, [f"local_{task}"], include_path=str(tasks))
    items = load_items(task, data)
    ours = evaluate_items(model, BYTES, task, items)
    found = theirs[f"local_{task}"]
    assert found["items"] == len(items)
    assert found["metrics"].keys() == ours.metrics.keys()
    for name, metric in ours.metrics.items():
        assert found["metrics"][name]["value"] == pytest.approx(metric.value, rel=1e-4)
        if name != "perplexity":  # its error is a bootstrap there
            assert found["metrics"][name]["stderr"] == pytest.approx(metric.stderr, rel=1e-4)
    if task == "piqa":
        assert 0 < ours.metrics["acc"].value < 1
    assert json.dumps(theirs)


def test_lm_eval_finds_the_model_by_its_name(harness, model, tmp_path):
    import metastate

    model.tokenizer_info = BYTES.info()
    metastate.save(model, tmp_path / "model")
    from lm_eval.api.registry import get_model

    made = get_model("metastate").create_from_arg_string(
        f"checkpoint={tmp_path / 'model'}", {"batch_size": "auto", "device": "cpu"}
    )
    assert isinstance(made, harness.MetaStateLM) and made.batch_size == 16
    assert made.eot_token_id == 0 and made.tok_encode("ab") == [97, 98]


def test_mistakes_are_said(adapter, lm, model):
    with pytest.raises(ConfigError, match="did you mean 'piqa'"):
        adapter.evaluate_tasks(lm, ["piqaa"])
    with pytest.raises(ConfigError, match="does not exist"):
        adapter.evaluate_tasks(lm, ["piqa"], include_path="/nowhere/at/all")
    with pytest.raises(ConfigError, match="tokenizer beside it"):
        adapter.MetaStateLM(model)
    with pytest.raises(ConfigError, match="batch_size"):
        adapter.MetaStateLM(model, BYTES, batch_size="many")


def test_data_that_cannot_be_had(harness, model, tmp_path):
    lm = harness.MetaStateLM(model, BYTES)
    source = "dataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/x.jsonl}}\n"
    head = f"task: local_gone\ntest_split: test\n{source}"
    (tmp_path / "gone.yaml").write_text(head + YAML["piqa"])
    with pytest.raises(DataError, match="local_gone"):
        harness.evaluate_tasks(lm, ["local_gone"], include_path=str(tmp_path))


def test_unsafe_tasks_want_a_word_and_wrong_settings_are_said(harness, model, tmp_path):
    """What lm-eval refuses, as it does it: no traceback, and what to do."""
    file = files.write(tmp_path / "data") / TASKS["piqa"].file
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
    head = f"task: local_code\ntest_split: test\nunsafe_code: true\n{source}"
    (tmp_path / "code.yaml").write_text(head + YAML["piqa"])
    lm, where = harness.MetaStateLM(model, BYTES), {"include_path": str(tmp_path)}
    with pytest.raises(ConfigError, match="--confirm-run-unsafe-code allows that"):
        harness.evaluate_tasks(lm, ["local_code"], **where)
    found = harness.evaluate_tasks(lm, ["local_code"], **where, confirm_run_unsafe_code=True)
    assert found["local_code"]["items"] == 2


@pytest.mark.parametrize(
    ("cause", "error", "words"),
    [
        (ImportError("no module sympy"), ConfigError, r"not installed \(no module sympy\)"),
        (ValueError("marked as unsafe"), ConfigError, "--confirm-run-unsafe-code"),
        (ValueError("no split"), ConfigError, r"cannot run piqa \(no split\); mend"),
        (RuntimeError("scripts are gone"), ConfigError, "scripts are gone"),
        (OSError("no network"), DataError, "no network"),
        (ShapeError("of ours"), ShapeError, "^of ours$"),
    ],
)
def test_what_lm_eval_raises_is_said(monkeypatch, model, cause, error, words):
    def evaluate(*_, **__):
        raise cause

    adapter = load_adapter(monkeypatch, evaluate)
    with pytest.raises(error, match=words):
        adapter.evaluate_tasks(adapter.MetaStateLM(model, BYTES), ["piqa"])


def test_the_options_reach_lm_eval(monkeypatch, model):
    seen = {}

    def evaluate(lm, **options):
        seen.update(options)
        results = {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
        return {"results": results, "n-shot": {"piqa": 0}}

    adapter = load_adapter(monkeypatch, evaluate)
    options = {"num_fewshot": 5, "gen_kwargs": "top_k=1", "confirm_run_unsafe_code": True}
    found = adapter.evaluate_tasks(adapter.MetaStateLM(model, BYTES), ["piqa"], **options)
    assert seen.items() >= (options | {"limit": None}).items()
    assert found["piqa"]["metrics"] == {"acc": {"value": 0.5, "stderr": 0.1}}
    assert found["piqa"]["num_fewshot"] == 0  # what was run, not what was asked


def test_a_fault_of_ours_is_not_the_task_s(monkeypatch, model):
    adapter = load_adapter(monkeypatch, lambda lm, **_: lm.generate_until([None]))
    with pytest.raises(AttributeError):
        adapter.evaluate_tasks(adapter.MetaStateLM(model, BYTES), ["piqa"])

    def no_memory(*_, **__):
        raise RuntimeError("out of memory")

    adapter = load_adapter(
        monkeypatch, lambda lm, **_: lm.loglikelihood(requests("loglikelihood", [("a", "b")]))
    )
    monkeypatch.setattr(adapter, "score_tokens", no_memory)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        adapter.evaluate_tasks(adapter.MetaStateLM(model, BYTES), ["piqa"])


@pytest.mark.parametrize("given", ["temprature=0.7", "temperature", "top_k=", "top_k=1,"])
def test_settings_that_nothing_reads_are_refused(monkeypatch, model, given):
    adapter = load_adapter(monkeypatch)
    with pytest.raises(ConfigError, match="KEY one of until, do_sample, temperature"):
        adapter.evaluate_tasks(adapter.MetaStateLM(model, BYTES), ["piqa"], gen_kwargs=given)


@pytest.mark.parametrize("name", ["temperature", "top_k", "max_gen_toks"])
def test_settings_that_are_no_numbers_are_named(lm, name):
    settings = {"do_sample": True, "until": [], name: "hot"}
    with pytest.raises(ConfigError, match=f"{name} of a generation is 'hot'"):
        lm.generate_until(requests("generate_until", [("The", settings)]))
