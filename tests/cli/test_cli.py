# SPDX-License-Identifier: Apache-2.0
"""The commands `chatglm-ov` and `optimum-cli export chatglm-ov`."""

import argparse
import codecs
import importlib.metadata
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings

import openvino as ov
import pytest
import transformers
from conftest import DATA, ROOT, python_path
from transformers import AutoTokenizer

import optimum_chatglm_ov
from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.cli import conversation
from optimum_chatglm_ov.cli.arguments import add_runtime_options, runtime_options
from optimum_chatglm_ov.cli.export import adapter, add_options, weight_arguments
from optimum_chatglm_ov.cli.main import SUBCOMMANDS, main
from optimum_chatglm_ov.integrations.recognition import warn_once
from optimum_chatglm_ov.native import is_fused
from optimum_chatglm_ov.tokenization.chat_rules import settled


MODELS = DATA / "models"
CHATGLM3 = str(MODELS / "chatglm3-6b")
INT4, INT8 = (["export", CHATGLM3, "{tmp}/output", "--weight-format", name] for name in ("int4", "int8"))
COMMAND = [sys.executable, "-m", "optimum_chatglm_ov.cli.main"]


@pytest.fixture(autouse=True)
def unchanged_libraries(monkeypatch):
    """Commands run in this process must not silence the libraries for other tests."""
    verbosity = transformers.logging.get_verbosity()
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(verbosity)


def environment(**changes):
    """The environment of a command in another process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    without = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    return {**without, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def run(*arguments, stdin="", **changes):
    """Runs `chatglm-ov` in another process, with pipes."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        env=environment(**changes),
        cwd=ROOT,
        timeout=300,
    )


# main ----------------------------------------------------------------------------------------------------------------


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


@pytest.fixture(params=["script", "module"])
def command(request, tmp_path):
    """The two ways to call it, with a list of what they import on stderr."""
    script = tmp_path / "chatglm-ov"
    script.write_text("import sys\nfrom optimum_chatglm_ov.cli.main import main\nsys.exit(main())\n")
    way = [str(script)] if request.param == "script" else COMMAND[1:]
    return [sys.executable, "-X", "importtime", *way]


