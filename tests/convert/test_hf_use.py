"""transformers' own tools at work on our models: pipeline and Trainer, and the page about them."""

import re
from pathlib import Path

import pytest
import torch
from hf_models import language_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

from metastate.config import TrainConfig
from metastate.convert.hf import MetaStateForCausalLM
from metastate.convert.hf_folder import from_hf, to_hf
from metastate.model.lm import LanguageModel
from metastate.model.weights import weights_hash
from metastate.train.optim import make_optimizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "huggingface.md"
TEXTS = ["the state reads the state", "the state writes", "what the state reads, it writes"] * 8


@pytest.fixture
def folder(tmp_path):
    to_hf(language_model("metastate"), tmp_path / "hf")
    return tmp_path / "hf"


def test_pipeline_in_batches(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    prompts = ["the state", "a", "what it reads, it writes"]
    single = [write(text, **settings)[0]["generated_text"] for text in prompts]
    batch = [out[0]["generated_text"] for out in write(prompts, batch_size=3, **settings)]
    assert batch == single and all(single)


def learner(tmp_path, tokenizer, model=None, optimizers=(None, None), collator=None, **settings):
    fresh = LanguageModel(language_model("metastate").config)
    fresh.tokenizer_info = language_model("metastate").tokenizer_info
    arguments = TrainingArguments(
        tmp_path / "run",
        **{
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 6,
            "logging_steps": 1,
            "seed": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": [],
        }
        | settings,
    )
    return Trainer(
        model=model or MetaStateForCausalLM.wrap(fresh),
        args=arguments,
        train_dataset=[tokenizer(text) for text in TEXTS],
        eval_dataset=[tokenizer(text) for text in TEXTS[:5]],
        data_collator=collator or DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        optimizers=optimizers,
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_trainer_learns_saves_and_resumes(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    trainer = learner(tmp_path, tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert len(losses(trainer)) == 12 and losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    whole = weights_hash(trainer.model.model)
    # A checkpoint is a folder of ours, and going on from it gives the same weights bit by bit.
    saved = from_hf(tmp_path / "run" / "checkpoint-12")
    assert weights_hash(saved) == whole and saved.tokenizer_info["kind"] == "bytes"
    resumed = learner(tmp_path, tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert weights_hash(resumed.model.model) == whole


def test_accumulation_in_trainer_is_one_large_batch(folder, tmp_path):
    """num_items_in_batch makes parts of unequal length weigh as they should."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for batch, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        trainer = learner(
            tmp_path,
            tokenizer,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
            activation_checkpointing=True,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.train()
        assert trainer.model.model.activation_checkpointing
        found.append((losses(trainer), trainer.model.model.head.weight.detach().clone()))
    (whole, weight), (accumulated, again) = found
    assert accumulated == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(again, weight, rtol=1e-4, atol=1e-6)


def test_trainer_packs_documents_without_padding(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = learner(tmp_path, tokenizer, collator=DataCollatorWithFlattening())
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    batch = DataCollatorWithFlattening()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    model = MetaStateForCausalLM.wrap(language_model("metastate"))
    parts = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])]
    expected = sum(model(x, labels=x).loss * (x.shape[1] - 1) for x in parts) / 3
    batch = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    torch.testing.assert_close(model(**batch).loss, expected)


def test_our_optimizer_groups_in_trainer(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MetaStateForCausalLM.wrap(LanguageModel(language_model("metastate").config))
    optimizer = make_optimizer(model.model, TrainConfig(lr=1e-2, weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["scale"]
    trainer = learner(tmp_path, tokenizer, model, (optimizer, None), lr_scheduler_type="constant")
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {"matrix": (1e-2, 0.1), "vector": (1e-2, 0.0), "decay_base": (2e-2, 0.0)}


def test_the_pages_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:  # one session: what a block makes, the next one uses
        exec(compile(block, PAGE.name, "exec"), names)
