"""The shape of the code base: who may import whom, and what may be imported at all."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "metastate"
MODULES = {
    ".".join(("metastate", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(SOURCE.rglob("*.py"))
}

# A part imports only parts of a lower level, and itself.
LEVEL = {
    "config": 0,
    "errors": 0,
    "mapping": 0,
    "data": 1,
    "ops": 2,
    "layers": 3,
    "model": 4,
    "convert": 5,
    "growth": 5,
    "train": 5,
    "infer": 5,
    "eval": 6,
    "cli": 7,
    "__main__": 8,
}
ROOT_NAMES = {"__version__"}  # what the package root itself holds; its other names are parts

CORE = {"torch", "numpy", "safetensors"}
# Everything else belongs to an extra: it is imported inside the function that uses it, and only in
# the files named here. Some stand at the top of their files, which are imported when they are
# needed: kernels (numba, Triton), subclasses of lm_eval's and transformers' types, the server.
SERVER = ("metastate.infer.server", "metastate.infer.gate", "metastate.infer.openai_")
KERNELS = ("jit", "fused_kernels", "decode_kernels", "dot_kernels", "row_kernels")
EXTRAS = {
    "yaml": ("metastate.cli",),
    "tqdm": ("metastate.cli",),
    "matplotlib": ("metastate.eval.plots",),
    "scipy": ("metastate.eval.report",),
    "lm_eval": ("metastate.eval.lm_eval_adapter",),
    "tokenizers": ("metastate.data.tokenizer",),
    "huggingface_hub": ("metastate.data.tokenizer",),
    "pyrwkv_tokenizer": ("metastate.data.tokenizer",),
    "zstandard": ("metastate.data",),
    "datasets": ("metastate.data",),
    "tensorboard": ("metastate.train",),
    "transformers": ("metastate.convert.hf",),
    "numba": tuple(f"metastate.ops.{name}" for name in ("cpu", *KERNELS)),
    "triton": ("metastate.ops.triton",),
    "llvmlite": ("metastate.ops.decode_kernels", "metastate.ops.dot_kernels"),  # numba's compiler
    **dict.fromkeys(("fastapi", "starlette", "pydantic", "uvicorn"), SERVER),
    "jinja2": SERVER,
}
SERVICE = {"fastapi", "starlette", "pydantic", "uvicorn"}
AT_TOP = {"numba", "llvmlite", "triton", "lm_eval", "transformers"} | SERVICE
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FOREIGN = "metastate.convert.blinkdl"  # RWKV's own files are pickles: read with weights_only=True


def part_of(module):
    """Return the part of the package that `module` is in; the root itself is ''."""
    return module.split(".")[1] if "." in module else ""


def imports(module, path_is_package, tree):
    """Yield (imported dotted name, inside a function?, line) for every import of a module."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= {id(n) for n in ast.walk(node)}
    package = module if path_is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            for alias in node.names:
                yield f"{base}.{alias.name}", id(node) in inside, node.lineno


