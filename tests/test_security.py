"""The promises of SECURITY.md: files from elsewhere are data, and no code of theirs is run."""

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bigbatch.errors import InputError
from bigbatch.lm.data.tokenizer import load_tokenizer
from bigbatch.lm.model.pretrained import load_config, load_model

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "bigbatch"
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.save", "pickle.load", "marshal.loads",
    "yaml.unsafe_load", "yaml.full_load", "socket.socket", "socket.create_server", "dist.TCPStore", "HTTPServer",
}  # fmt: skip
PICKLING_COLLECTIVES = {
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    """Return the parsed modules of the package by their paths."""
    return {
        path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in SOURCE.rglob("*.py")
    }


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def forbidden(tree: ast.AST) -> list[str]:
    """Return the calls that could run code of a file, start a shell or open a port."""
    found = [ast.unparse(call.func) for call in calls(tree)]
    shells = [ast.unparse(call) for call in calls(tree) if any(word.arg == "shell" for word in call.keywords)]
    return [name for name in found if name in FORBIDDEN_CALLS] + shells


def test_no_module_runs_code_or_opens_ports(trees: dict[str, ast.AST]) -> None:
    assert {name: forbidden(tree) for name, tree in trees.items() if forbidden(tree)} == {}


def test_forbidden_calls_are_found() -> None:
    tree = ast.parse("torch.load(path)\nsubprocess.run(line, shell=True)\nmodel.eval()\neval(text)")
    assert forbidden(tree) == ["torch.load", "eval", "subprocess.run(line, shell=True)"]


def test_only_the_transformers_integration_pickles_between_ranks(trees: dict[str, ast.AST]) -> None:
    users = [
        name
        for name, tree in trees.items()
        if any(ast.unparse(call.func).rpartition(".")[2] in PICKLING_COLLECTIVES for call in calls(tree))
    ]
    assert users
    assert all(name.startswith("integrations/transformers/") for name in users)


def test_only_the_tokenizing_workers_use_pickle(trees: dict[str, ast.AST]) -> None:
    users = [
        name
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and "pickle" in {alias.name for alias in node.names}
    ]
    assert users == ["lm/data/token_store/workers.py"]


def test_remote_code_is_never_trusted(trees: dict[str, ast.AST]) -> None:
    values = [
        ast.unparse(word.value)
        for tree in trees.values()
        for call in calls(tree)
        for word in call.keywords
        if word.arg == "trust_remote_code"
    ]
    assert len(values) >= 4
    assert set(values) == {"False"}


def test_yaml_is_loaded_safely(trees: dict[str, ast.AST]) -> None:
    found = [ast.unparse(call) for tree in trees.values() for call in calls(tree)]
    loads = [call for call in found if call.startswith("yaml.load(")]
    classes = [
        ast.unparse(node.bases[0])
        for node in ast.walk(trees["lm/config/settings_file.py"])
        if isinstance(node, ast.ClassDef) and node.name == "Loader"
    ]
    assert (loads, classes) == (["yaml.load(text, Loader)"], ["yaml.SafeLoader"])


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


def write_config(folder: Path, **more: object) -> None:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, **sizes, **more}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_pickle_in_weights_is_not_executed(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(executed)))
    assert executed.exists(), "the payload works where pickles are trusted"
    executed.unlink()
    write_config(tmp_path)
    torch.save({"model.embed_tokens.weight": Payload(executed)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="does not load as a causal language model"):
        load_model(str(tmp_path), dtype=torch.float32)
    assert not executed.exists()


def test_code_of_model_and_tokenizer_is_not_executed(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    (tmp_path / "custom.py").write_text(f"open({str(executed)!r}, 'w').close()\n", encoding="utf-8")
    names = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    write_config(tmp_path, model_type="custom", auto_map=names)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}),
        encoding="utf-8",
    )
    for load in (load_config, lambda name: load_model(name, dtype=torch.float32), load_tokenizer):
        with pytest.raises(InputError):
            load(str(tmp_path))
    assert not executed.exists()


def test_chat_template_cannot_leave_its_sandbox() -> None:
    from jinja2.exceptions import SecurityError
    from transformers.utils.chat_template_utils import render_jinja_template

    with pytest.raises(SecurityError):
        render_jinja_template(
            [[{"role": "user", "content": "a"}]], chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"
        )
