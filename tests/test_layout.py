# SPDX-License-Identifier: Apache-2.0
"""What imports what, which private names are used, and how long files and functions are."""

import ast
import configparser
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from conftest import DATA
from optimum.intel import OVModelForCausalLM

from optimum_chatglm_ov.runtime import model as runtime_model


PACKAGE = Path(__file__).parents[1] / "optimum_chatglm_ov"
MODULES = {
    ".".join(("optimum_chatglm_ov", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if "commands" not in file.parts  # a part of `optimum`
}
MOST_LINES_OF_FUNCTION = 60
MOST_LINES_OF_FILE = 400
MOST_LINES_OF_CPP_FILE = 350


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


def test_an_installation_holds_every_package():
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    installed = {name for name in settings["options"]["packages"].split() if name.startswith("optimum_chatglm_ov")}
    assert installed == {module for module, file in MODULES.items() if file.name == "__init__.py"}


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


def test_the_private_names_of_optimum_intel_are_listed():
    """The list in `runtime/model.py` has all that the model's classes use, and no name that is not there any more."""
    classes = [
        cls for cls in OVModelForCausalLM.__mro__ if cls.__module__.startswith(("optimum.", "transformers.generation"))
    ]
    theirs = {}
    for cls in reversed(classes):
        names = vars(cls).keys() | set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(cls)))
        theirs |= dict.fromkeys((name for name in names if re.match("_[a-z]", name)), cls.__module__)
    used = set()
    for module in ("chat", "modeling", "originals", "runtime.model"):
        for node in ast.walk(ast.parse(MODULES[f"optimum_chatglm_ov.{module}"].read_text(encoding="utf-8"))):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            used |= {node.name} if isinstance(node, ast.FunctionDef) else set()
    listed = set(re.findall(r"`(_\w+)`", runtime_model.__doc__))
    assert {name for name in used & theirs.keys() if theirs[name].startswith("optimum.")} <= listed
    assert listed <= theirs.keys() | {"_temporary_reorder_cache"}


def test_files_and_functions_are_short():
    """A function counts without its signature and docstring, which users read."""
    cpp_files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("native/cpp/**/*.[ch]pp")}
    assert len(cpp_files) > 40
    lines_of_cpp = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in cpp_files.items()}
    long = {name: lines for name, lines in lines_of_cpp.items() if lines > MOST_LINES_OF_CPP_FILE}
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
