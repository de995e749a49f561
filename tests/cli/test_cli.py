# SPDX-License-Identifier: Apache-2.0
"""The command `chatglm-ov`: its sub-commands, and how it tells errors."""

import importlib.metadata
import re

import pytest
from conftest import DATA

import optimum_chatglm_ov
from optimum_chatglm_ov.cli.main import SUBCOMMANDS, main


pytestmark = pytest.mark.usefixtures("unchanged_libraries")
CHATGLM3 = str(DATA / "models" / "chatglm3-6b")
INT4, INT8 = (["export", CHATGLM3, "{tmp}/output", "--weight-format", name] for name in ("int4", "int8"))


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"\n    {name}\s", text) for name, _, _ in SUBCOMMANDS)


@pytest.mark.parametrize("name", [name for name, _, _ in SUBCOMMANDS])
def test_every_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([name, "--help"])
    assert leaving.value.code == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["translate"],
        ["export", CHATGLM3],
        ["export", CHATGLM3, "output", "--weight-format", "int3"],
        ["export", CHATGLM3, "output", "--adapter", "folder=much"],
        ["chat", "--greedy", "--temperature", "0.5"],
        ["chat", "--max-new-tokens", "0"],
        ["chat", "--temperature", "nan"],
    ],
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    try:
        expected = importlib.metadata.version("optimum-chatglm-ov")
    except importlib.metadata.PackageNotFoundError:  # run from the source folder
        expected = "source"
    assert capsys.readouterr().out == f"chatglm-ov {expected}\n"


@pytest.mark.parametrize(
    "code, arguments, message",
    [
        (1, ["export", "no/such/folder", "{tmp}/output"], "no such folder"),
        (1, ["export", "{tmp}", "{tmp}/output"], "config.json"),
        (1, ["export", CHATGLM3, "{tmp}/file"], "a file of that name exists"),
        (1, ["export", CHATGLM3, "{tmp}/output", "--weight-format", "int8", "--ratio", "0.5"], "`ratio`"),
        (1, ["export", CHATGLM3, "{tmp}/output", "--adapter", "{tmp}"], "adapter_config.json"),
        (2, ["export", CHATGLM3, "{tmp}/output", "--awq", "--group-size", "64"], "--group-size, --awq: only"),
        (2, ["export", CHATGLM3, "{tmp}/output", "--weight-format", "fp16", "--dataset", "x"], "--dataset: only"),
        (2, [*INT4, "--dataset", "README.md"], "--dataset: nothing looks at texts"),
        (2, [*INT8, "--dataset", "README.md"], "--dataset: nothing looks at texts"),
        (2, [*INT4, "--num-samples", "3"], "--num-samples: only with --dataset"),
        (2, [*INT4, "--awq", "--quantization-statistics-path", "x"], "-statistics-path: only with --dataset"),
        (1, [*INT4, "--awq", "--dataset", "wikitext3"], "one of wikitext2, c4, c4-new, gsm8k"),
        (1, [*INT4, "--gptq", "--dataset", "gsm8k"], "'gsm8k' could not be loaded"),
        (1, [*INT4, "--awq", "--dataset", "wikitext2:seq_len=64"], "'wikitext2' could not be loaded"),
        (2, ["export", CHATGLM3, "{tmp}/output", "--quant-mode", "int8"], "only weights; use --weight-format"),
        (1, ["chat", "--model", "no/such/folder", "--prompt", "x"], "no such folder"),
        (2, ["chat", "--prompt", " "], "--prompt is empty"),
    ],
)
def test_errors_are_one_line(code, arguments, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"chatglm-ov \w+: error: [^\n]+\n", printed.err)
    assert message in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unexpected_error_names_its_class(monkeypatch, capsys):
    monkeypatch.setattr(optimum_chatglm_ov, "export_model", lambda *_, **__: {}["missing"])
    assert main(["export", CHATGLM3, "output"]) == 1
    assert capsys.readouterr().err == (
        "chatglm-ov export: error: KeyError: 'missing' (run with --debug to see where)\n"
    )


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(OSError):
        main(["export", "no/such/folder", str(tmp_path / "output"), "--debug"])
