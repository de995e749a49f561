# SPDX-License-Identifier: Apache-2.0
"""Times generation: the first token, the tokens after it, and how much of the memory's bandwidth they use."""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch

from .. import native
from ..architectures.registry import architecture_of
from ..choices import WAYS, canonical
from ..configuration import ChatGLMConfig
from ..ir import MODEL_FILE, load_config
from ..modeling import OVChatGLMForCausalLM


_DECIDED = {"KV_CACHE_PRECISION": "ways", "ATTENTION_BACKEND": "ways", "INFERENCE_NUM_THREADS": "threads"}
_STREAM_BYTES = 512 << 20
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Measurement:
    """One model, way and prompt length.

    Attributes:
        model: folder of the IR.
        weights: type of the weights, for example "i8".
        way: one of `WAYS`.
        prompt_tokens: length of the prompt.
        first_token_seconds: from the call to the first token, median of the repetitions.
        token_seconds: of each token after it, median.
        token_gigabytes: 10^9 bytes of weights and cache that one token needs, at the middle of the generation.
        bandwidth: `token_gigabytes / token_seconds`.
        bandwidth_share: `bandwidth` by that of summing a large array with as many threads, measured just before.
        cycles_per_instruction: of all threads, prompts included; `None` where `perf stat` cannot count.
    """

    model: str
    weights: str
    way: str
    prompt_tokens: int
    first_token_seconds: float
    token_seconds: float
    token_gigabytes: float
    bandwidth: float
    bandwidth_share: float
    cycles_per_instruction: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the measurement as JSON knows it."""
        return asdict(self)


def measure(
    models: Sequence[str | Path],
    ways: Sequence[str] = WAYS[:2],
    prompt_lengths: Sequence[int] = (32, 1024),
    new_tokens: int = 32,
    repetitions: int = 3,
    threads: int = 0,
    ov_config: Mapping[str, str] | None = None,
    linear: str | None = None,
) -> Iterator[Measurement]:
    """Times every model at every prompt length, one way after the other.

    Args:
        models: folders of IRs.
        ways, prompt_lengths: see `WAYS`, and tokens of the (random) prompts.
        new_tokens: tokens to generate, the first included.
        repetitions: generations at each length, after one to warm up.
        threads: 0 = as many as OpenVINO takes.
        ov_config: OpenVINO properties of every way, for example `{"INFERENCE_PRECISION_HINT": "f32"}`.
        linear: who computes the linear layers of the native ways, as `from_pretrained` takes it.

    Raises:
        ValueError: an unknown way, a folder without an exported model, a number below its least, a prompt beyond the
            context length, or a property that `ways` or `threads` decide; "paged" for a model that PagedAttention does
            not take.
        ImportError: "paged" without openvino-genai.
        NativeBuildError: a native way, and the native library is not there and cannot be built.
    """
    ways = [canonical(way) for way in ways]
    properties = dict(ov_config or {})
    _check_numbers(new_tokens=(new_tokens, 2), repetitions=(repetitions, 1))
    _check_ways(models, ways, properties)
    if threads:
        properties["INFERENCE_NUM_THREADS"] = str(threads)
    for folder in map(Path, models):
        config = load_config(folder)
        example_prompt = architecture_of(config).example_prompt
        _check_lengths(folder, config.max_position_embeddings, prompt_lengths, new_tokens)
        weights, weight_bytes = _weights(folder)
        for way in ways:
            generator = _Paged(folder, properties) if way == "paged" else _Stateful(folder, way, properties, linear)
            for length in prompt_lengths:
                bandwidth = stream_bandwidth(threads)
                # other tokens each time: openvino-genai keeps the cache of a prompt that it has seen
                prompts = [example_prompt(length, seed) for seed in range(repetitions + 1)]
                first, token, cycles_per_instruction = _timed(generator, prompts, new_tokens)
                cache_bytes = _cache_bytes(config, generator.cache_bits) * (length + new_tokens / 2)
                gigabytes = (weight_bytes + cache_bytes) / 1e9
                yield Measurement(
                    *(str(folder), weights, way, length),
                    first_token_seconds=first,
                    token_seconds=token,
                    token_gigabytes=gigabytes,
                    bandwidth=gigabytes / token,
                    bandwidth_share=gigabytes / token / bandwidth,
                    cycles_per_instruction=cycles_per_instruction,
                )
            del generator
            gc.collect()


def _timed(
    generator: _Stateful | _Paged, prompts: list[torch.Tensor], new_tokens: int
) -> tuple[float, float, float | None]:
    """Times all prompts but the last, which warms up.

    Returns:
        The medians of the seconds of the first token and of each after it, and cycles per instruction.
    """
    generator.generate(prompts.pop(), new_tokens)
    with _cycles_per_instruction() as counted:
        times = [generator.generate(prompt, new_tokens) for prompt in prompts]
    first, token = (statistics.median(seconds) for seconds in zip(*times))
    return first, token, counted()


def _check_numbers(**numbers: tuple[int, int]) -> None:
    """Raises `ValueError` unless each number is at least its second."""
    for name, (number, least) in numbers.items():
        if number < least:
            raise ValueError(f"`{name}` is {number}; expected at least {least}.")


def _check_ways(models: Sequence[str | Path], ways: Sequence[str], properties: Mapping[str, str]) -> None:
    """Raises what `measure` says unless every model can be computed in every way under these properties."""
    for way in ways:
        if way not in WAYS:
            raise ValueError(f"way {way!r} is unknown; expected one of {', '.join(WAYS)}")
    for name, argument in _DECIDED.items():
        if name in properties:
            raise ValueError(f"`ov_config` has {name}, which `{argument}` decides. Leave it out.")
    if "paged" in ways and importlib.util.find_spec("openvino_genai") is None:
        raise ImportError('the way "paged" needs openvino-genai: pip install "optimum-chatglm-ov[bench]"')
    for file in (Path(folder) / MODEL_FILE for folder in models):
        if not file.is_file():
            raise ValueError(f"{file}: not found; expected the folder of an exported model (`chatglm-ov export`).")
        if native.is_fused(file) and not {"native", "native-int8"}.issuperset(ways):
            raise ValueError(
                f"{file.parent}: holds native attention; expected of the ways only 'native' or 'native-int8', the one "
                f"with its own cache precision, found {', '.join(ways)}."
            )


def _check_lengths(folder: Path, context: int, prompt_lengths: Sequence[int], new_tokens: int) -> None:
    for length in prompt_lengths:
        if not 4 <= length <= context - new_tokens:
            raise ValueError(
                f"A prompt of {length} tokens and {new_tokens} new ones do not fit the context of {folder}; "
                f"expected 4 to {context - new_tokens}."
            )


def stream_bandwidth(threads: int = 0) -> float:
    """Measures reading memory in order, in 10^9 bytes a second: the best of a few sums of 512 MB of f32."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or _physical_threads())
        array = torch.ones(_STREAM_BYTES // 4)
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            array.sum()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return _STREAM_BYTES / best / 1e9


def machine_peaks(threads: int = 0) -> dict[str, float]:
    """Measures what the machine reaches at most with so many threads (0 = as many as OpenVINO takes).

    "stream", the 10^9 bytes a second of `stream_bandwidth`, and 10^12 operations a second for each kind of products
    in `native.PEAKS` that the CPU has; none of them where the native library is not there and cannot be built.
    """
    peaks = {"stream": stream_bandwidth(threads)}
    with suppress(native.NativeBuildError):
        for kind in native.PEAKS:
            peaks[kind] = native.peak_operations(kind, threads or _physical_threads()) / 1e12
    return {kind: peak for kind, peak in peaks.items() if peak}


def cpu_description() -> str:
    """Names the CPU, the threads that OpenVINO uses, and the instruction sets that matter here."""
    core = ov.Core()
    try:
        flags = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split()
        features = ", ".join(flag for flag in _CPU_FLAGS if flag in flags)
    except (OSError, IndexError):
        features = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    name = core.get_property("CPU", "FULL_DEVICE_NAME").strip() or platform.processor()
    return f"{name}, {_physical_threads()} threads, {features}, OpenVINO {ov.get_version()}"


class _Stateful:
    """The stateful graph, all computed by OpenVINO or with the native operations."""

    def __init__(self, folder: Path, way: str, ov_config: Mapping[str, str], linear: str | None):
        if way == "openvino":
            linear = "openvino"
        else:
            ov_config = {**ov_config, "KV_CACHE_PRECISION": {"native": "bf16", "native-int8": "u8"}[way]}
        attention = "openvino" if way == "openvino" else "native"
        self.model = OVChatGLMForCausalLM.from_pretrained(
            folder, attention=attention, linear=linear, ov_config=ov_config
        )
        stock = self.model.request.get_compiled_model().get_property("KV_CACHE_PRECISION").bitwidth
        self.cache_bits = {"openvino": stock, "native": 16, "native-int8": 8}[way]

    def generate(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """Measures the seconds of the first token, and of each of the others."""
        start = time.perf_counter()
        output = self.model(prompt, logits_to_keep=1)
        ids = torch.cat([prompt, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            inputs = self.model.prepare_inputs_for_generation(
                ids, attention_mask=torch.ones_like(ids), past_key_values=output.past_key_values, use_cache=True
            )
            output = self.model(**inputs)
            ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return first - start, (time.perf_counter() - first) / (new_tokens - 1)


class _Paged:
    """openvino-genai with PagedAttention."""

    cache_bits = 8

    def __init__(self, folder: Path, ov_config: Mapping[str, str]):
        import openvino_genai

        self.genai = openvino_genai
        try:
            # asked for: as a mere default it gives way to the stateful back end where it does not take the graph
            self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="PA", **ov_config)
        except RuntimeError as error:
            raise ValueError(
                f"{folder}: openvino-genai does not run this model with PagedAttention, the way 'paged'. Leave "
                f"'paged' out. ({str(error).strip()})"
            ) from error

    def generate(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        settings = self.genai.GenerationConfig()
        settings.max_new_tokens, settings.do_sample, settings.ignore_eos = new_tokens, False, True
        ids = prompt.numpy()
        inputs = self.genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        metrics = self.pipeline.generate(inputs, settings).perf_metrics
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3


def _weights(folder: Path) -> tuple[str, int]:
    """Finds the type of most weights, and the bytes of the constants that every token reads: all but an embedding."""
    total = 0
    types: Counter[str] = Counter()
    for node in OVChatGLMForCausalLM.load_model(folder / MODEL_FILE).get_ops():
        if node.get_type_name() != "Constant" or _is_looked_up(node):
            continue
        total += node.get_byte_size()
        types[node.get_element_type().get_type_name()] += node.get_byte_size()
    return types.most_common(1)[0][0], total


def _is_looked_up(node: ov.Node) -> bool:
    """Tells whether nothing but `Gather` reads a constant, decompressed or not, as its table."""
    readers = [port for port in node.output(0).get_target_inputs()]
    while len(readers) == 1 and readers[0].get_node().get_type_name() in ("Convert", "Multiply", "Subtract"):
        readers = list(readers[0].get_node().output(0).get_target_inputs())
    return bool(readers) and all(
        port.get_node().get_type_name() == "Gather" and port.get_index() == 0 for port in readers
    )


def _cache_bytes(config: ChatGLMConfig, bits: int) -> float:
    """Counts the bytes of keys and values of one token in all layers; 8 bits have one f32 scale for each head."""
    head = config.head_dim * bits / 8 + (4 if bits == 8 else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head


def _physical_threads() -> int:
    """Counts the threads that OpenVINO takes on its own: one a physical core."""
    try:
        pairs = set()
        for cpu in os.sched_getaffinity(0):
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            pairs.add(tuple((topology / name).read_text() for name in ("physical_package_id", "core_id")))
        return len(pairs)
    except (AttributeError, OSError):
        return os.cpu_count() or 1


@contextmanager
def _cycles_per_instruction() -> Iterator[Callable[[], float | None]]:
    """Counts cycles and instructions of this process in the block; what it yields tells the result after it."""
    found: list[float] = []
    with tempfile.NamedTemporaryFile("r") as output:
        command = ["perf", "stat", "-x,", "-e", "cycles,instructions", "-o", output.name, "-p", str(os.getpid())]
        try:
            perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError:
            perf = None
        try:
            yield lambda: found[0] if found else None
        finally:
            if perf is not None:
                perf.send_signal(signal.SIGINT)
                try:
                    perf.wait(timeout=10)
                except subprocess.TimeoutExpired:  # it had not begun yet, where signals are ignored
                    perf.kill()
                    perf.wait()
                counts = re.findall(r"^(\d+),[^,]*,(?:cycles|instructions)", output.read(), re.MULTILINE)
                if len(counts) == 2 and int(counts[1]):
                    found.append(int(counts[0]) / int(counts[1]))