def violations(module, source, path_is_package=False):
    """Return what `source`, standing at `module`, breaks of the rules above."""
    tree = ast.parse(source)
    found = []
    own = part_of(module)
    for name, in_function, line in imports(module, path_is_package, tree):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top in PICKLES or name in ("torch.load", "torch.save", "torch.serialization"):
            found.append(f"{where}: nothing is pickled here")
        elif top == "metastate":
            other = part_of(name)
            if other in ROOT_NAMES or other == "" or own == "" or other == own:
                continue
            if other not in LEVEL:
                found.append(f"{where}: {other!r} has no level")
            elif LEVEL[other] >= LEVEL[own] and not LEVEL[other] == LEVEL[own] == 0:
                found.append(f"{where}: {own} must not know {other}")
        elif top not in sys.stdlib_module_names and top not in CORE:
            if top not in EXTRAS:
                found.append(f"{where}: neither standard, nor core, nor a known extra")
            elif not module.startswith(EXTRAS[top]):
                found.append(f"{where}: {top} is only for {', '.join(EXTRAS[top])}")
            elif not in_function and top not in AT_TOP:
                found.append(f"{where}: import it inside the function that uses it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch" and node.attr in ("load", "save") and module != FOREIGN:
                found.append(f"{module}:{node.lineno} uses torch.{node.attr}: it pickles")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if not any(ast.unparse(k) == "weights_only=True" for k in node.keywords):
                found.append(f"{module}:{node.lineno} would unpickle anything: weights_only=True")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if isinstance(node.value, ast.Constant) and node.value.value is False:
                continue
            found.append(f"{module}:{node.value.lineno} passes allow_pickle")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module):
    path = MODULES[module]
    found = violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metastate.train.trainer", "from metastate.infer.generate import generate"),
        ("metastate.infer.generate", "import metastate.train"),
        ("metastate.data.loader", "from metastate.ops import wkv7"),
        ("metastate.ops.chunked", "def f():\n    from ..layers import common"),
        ("metastate.model.lm", "from metastate import eval"),
        ("metastate.eval.loss", "from metastate.cli import main"),
        ("metastate.eval.plots", "import matplotlib.pyplot"),
        ("metastate.train.trainer", "def f():\n    import matplotlib"),
        ("metastate.data.prepare", "def f():\n    import requests"),
        ("metastate.model.io", "import torch\nx = torch.load('a.pth', weights_only=True)"),
        ("metastate.model.io", "from torch import load"),
        ("metastate.model.io", "import pickle"),
        ("metastate.convert.blinkdl", "import torch\nx = torch.load('a.pth')"),
        ("metastate.convert.blinkdl", "from metastate.growth import upgrade"),
        ("metastate.data.indexed", "import numpy as np\nnp.load('a', allow_pickle=True)"),
    ],
)
def test_the_checker_sees(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "metastate.eval.loss",
            "from metastate.train import trainer\nfrom metastate.data import x",
        ),
        ("metastate.eval.plots", "def f():\n    import matplotlib.pyplot"),
        ("metastate.model.io", "from metastate import __version__\nimport json"),
        ("metastate.model.io", "from .state import ModelState"),
        ("metastate.ops.cpu", "import numba"),
        ("metastate.convert.blinkdl", "import torch\nx = torch.load('a.pth', weights_only=True)"),
        ("metastate.data.loader", "import numpy as np\nnp.load('a', allow_pickle=False)"),
        ("metastate.config", "from metastate.errors import ConfigError"),
    ],
)
def test_the_checker_allows(module, source):
    assert violations(module, source) == []


def test_every_level_exists():
    parts = {part_of(module) for module in MODULES} - {""}
    assert parts == set(LEVEL)


HIDE_EXTRAS = """
    from importlib.machinery import PathFinder

    found = PathFinder.find_spec

    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {hidden!r} else found(name, path, target)

    PathFinder.find_spec = staticmethod(find_spec)
"""


def run_without_extras(body):
    """Run `body` in a fresh interpreter that cannot import any extra."""
    hidden = {*EXTRAS, "pandas", "fla"}
    code = textwrap.dedent(HIDE_EXTRAS.format(hidden=hidden)) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_works_with_torch_numpy_safetensors_alone():
    done = run_without_extras(
        """
        import metastate, metastate.ops
        import metastate.cli, metastate.data.tokenizer
        import metastate.eval.plots, metastate.train.trainer
        import torch

        model = metastate.load("metastate-tiny")
        model.backend = "chunked"
        logits, state = model(torch.zeros(1, 3, dtype=torch.int64))
        assert logits.shape == (1, 3, model.config.vocab_size), logits.shape
        try:
            import numba
        except ModuleNotFoundError:
            print("ran")
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"


def test_a_model_without_values_does_not_import_the_compiler():
    """Every command that loads a checkpoint makes one; that import would take longer."""
    done = run_without_extras(
        """
        import sys, torch
        from metastate.model.lm import LanguageModel
        from metastate.model.presets import preset

        cross = {"encoder": "cross", "latent_size": 2, "gate": True}
        for name in ("metastate", "paper", "rwkv7", "transformer", "tokenformer"):
            grown = {"head_size": 80, "parameter_tokens": 2, "meta_state": cross}
            with torch.device("meta"):
                model = LanguageModel(preset(f"{name}-tiny"))
                if name in ("paper", "rwkv7"):
                    LanguageModel(preset(f"{name}-tiny", **grown))
            assert all(p.is_meta for p in model.parameters()), name
        print(sorted({"torch._dynamo", "sympy"} & sys.modules.keys()))
        """
    )
    assert done.stdout == "[]\n", (done.stdout, done.stderr)


def test_importing_the_root_loads_no_torch():
    done = run_without_extras("import sys, metastate; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
