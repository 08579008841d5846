"""RWKV-7 folders of flash-linear-attention's layout against that layer's formulas, token by token.

The reference below reads their names and nothing of ours, so a mix-up of names, of factors or of
which side a matrix acts on shows.
"""

import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hf_models import CONFIGS, language_model

from metastate.config import ModelConfig
from metastate.convert.hf_folder import from_hf, to_hf
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import CheckpointError, ConfigError
from metastate.model.lm import LanguageModel
from metastate.model.weights import weights_hash
from tolerance import TOLERANCE, relative_error

V, D, H, N, L, WIDTH = 30, 128, 2, 64, 3, 72
RANKS = {"w": 6, "a": 5, "v": 4, "g": 7}


A = "model.layers.0.attn.w_lora.lora.0.weight"


def their_weights(dtype=torch.float64):
    """Return random weights under the names and shapes of RWKV7ForCausalLM."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape, scale=0.3):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def norm(name):
        return {f"{name}.weight": 1 + draw(D), f"{name}.bias": draw(D)}

    out = {"model.embeddings.weight": draw(V, D, scale=1), "lm_head.weight": draw(V, D)}
    out |= norm("model.norm") | norm("model.layers.0.pre_norm")
    for i in range(L):
        p = f"model.layers.{i}."
        out |= norm(f"{p}attn_norm") | norm(f"{p}ffn_norm") | norm(f"{p}attn.g_norm")
        out |= {f"{p}attn.x_{c}": draw(1, 1, D) for c in "rwkvag"}
        out |= {f"{p}attn.{c}": draw(D) for c in ("k_k", "k_a")}
        out[f"{p}attn.r_k"] = draw(H, N)
        out |= {f"{p}attn.{c}_proj.weight": draw(D, D, scale=D**-0.5) for c in "rkvo"}
        for c, rank in RANKS.items():
            if c == "v" and i == 0:
                continue
            out[f"{p}attn.{c}_lora.lora.0.weight"] = draw(rank, D)
            out[f"{p}attn.{c}_lora.lora.2.weight"] = draw(D, rank)
            if c != "g":
                out[f"{p}attn.{c}_lora.lora.2.bias"] = draw(D)
        out[f"{p}ffn.x_k"] = draw(D)
        out[f"{p}ffn.key.weight"] = draw(WIDTH, D, scale=D**-0.5)
        out[f"{p}ffn.value.weight"] = draw(D, WIDTH, scale=D**-0.5)
    return out


def their_logits(weights, tokens):
    """Run their layer's formulas over one row of tokens; logits [T, V]."""

    def norm(x, name):
        return F.layer_norm(x, (D,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = norm(weights["model.embeddings.weight"][tokens], "model.layers.0.pre_norm")  # [T, D]
    v_first = None
    for i in range(L):

        def p(name, layer=i):
            return weights[f"model.layers.{layer}.{name}"]

        def lora(c, x, act=lambda h: h, p=p):
            y = act(x @ p(f"attn.{c}_lora.lora.0.weight").T) @ p(f"attn.{c}_lora.lora.2.weight").T
            return y if c == "g" else y + p(f"attn.{c}_lora.lora.2.bias")

        h = norm(x, f"model.layers.{i}.attn_norm")
        delta = F.pad(h, (0, 0, 1, -1)) - h
        mixed = {c: h + delta * p(f"attn.x_{c}").flatten() for c in "rwkvag"}
        r, k, v = (mixed[c] @ p(f"attn.{c}_proj.weight").T for c in "rkv")
        w = torch.exp(-0.6065306597126334 * lora("w", mixed["w"], torch.tanh).sigmoid())
        if i == 0:
            v_first = v
        else:
            v = torch.lerp(v, v_first, lora("v", mixed["v"]).sigmoid())
        a = lora("a", mixed["a"]).sigmoid()
        g = lora("g", mixed["g"], torch.sigmoid)
        kk = F.normalize((k * p("attn.k_k")).view(-1, H, N), dim=-1)
        k = k * (1 + (a - 1) * p("attn.k_a"))
        r, w, k, v, a = (t.view(-1, H, N) for t in (r, w, k, v, a))
        S, rows = torch.zeros(H, N, N, dtype=torch.float64), []  # [H, N_k, N_v] there
        for t in range(len(tokens)):
            removed = torch.einsum("hk,hkv->hv", -kk[t], S)
            S = S * w[t][..., None] + torch.einsum("hk,hv->hkv", kk[t] * a[t], removed)
            S = S + torch.einsum("hk,hv->hkv", k[t], v[t])
            rows.append(torch.einsum("hk,hkv->hv", r[t], S).flatten())
        o = F.group_norm(
            torch.stack(rows), H, p("attn.g_norm.weight"), p("attn.g_norm.bias"), N * 1e-5
        )
        o = o + ((r * k * p("attn.r_k")).sum(-1, keepdim=True) * v).flatten(1)
        x = x + (o * g) @ p("attn.o_proj.weight").T
        h = norm(x, f"model.layers.{i}.ffn_norm")
        mixed = h + (F.pad(h, (0, 0, 1, -1)) - h) * p("ffn.x_k")
        x = x + F.relu(mixed @ p("ffn.key.weight").T).square() @ p("ffn.value.weight").T
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


def write(folder, weights, **changes):
    """Write a folder as their save_pretrained does."""
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "hidden_size": D,
        "head_dim": N,
        "num_hidden_layers": L,
        "vocab_size": V,
        "norm_eps": 1e-5,
        "hidden_act": "sqrelu",
        "attn": None,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_computes_what_their_layer_computes(tmp_path):
    weights = their_weights()
    model = from_hf(write(tmp_path / "a", weights)).eval()
    tokens = torch.randint(0, V, (1, 9))
    expected = their_logits(weights, tokens[0])
    for model.backend in ("reference", "auto"):
        assert relative_error(model(tokens)[0][0], expected) < TOLERANCE[torch.float64]
    config = model.config
    assert (config.architecture, config.num_heads, config.ffn_size) == ("rwkv7", H, WIDTH)
    assert model.tokenizer_info is None and model.step == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bit_exact(dtype, tmp_path):
    weights = their_weights(dtype)
    model = from_hf(write(tmp_path / "a", weights))
    to_hf(model, tmp_path / "b", layout="fla")
    written = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, x in weights.items():
        assert torch.equal(written[name], x) and written[name].dtype == dtype, name
    assert weights_hash(from_hf(tmp_path / "b")) == weights_hash(model)
    info = json.loads((tmp_path / "b" / "config.json").read_text())
    expected = {
        "model_type": "rwkv7",
        "head_dim": 64,
        "intermediate_size": WIDTH,
        "value_dim": [D] * L,
        "decay_low_rank_dim": 6,
        "a_low_rank_dim": 5,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 7,
        "dtype": str(dtype).removeprefix("torch."),
    }
    assert expected.items() <= info.items()


def test_old_files_hold_the_mixes_in_one(tmp_path):
    weights = their_weights()
    model = from_hf(write(tmp_path / "a", weights))
    for i in range(L):
        p = f"model.layers.{i}.attn."
        weights[f"{p}x_x"] = torch.cat([weights.pop(f"{p}x_{c}")[0] for c in "rwkvag"])
    assert weights_hash(from_hf(write(tmp_path / "b", weights))) == weights_hash(model)


def test_one_layer(tmp_path):
    model = LanguageModel(
        ModelConfig(architecture="rwkv7", vocab_size=V, hidden_size=64, num_layers=1, num_heads=1)
    )
    to_hf(model, tmp_path, layout="fla")
    assert weights_hash(from_hf(tmp_path)) == weights_hash(model)


def test_the_end_of_document_pads_texts_but_no_embedding(tmp_path):
    """fla builds Embedding(padding_idx=config.pad_token_id), whose row gets no gradient."""
    config = ModelConfig(
        architecture="rwkv7", vocab_size=256, hidden_size=64, num_layers=1, num_heads=1
    )
    to_hf(LanguageModel(config), tmp_path, ByteTokenizer(), layout="fla")
    info, theirs = (
        json.loads((tmp_path / file).read_text())
        for file in ("config.json", "tokenizer_config.json")
    )
    assert info["pad_token_id"] is None and info["bos_token_id"] == info["eos_token_id"] == 0
    assert theirs["pad_token"] == theirs["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn": {"layers": [1]}}, "attn"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ({"norm_first": False}, "norm_first False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"model_type": "rwkv6"}, "has model_type 'rwkv6'"),
    ],
    ids=str,
)
def test_another_function_is_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        from_hf(write(tmp_path, their_weights(), **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.attn.r_k"), "no 'model.layers.1.attn.r_k'"),
        (lambda w: w.pop("model.layers.1.attn.x_a"), "no 'model.layers.1.attn.x_a'"),
        (lambda w: w.update({"model.layers.1.more": torch.ones(1)}), "hold 'model.layers.1.more'"),
        (lambda w: w.update({"model.norm.bias": torch.ones(3)}), r"ln_out.bias is \[3\]"),
        (lambda w: w.update({"model.layers.0.attn.r_k": torch.ones(4, 32)}), "32 channels"),
        (lambda w: w.update({"model.layers.0.attn.r_k": torch.ones(3, 64)}), "do not fit"),
        (lambda w: w.update({"model.embeddings.weight": torch.ones(3)}), "two axes"),
        (lambda w: w["lm_head.weight"].fill_(float("nan")), "NaN or infinite"),
        (lambda w: [w.pop(k) for k in list(w) if "layers" in k and "pre" not in k], "no layers"),
        (lambda w: w.update({"model.layers.0.attn.x_r": torch.ones(1, 1, 64)}), "differ in width"),
        (lambda w: w.update({A: torch.ones(4)}), r"w_lora.lora.0.weight is \[4\]; two axes"),
        (lambda w: w.update({A: w[A].to(torch.float8_e4m3fn)}), "is float8_e4m3fn; allowed"),
        (lambda w: w.update({A: w[A].half()}), r"several types \(float16, float32\)"),
    ],
    ids=range(13),
)
def test_broken_weights_are_refused(change, message, tmp_path):
    weights = their_weights(torch.float32)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        from_hf(write(tmp_path, weights))


def test_a_dtype_settles_several(tmp_path):
    weights = their_weights(torch.float32)
    weights[A] = weights[A].half()
    model = from_hf(write(tmp_path, weights), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_their_layout_cannot_say_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="flash-linear-attention"):
        to_hf(language_model(name), tmp_path / "x", layout="fla")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="allowed: metastate, fla"):
        to_hf(language_model(name), tmp_path, layout="flax")
