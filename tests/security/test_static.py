"""What the package's own source never does: a walk over every module's syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted([*(ROOT / "nemo_align").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])

# (file, what) -> why it may stay.
ALLOWED = {
    ("nemo_align/checkpoint/safe_reading.py", "pickle.Unpickler"): "the restricted one itself: it knows 20 classes",
    ("nemo_align/checkpoint/streaming/torch_archive.py", "pickle.Unpickler"): "a restricted one: it knows 12 names",
    ("nemo_align/checkpoint/streaming/torch_archive.py", "zipfile.ZipFile"): "uncompressed records, read in place",
    ("nemo_align/checkpoint/streaming/locations.py", "tarfile.open"): "members are read in place, none is extracted",
    ("tools/quickstart/dialogues.py", "yaml.load"): "its loader is a SafeLoader, in C where there is one",
}
# Calls that read, run or unpack what they are given.
REFUSED = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load",
    "shelve.open", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "compile",
    "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "tempfile.mktemp",
    "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_class", "hydra.utils.get_method",
    "torch.hub.load", "jinja2.Environment", "jinja2.Template",
}  # fmt: skip
REFUSED_NAMES = {"instantiate", "apply_chat_template", "unsafe_load", "extractall", "Environment", "Template"}
REFUSED_VALUES = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of each refused use."""
    aliases = {
        name.asname or name.name: f"{node.module}.{name.name}" if isinstance(node, ast.ImportFrom) else name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from ((node.lineno, dotted(base, aliases)) for base in node.bases if dotted(base, aliases) in REFUSED)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, aliases)
        if name in REFUSED or name.rpartition(".")[2] in REFUSED_NAMES:
            yield node.lineno, name
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for key, refused in REFUSED_VALUES.items():
            value = given.get(key)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is not refused):
                yield node.lineno, f"{key}={ast.unparse(value)}"
        if name in ("torch.load", "torch.jit.load") and "weights_only" not in given:
            yield node.lineno, name
        if name in ("numpy.load", "np.load") and "allow_pickle" not in given:
            yield node.lineno, name
        if name.endswith(".from_pretrained") and "trust_remote_code" not in given:
            yield node.lineno, name


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """`pickle.load` of the expression, through `import ... as` and `from ... import`."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return ""


def test_the_source_reads_and_runs_nothing_unsafe() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), what): line
        for path in MODULES
        for line, what in findings(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(MODULES) > 150
    new = [f"{file}:{line}: {what}" for (file, what), line in found.items() if (file, what) not in ALLOWED]
    assert not new, "refused in files that may meet bytes from outside: " + "; ".join(new)
    assert ALLOWED.keys() <= found.keys(), "the list of exceptions names what is no longer there"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as read\nread(b)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import numpy as np\nnp.load(f)",
        "import numpy\nnumpy.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "AutoTokenizer.from_pretrained(p)",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=True)",
        "eval(x)",
        "from hydra.utils import instantiate\ninstantiate(c)",
        "import tarfile\ntarfile.open(p).extractall(q)",
        "import pickle\nclass A(pickle.Unpickler): pass",
        "tokenizer.apply_chat_template(m)",
    ],
)
def test_the_walk_finds_each_of_these(source: str) -> None:
    assert list(findings(ast.parse(source)))
