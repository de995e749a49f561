# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: the golden checkpoints and models exported from them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network by accident
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# threads that wait for each other spin: those of tests that run beside each other must not be more than the CPUs
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _WORKERS)))
# a shell starts what it puts into the background with Ctrl-C ignored, and so would be every command of the tests
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from fast_tokenizer import save_tokenizer  # noqa: E402
from fork_server import ForkServer  # noqa: E402
from torch_models import TORCH_MODELS, reference_arrays, torch_model  # noqa: E402
from transformers import LogitsProcessor, LogitsProcessorList  # noqa: E402

import optimum_chatglm_ov  # noqa: E402
from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model  # noqa: E402
from optimum_chatglm_ov.assets import TINY_CHATGLM3  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "data"
COMMAND = ("-m", "optimum_chatglm_ov.cli.main")  # `chatglm-ov`, as arguments of Python
# Every number as the weights say it: no reduced precision of activations, cache or dynamic quantisation.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
FLOATING = (
    "chatglm-6b",
    "chatglm-6b-3layer-untied",
    "chatglm2-6b",
    "chatglm2-6b-32k",
    "chatglm2-flags-mha-layernorm",
    "codegeex2-6b",
    "chatglm3-6b",
    "chatglm3-6b-32k",
    "chatglm3-6b-128k",
    "glm-4-9b-chat",
)


def pytest_configure(config: pytest.Config) -> None:
    """Lets workers take the files in the order of `pytest_collection_modifyitems`, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the folder `native`, all of which need the native library, and so a compiler.

    The file that takes longest comes first, so that no worker is left alone with it at the end.
    """
    items.sort(key=lambda item: item.path.name != "test_native_kernels.py")
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "native"):
            item.add_marker(pytest.mark.native)


class Golden:
    """What the original implementation computed from one checkpoint, or transformers' own computes now."""

    def __init__(self, name: str):
        self.name = name
        is_torch = name in TORCH_MODELS
        self.arrays = reference_arrays(name) if is_torch else np.load(DATA / "model_io" / f"{name}.npz")

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def cases(self, suffix: str, prefix: str = "") -> list[str]:
        """Cases that have both inputs and an array `prefix + case + suffix`."""
        names = [key.removesuffix("_input_ids") for key in self.arrays if key.endswith("_input_ids")]
        return [name for name in names if f"{prefix}{name}{suffix}" in self.arrays]

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "attention_mask", "position_ids")
        return {key: torch.from_numpy(self[f"{case}_{key}"]) for key in keys if f"{case}_{key}" in self}


# The kinds of nodes in which OpenVINO computes linear layers, and how many of them at once. With AMX it names some
# otherwise than on other CPUs, and may join those of an MLP, or of queries, keys and values.
_LINEAR_LAYERS_OF_KIND = {"FullyConnected": 1, "MatMul": 1, "LLMMLP": 3, "QKVProjection": 3}


def openvino_layers(model: OVChatGLMForCausalLM) -> int:
    """Linear layers that OpenVINO computes in the compiled model."""
    nodes = model.request.get_compiled_model().get_runtime_model().get_ops()
    return sum(_LINEAR_LAYERS_OF_KIND.get(node.get_rt_info()["layerType"].astype(str), 0) for node in nodes)


@functools.cache
def _may_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def may_mount() -> None:
    """Skips a test on systems whose users may not mount a tmpfs of their own."""
    if not _may_mount():
        pytest.skip("this system lets users mount no tmpfs of their own")


class _Says(LogitsProcessor):
    def __init__(self, ids: list[int]):
        self.ids, self.step = ids, 0

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e9)
        scores[:, self.ids[self.step % len(self.ids)]] = 0
        self.step += 1
        return scores


def says(ids: list[int], max_new_tokens: int = 12) -> dict[str, object]:
    """Arguments of `generate` that let a model say the given ids, again and again."""
    processors = LogitsProcessorList([_Says(ids)])
    return {"logits_processor": processors, "do_sample": False, "max_new_tokens": max_new_tokens}


def in_child(function: Callable[[], object], as_nobody: bool = False) -> str | int | None:
    """Calls `function` in a process of its own, on request as a user who may write only where all others may.

    Returns the exception it raised as text, or the number of the signal that ended the process.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # none: that of the tests' process may be OpenVINO's, which frees it while it is in use
            ctypes.CDLL(None).sigaltstack((ctypes.c_size_t * 3)(0, 2, 0), None)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray, which other tests start, exits with a code
            if as_nobody and os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            function()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".removesuffix(": ").encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        raised = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) or raised or None


def python_path(folder: Path) -> list[str]:
    """`PYTHONPATH` of a process that finds this package and its command of optimum-cli, which may go to `folder`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("optimum.commands.register.register_chatglm_ov") is None:  # not installed
        register = folder / "optimum" / "commands" / "register"
        register.mkdir(parents=True)
        shutil.copy(ROOT / "optimum_chatglm_ov/commands/register/register_chatglm_ov.py", register)
        paths.append(str(folder))
    return paths


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path there."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def let_others_read(path: Path) -> None:
    """Lets users other than the owner of the tests' folders get as far as `path`."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if mode & 0o055 != 0o055 and folder.stat().st_uid == os.getuid():
            folder.chmod(mode | 0o055)


def unpatched(auto_class: type) -> Callable[..., object]:
    """`from_pretrained` of one of transformers' auto classes, as transformers has it."""
    function, package = auto_class.from_pretrained.__func__, Path(optimum_chatglm_ov.__file__).parent
    while package in Path(function.__code__.co_filename).parents:
        function = function.__wrapped__
    return function


@pytest.fixture
def unchanged_libraries(monkeypatch):
    """Commands run in this process must not silence the libraries for other tests."""
    verbosity = transformers.logging.get_verbosity()
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def python():
    """Starts other processes of Python, which have imported everything already."""
    server = ForkServer(ROOT)
    yield server
    server.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a golden checkpoint, of the shipped one, or of one of transformers' own classes with a tokenizer."""
    folders = {TINY_CHATGLM3.name: TINY_CHATGLM3}

    def find(name: str) -> Path:
        if name in TORCH_MODELS and name not in folders:
            folders[name] = tmp_path_factory.mktemp("torch") / name
            torch_model(name).save_pretrained(folders[name])
            save_tokenizer(folders[name])
        return folders.get(name, DATA / "models" / name)

    return find


@pytest.fixture(scope="session")
def exported(tmp_path_factory, checkpoint):
    """Folder of such a checkpoint exported with its weights as stored."""
    folders: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in folders:
            folders[name] = export_model(checkpoint(name), tmp_path_factory.mktemp("exported") / name)
        return folders[name]

    return export


@pytest.fixture(scope="session")
def exact_model(exported):
    """A golden checkpoint, compiled without any reduced precision, by default with OpenVINO's own attention."""
    models: dict[tuple[str, str], OVChatGLMForCausalLM] = {}

    def load(name: str, attention: str = "sdpa") -> OVChatGLMForCausalLM:
        if (name, attention) not in models:
            model = OVChatGLMForCausalLM.from_pretrained(exported(name), attention=attention, ov_config=EXACT)
            model.generation_config.do_sample = False
            models[name, attention] = model
        return models[name, attention]

    return load


@pytest.fixture(params=["sdpa", "fused"])
def either_model(request, exact_model):
    """`exact_model` with either attention."""
    return functools.partial(exact_model, attention=request.param)
