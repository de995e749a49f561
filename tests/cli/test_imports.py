# SPDX-License-Identifier: Apache-2.0
"""What the commands and the package import, and when: in processes that have imported nothing before."""

import os
import re
import subprocess
import sys

import pytest
from conftest import COMMAND, DATA, python_path

from optimum_chatglm_ov.cli.main import SUBCOMMANDS


CHATGLM3 = str(DATA / "models" / "chatglm3-6b")


@pytest.fixture(params=["script", "module"])
def command(request, tmp_path):
    """The two ways to call it, with a list of what they import on stderr."""
    script = tmp_path / "chatglm-ov"
    script.write_text("import sys\nfrom optimum_chatglm_ov.cli.main import main\nsys.exit(main())\n")
    way = [str(script)] if request.param == "script" else COMMAND
    return [sys.executable, "-X", "importtime", *way]


def imports(python, command, **changes):
    """Names of the modules that a process imports, its exit code and its output."""
    done = subprocess.run(command, capture_output=True, text=True, env=python.environment(**changes), timeout=300)
    names = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.M))
    return names, done.returncode, done.stdout + re.sub(r"^import time:.*\n", "", done.stderr, flags=re.M)


@pytest.mark.parametrize(
    "code, arguments, message",
    [
        (0, ["--help"], "sub-commands:"),
        (0, ["--version"], "chatglm-ov "),
        *((0, [name, "--help"], f"usage: chatglm-ov {name}") for name, _, _ in SUBCOMMANDS),
        (2, [], "the following arguments are required: SUB-COMMAND"),
        (2, ["export", CHATGLM3, "output", "--weight-format", "int3"], "invalid choice: 'int3'"),
        (2, ["export", CHATGLM3, "output", "--kv-cache-precision", "u8"], "only with --attention native"),
        (2, ["export", CHATGLM3, "output", "--ratio", "1"], "--ratio: only for quantised weights"),
        (2, ["chat", "--prompt", " "], "--prompt is empty"),
        (2, ["chat", "--web", "--temperature", "1"], "--temperature and --web: the page asks for it"),
        (2, ["bench", "--attention-only", "chatglm", "--linear", "native"], "--attention-only measures no linear"),
        (2, ["compare", "a", "b", "--text", "c", "--json", "no/such/folder/file"], "cannot be written"),
    ],
)
def test_help_and_usage_errors_wait_for_no_library(code, arguments, message, command, python):
    names, found, output = imports(python, [*command, *arguments])
    assert found == code and message in output
    assert "optimum_chatglm_ov.cli.main" in names or "optimum_chatglm_ov.cli.arguments" in names
    assert not names & {"torch", "transformers", "openvino", "optimum.intel", "nncf", "numpy", "rich"}


def test_optimum_cli_help_does_not_import_the_package(tmp_path, python):
    paths = os.pathsep.join(python_path(tmp_path / "packages"))
    code = "from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", code, "export", "--help"]
    names, found, output = imports(python, command, PYTHONPATH=paths)
    assert found == 0 and "chatglm-ov" in output
    assert not [name for name in names if name.startswith("optimum_chatglm_ov")]


@pytest.mark.parametrize("first", ["optimum_chatglm_ov", "optimum_chatglm_ov.configuration"])
@pytest.mark.slow
def test_importing_the_package_registers_its_classes(first, python):
    code = f"import {first}, optimum_chatglm_ov\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
    code += f"config = AutoConfig.from_pretrained({CHATGLM3!r})\nprint(type(config).__name__)\n"
    code += "print(AutoModelForCausalLM._model_mapping[type(config)] is optimum_chatglm_ov.OVChatGLMForCausalLM)"
    done = python.run(["-c", code], fresh=True)
    assert done.stdout == "ChatGLMConfig\nTrue\n", done.stderr


@pytest.mark.slow
def test_the_process_of_the_command_registers_with_the_first_name(python):
    code = "import sys\nsys.argv = ['/usr/bin/chatglm-ov']\nimport optimum_chatglm_ov\n"
    code += "from optimum_chatglm_ov import choices, measure\n"  # modules may come first
    code += "is_registered = 'optimum_chatglm_ov.integrations.registration' in sys.modules\n"
    code += "print(is_registered, hasattr(optimum_chatglm_ov, 'nonsense'))\n"
    code += "from optimum_chatglm_ov import export_model\nfrom transformers import AutoConfig\n"
    code += f"print(type(AutoConfig.from_pretrained({CHATGLM3!r})).__name__)"
    done = python.run(["-c", code], fresh=True)
    assert done.stdout == "False False\nChatGLMConfig\n", done.stderr
