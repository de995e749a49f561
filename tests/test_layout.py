# SPDX-License-Identifier: Apache-2.0
"""What imports what, and how long files and functions are: the rules that the package's folders stand for."""

import ast
import textwrap
from pathlib import Path

import pytest
from conftest import DATA


PACKAGE = Path(__file__).parents[1] / "optimum_chatglm_ov"
MODULES = {
    ".".join(("optimum_chatglm_ov", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if "commands" not in file.parts  # a part of `optimum`
}
MOST_LINES_OF_FUNCTION = 60
MOST_LINES_OF_FILE = 400


def imports(module: str, everywhere: bool = False) -> set[str]:
    """Modules of the package that `module` imports when it is imported, or also those inside its functions."""
    file = MODULES[module]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree) if everywhere else _executed(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found & MODULES.keys() - {module}


def _executed(node: ast.AST):
    """The nodes below `node` that run when a module is imported, without `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from _executed(other)
            continue
        yield child
        yield from _executed(child)


def test_no_module_imports_itself_through_others():
    graph = {module: imports(module) - {"optimum_chatglm_ov"} for module in MODULES}
    while leaves := {module for module, imported in graph.items() if not imported & graph.keys()}:
        graph = {module: imported for module, imported in graph.items() if module not in leaves}
    assert graph == {}


@pytest.mark.parametrize(
    ("folder", "below"),
    [
        ("architectures", {"export", "hub", "runtime", "tokenization", "integrations", "native", "measure"}),
        (
            "checkpoint",
            {"architectures", "export", "hub", "runtime", "tokenization", "integrations", "measure", "cli"},
        ),
        ("runtime", {"export", "hub", "measure", "cli"}),
        ("tokenization", {"export", "hub", "runtime", "measure", "cli"}),
        ("hub", {"export", "runtime", "measure", "cli"}),
        ("export", {"runtime", "measure", "cli", "modeling"}),
        ("native", {"export", "hub", "runtime", "architectures", "checkpoint", "measure", "cli"}),
    ],
)
def test_what_a_folder_does_not_import(folder, below):
    modules = [module for module in MODULES if module.startswith(f"optimum_chatglm_ov.{folder}.")]
    assert modules
    for module in modules:
        parts = {imported.split(".")[1] for imported in imports(module, everywhere=True) if "." in imported}
        assert not parts & below, module


@pytest.mark.slow
def test_an_exported_model_runs_without_the_exporter(exported, python):
    """In a process that imports transformers before this package, which makes its classes known all the same."""
    script = """
        import sys

        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from optimum_chatglm_ov import OVChatGLMForCausalLM

        config = AutoConfig.from_pretrained(sys.argv[2])
        assert type(config).__name__ == "ChatGLMConfig"
        assert AutoModelForCausalLM._model_mapping[type(config)] is OVChatGLMForCausalLM
        model = OVChatGLMForCausalLM.from_pretrained(sys.argv[1])
        assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape[1] > 3
        print([module for module in sys.modules if module.startswith("optimum_chatglm_ov.export")])
    """
    arguments = ["-c", textwrap.dedent(script), exported("chatglm3-6b"), DATA / "models" / "chatglm3-6b"]
    done = python.run(arguments, fresh=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_files_and_functions_are_short():
    """A function counts without its signature and docstring, which users read."""
    long = {}
    for module, file in MODULES.items():
        text = file.read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES_OF_FILE:
            long[module] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
                lines = node.end_lineno - first[0].lineno + 1
                if lines > MOST_LINES_OF_FUNCTION:
                    long[f"{module}.{node.name}"] = lines
    assert long == {}