def imports(command, **changes):
    """Names of the modules that a process imports, its exit code and its output."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**changes), timeout=300)
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
def test_help_and_usage_errors_wait_for_no_library(code, arguments, message, command):
    names, found, output = imports([*command, *arguments])
    assert found == code and message in output
    assert "optimum_chatglm_ov.cli.main" in names or "optimum_chatglm_ov.cli.arguments" in names
    assert not names & {"torch", "transformers", "openvino", "optimum.intel", "nncf", "numpy", "rich"}


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    try:
        expected = importlib.metadata.version("optimum-chatglm-ov")
    except importlib.metadata.PackageNotFoundError:  # run from the source folder
        expected = "source"
    assert capsys.readouterr().out == f"chatglm-ov {expected}\n"


def test_optimum_cli_help_does_not_import_the_package(tmp_path):
    paths = os.pathsep.join(python_path(tmp_path / "packages"))
    code = "from optimum.commands.optimum_cli import main; main()"
    names, found, output = imports(
        [sys.executable, "-X", "importtime", "-c", code, "export", "--help"], PYTHONPATH=paths
    )
    assert found == 0 and "chatglm-ov" in output
    assert not [name for name in names if name.startswith("optimum_chatglm_ov")]


@pytest.mark.parametrize("first", ["optimum_chatglm_ov", "transformers", "optimum_chatglm_ov.configuration"])
@pytest.mark.slow
def test_importing_the_package_registers_its_classes(first):
    code = f"import {first}, optimum_chatglm_ov\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
    code += f"config = AutoConfig.from_pretrained({CHATGLM3!r})\nprint(type(config).__name__)\n"
    code += "print(AutoModelForCausalLM._model_mapping[type(config)] is optimum_chatglm_ov.OVChatGLMForCausalLM)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.stdout == "ChatGLMConfig\nTrue\n", done.stderr


@pytest.mark.slow
def test_the_process_of_the_command_registers_with_the_first_name():
    code = "import sys\nsys.argv = ['/usr/bin/chatglm-ov']\nimport optimum_chatglm_ov\n"
    code += "from optimum_chatglm_ov import choices, measure\n"  # modules may come first
    code += "is_registered = 'optimum_chatglm_ov.integrations.registration' in sys.modules\n"
    code += "print(is_registered, hasattr(optimum_chatglm_ov, 'nonsense'))\n"
    code += "from optimum_chatglm_ov import export_model\nfrom transformers import AutoConfig\n"
    code += f"print(type(AutoConfig.from_pretrained({CHATGLM3!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.stdout == "False False\nChatGLMConfig\n", done.stderr


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


# export --------------------------------------------------------------------------------------------------------------


def test_export(tmp_path, capsys):
    output = tmp_path / "output"
    assert main(["export", CHATGLM3, str(output), "--weight-format", "int8"]) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert capsys.readouterr().out.startswith(f"{output}: ")
    original = json.loads((MODELS / "chatglm3-6b" / "config.json").read_text())
    exported = OVChatGLMForCausalLM.from_pretrained(output, compile=False)
    assert exported.config.num_layers == original["num_layers"]
    assert AutoTokenizer.from_pretrained(output).chatglm_generation == "chatglm3"
    assert json.loads((output / "openvino_config.json").read_text())["quantization_config"]["bits"] == 8


@pytest.mark.slow
def test_a_terminated_export_leaves_nothing(tmp_path):
    output = tmp_path / "new" / "output"
    process = subprocess.Popen([*COMMAND, "export", CHATGLM3, output], env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(output.glob(".*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.terminate()
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 143, printed.decode()
    assert not list(tmp_path.iterdir())


def test_details_of_quantisation_reach_the_model(tmp_path):
    output = tmp_path / "output"
    details = ["--weight-format", "int4", "--group-size", "32", "--sym", "--all-layers"]
    assert main(["export", CHATGLM3, str(output), *details]) == 0
    saved = json.loads((output / "openvino_config.json").read_text())["quantization_config"]
    assert (saved["bits"], saved["group_size"], saved["sym"], saved["all_layers"]) == (4, 32, True, True)


def test_constants_have_the_form_that_was_asked_for(tmp_path):
    """Symmetric integers are signed; the embedding and the output layer are 4-bit when all layers are to be."""
    found = {}
    for name, details in {"default": (), "sym": ("--sym",), "all": ("--all-layers",)}.items():
        output = tmp_path / name
        assert main(["export", CHATGLM3, str(output), "--weight-format", "int4", "--group-size", "32", *details]) == 0
        found[name] = {
            node.get_friendly_name(): (node.get_element_type().get_type_name(), list(node.shape))
            for node in ov.Core().read_model(output / "openvino_model.xml").get_ops()
            if node.get_type_name() == "Constant" and "weight" in node.get_friendly_name()
        }
    linear, ends = "layers.0.mlp.up_proj.weight", ("embed_tokens.weight", "lm_head.weight")
    assert found["default"][linear] == ("u4", [176, 2, 32]) and f"{linear}/zero_point" in found["default"]
    assert found["sym"][linear] == ("i4", [176, 2, 32]) and f"{linear}/zero_point" not in found["sym"]
    assert [found["default"][end] for end in ends] == [("i8", [768, 64])] * 2
    assert [found["all"][end] for end in ends] == [("u4", [768, 2, 32])] * 2


def test_texts_of_the_model_itself_from_the_command_line(tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in INT4] + ["--scale-estimation", "--group-size", "32"]
    assert main([*arguments, "--dataset", "auto:seq_len=16", "--num-samples", "2"]) == 0
    assert (tmp_path / "output" / "openvino_model.xml").is_file()


def test_trusting_remote_code_has_no_effect(tmp_path, caplog):
    warn_once.cache_clear()
    assert main(["export", CHATGLM3, str(tmp_path / "output"), "--trust-remote-code"]) == 0
    assert f"`trust_remote_code=True` has no effect for {CHATGLM3}" in caplog.text


def parse(*options):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(options)


def test_a_format_alone_is_given_by_name():
    assert weight_arguments(parse()) == {"weight_format": None}
    assert weight_arguments(parse("--weight-format", "int4")) == {"weight_format": "int4"}
    assert weight_arguments(parse("--weight-format", "fp16")) == {"weight_format": "fp16"}


def test_details_refine_the_default_of_the_format():
    of_texts = ("--dataset", "text.txt", "--num-samples", "7", "--quantization-statistics-path", "statistics")
    arguments = parse("--weight-format", "int4", "--ratio", "0.8", "--awq", "--scale-estimation", *of_texts)
    assert weight_arguments(arguments)["dataset"] == "text.txt"
    config = weight_arguments(arguments)["quantization_config"]
    assert config.statistics_path == "statistics"
    assert (config.bits, config.dtype, config.ratio) == (4, "int4", 0.8)
    assert (config.quant_method.value, config.scale_estimation, config.num_samples) == ("awq", True, 7)
    assert config.group_size == optimum_chatglm_ov.export.quantization.refined("int4").group_size
    config = weight_arguments(parse("--weight-format", "int8", "--no-sym"))["quantization_config"]
    assert (config.bits, config.sym) == (8, False)
    config = weight_arguments(parse("--weight-format", "nf4", "--backup-precision", "none"))["quantization_config"]
    assert (config.dtype, config.backup_precision) == ("nf4", "none")


def test_adapters_with_weights(tmp_path):
    (tmp_path / "rank=8").mkdir()
    assert adapter("folder") == "folder"
    assert adapter("folder=0.5") == ("folder", 0.5)
    assert adapter(f"{tmp_path}/rank=8") == f"{tmp_path}/rank=8"
    assert adapter(f"{tmp_path}/rank=8=0.5") == (f"{tmp_path}/rank=8", 0.5)
    assert parse("--adapter", "one", "--adapter", "two=2").adapter == ["one", ("two", 2.0)]


@pytest.mark.slow
def test_optimum_cli_finds_the_command(tmp_path):
    paths = python_path(tmp_path / "packages")
    output = tmp_path / "output"
    optimum_cli = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()"]
    arguments = ["export", "chatglm-ov", "--model", CHATGLM3, str(output), "--weight-format", "fp16"]
    arguments += ["--attention", "native"]
    done = subprocess.run(
        [*optimum_cli, *arguments],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=os.pathsep.join(paths)),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: ")
    assert is_fused(output / "openvino_model.xml")


# chat ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_prompt_through_a_pipe_in_the_c_locale(exported):
    folder = exported("chatglm3-6b")
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    *_, (expected, _) = model.stream_chat(tokenizer, "你好", max_new_tokens=24, do_sample=False)
    arguments = ("chat", "--model", folder, "--prompt", "你好", "--greedy", "--max-new-tokens", "24")
    done = run(*arguments, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8") == expected + "\n"
    assert re.fullmatch(r"\[24 tokens, first after [\d.]+ s, then [\d.]+ tokens/s\]\n", done.stderr.decode())


@pytest.mark.slow
def test_a_conversation_has_history_until_it_is_cleared(exported):
    folder = exported("chatglm2-6b")
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def answer(query, history):
        *_, last = model.stream_chat(tokenizer, query, history=history, max_new_tokens=8, do_sample=False)
        return last

    first, history = answer("你好", [])
    second, _ = answer("Hello", history)
    third, _ = answer("Hello", [])
    assert second != third
    arguments = ("chat", "--model", folder, "--greedy", "--max-new-tokens", "8")
    done = run(*arguments, stdin="你好\n\nHello\n/clear\n/what\nHello\n/exit\nnever\n")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{first}\n{second}\n{third}\n"
    assert "/what: unknown" in done.stderr.decode()


@pytest.mark.slow
def test_a_query_in_a_pipe_that_fails(exported):
    folder = exported("chatglm3-6b")
    limit = OVChatGLMForCausalLM.from_pretrained(folder, compile=False).config.max_position_embeddings
    done = run("chat", "--model", folder, "--greedy", "--max-new-tokens", "4", stdin=f"{'a b ' * limit}\n你好\n")
    assert done.returncode == 1 and b"context length" in done.stderr and done.stdout


def test_an_original_checkpoint_is_exported_first(capsys):
    arguments = ["--prompt", "你好", "--greedy", "--max-new-tokens", "4", "--weight-format", "int8"]
    assert main(["chat", "--model", CHATGLM3, *arguments]) == 0
    printed = capsys.readouterr()
    assert f"chatglm-ov export {CHATGLM3}" in printed.err
    assert "[4 tokens" in printed.err


def test_a_weight_format_for_an_exported_model_is_refused(exported, capsys):
    assert main(["chat", "--model", str(exported("chatglm3-6b")), "--weight-format", "int8", "--prompt", "x"]) == 2
    assert "--weight-format: " in capsys.readouterr().err


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_prompt_that_is_too_long_does_not_end_the_session(exported, capsys, monkeypatch, at_terminal):
    folder = exported("chatglm3-6b")
    limit = OVChatGLMForCausalLM.from_pretrained(folder, compile=False).config.max_position_embeddings
    queries = iter(["a b " * limit, "你好", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(queries))
    monkeypatch.setattr("sys.stdin.isatty", lambda: at_terminal)
    code = main(["chat", "--model", str(folder), "--greedy", "--max-new-tokens", "4"])
    assert code == (0 if at_terminal else 1)
    printed = capsys.readouterr().err
    assert f"the context length of this model is {limit}" in printed
    assert "[4 tokens" in printed


def test_openvino_options_reach_the_compiled_model(exported):
    parser = argparse.ArgumentParser()
    add_runtime_options(parser)
    options = [
        "--kv-cache-precision",
        "f32",
        "--inference-precision",
        "f32",
        "--dynamic-quantization-group-size",
        "32",
    ]
    loaded = OVChatGLMForCausalLM.from_pretrained(
        exported("chatglm3-6b"), **runtime_options(parser.parse_args(options))
    )
    compiled = loaded.request.get_compiled_model()
    assert compiled.get_property("KV_CACHE_PRECISION") == ov.Type.f32
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 32
    fused = runtime_options(parser.parse_args(["--attention", "native", "--linear", "openvino"]))
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), **fused)
    assert model.engine.can_crop and model.linear == "openvino"


def test_a_conversation_with_openvino_options(exported, capsys):
    arguments = ["chat", "--model", str(exported("chatglm3-6b")), "--prompt", "x", "--max-new-tokens", "2"]
    assert main([*arguments, "--inference-precision", "f32", "--attention", "native"]) == 0
    assert capsys.readouterr().out
    assert main([*arguments, "--linear", "native"]) == 1
    assert "no int8 or int4 linear layers" in capsys.readouterr().err
    assert main([*arguments, "--device", "NO_SUCH_DEVICE"]) == 1
    message = capsys.readouterr().err
    assert message.startswith('chatglm-ov chat: error: OpenVINO: Device with "NO_SUCH_DEVICE" name is not registered')


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(exported):
    arguments = ["chat", "--model", str(exported("chatglm3-6b")), "--greedy", "--max-new-tokens", "4"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, *arguments, "--prompt", "x"], stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=300
    )
    os.close(writing)
    assert done.returncode == 1
    assert b"Error" not in done.stderr


@pytest.mark.parametrize(
    "response, expected",
    [
        ("你好", "你好"),
        ("你好,", "你好"),
        ("one, two ", "one, two"),
        ("half \ufffd", "half"),
        ("训练于[[训练", "训练于"),
        ("a[0] = [1", "a[0] = [1"),
    ],
)
def test_what_may_still_change_is_not_shown(response, expected):
    assert settled(response) == expected


def test_a_message_that_replaces_another_gets_its_own_line(capsys):
    shown = conversation._show("one", "")
    shown = conversation._show("one two", shown)
    assert conversation._show("three", shown) == "three"
    assert capsys.readouterr().out == "one two\nthree"


# Ctrl-C --------------------------------------------------------------------------------------------------------------


# Python's readline notices a Ctrl-C between the prompt and its waiting for a key only with the next line.
WAKE = "\n"


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments):
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._screen, side = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment(TERM="dumb"),
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(side)

    def type(self, text):
        self.text = ""
        os.write(self._screen, text.encode())

    def wait_for(self, pattern):
        """Reads until the text since the last input matches; fails if it ends or takes too long before."""
        if not self._matches(pattern, seconds=120):
            pytest.fail(f"waited for {pattern!r} in vain after {self.text[:1000]!r}")

    def interrupt_until(self, pattern):
        """Presses Ctrl-C until the text matches: Python drops an interrupt that comes inside a callback."""
        for _ in range(6):
            self.type("\x03")
            if self._matches(pattern, seconds=20):
                return
        pytest.fail(f"interrupted in vain for {pattern!r}: {self.text[:1000]!r}")

    def _matches(self, pattern, seconds):
        end = time.monotonic() + seconds
        # the ends of the text only: searching all of an endless answer again and again would never catch up
        while not (re.search(pattern, self.text[:2000]) or re.search(pattern, self.text[-2000:])):
            ready, _, _ = select.select([self._screen], [], [], max(0, end - time.monotonic()))
            if not ready or time.monotonic() > end:
                return False
            try:
                self.text += self._decoder.decode(os.read(self._screen, 65536))
            except OSError:
                pytest.fail(f"ended before {pattern!r}: {self.text!r}")
        return True

    def close(self):
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._screen)


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory):
    """A model whose answers no stop token ends."""
    folder = export_model(MODELS / "chatglm2-6b", tmp_path_factory.mktemp("endless") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["seq_length"] = 1_000_000
    config["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_interrupt_stops_the_answer_and_not_the_session(endless_model):
    terminal = Terminal("chat", "--model", endless_model, "--greedy", "--max-new-tokens", "900000")
    terminal.wait_for("> $")
    terminal.type("你好\n")
    terminal.wait_for(r"你好\r\n\S+")
    terminal.interrupt_until(r"\[\d+ tokens, .*, stopped\]\r\n> $")
    terminal.type("/clear\n")
    terminal.wait_for("> $")
    terminal.type("Hello\n")
    terminal.wait_for(r"Hello\r\n\S+")
    terminal.interrupt_until(r", stopped\]\r\n> $")
    terminal.type("\x03" + WAKE)  # a second one, at the prompt
    assert terminal.close() == 0


@pytest.mark.slow
def test_interrupts_at_the_prompt(exported):
    terminal = Terminal("chat", "--model", exported("chatglm3-6b"), "--greedy", "--max-new-tokens", "4")
    terminal.wait_for("> $")
    terminal.type("\x03" + WAKE)
    terminal.wait_for(r"Ctrl-C again.*\r\n> ")
    terminal.type("你好\n")
    terminal.wait_for(r"\[4 tokens, .*\]\r\n> $")
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.mark.slow
def test_an_interrupted_prompt_tells_so(endless_model):
    terminal = Terminal("chat", "--model", endless_model, "--greedy", "--max-new-tokens", "900000", "--prompt", "你好")
    terminal.wait_for(r"\S+")
    terminal.type("\x03")
    assert terminal.close() == 130
