# SPDX-License-Identifier: Apache-2.0
"""Measures what reduced precision costs in accuracy, as markdown tables.

    python tests/benchmarks/measure_accuracy.py formats      weight formats, on the tiny model of the package
    python tests/benchmarks/measure_accuracy.py outliers     weight formats, on single linears of real width
    python tests/benchmarks/measure_accuracy.py activations  rounded activations, on single int8 linears
    python tests/benchmarks/measure_accuracy.py runtime      cache and computing precision, on small checkpoints
    python tests/benchmarks/measure_accuracy.py widths FOLDER    the same on an int8 model of real widths

`formats` and `outliers` compute in f32, so that the weights are the only difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from optimum.intel.openvino.configuration import OVWeightQuantizationConfig
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.export import quantization
from optimum_chatglm_ov.measure.accuracy import compare
from optimum_chatglm_ov.native.fuse_linear import fuse_linears


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "training")]

from tiny_chatglm_text import Text, Turn  # noqa: E402


EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
DATA_AWARE = {"quant_method": "awq", "scale_estimation": True, "num_samples": 64}
FORMATS: dict[str, str | dict[str, Any] | OVWeightQuantizationConfig] = {
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    **{
        f"int4, group {group}, {'symmetric' if sym else 'asymmetric'}": {"bits": 4, "group_size": group, "sym": sym}
        for sym in (False, True)
        for group in (32, 64, 128)
    },
    "int4, whole rows, symmetric": {"bits": 4, "group_size": -1, "sym": True},
    "int4, group 64, asymmetric, ratio 0.8": {"bits": 4, "ratio": 0.8},
    "int4, optimum-intel's for chatglm2-6b: group 128, symmetric, ratio 0.72": OVWeightQuantizationConfig(
        bits=4, sym=True, group_size=128, ratio=0.72
    ),
    "int4, group 64, asymmetric, AWQ + scale estimation": {"bits": 4} | DATA_AWARE,
    "int4, group 128, asymmetric, AWQ + scale estimation": {"bits": 4, "group_size": 128} | DATA_AWARE,
    "nf4, group 64": "nf4",
    "mxfp4, group 32": "mxfp4",
}
CHECKPOINTS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
# Names of a row: how the weights are exported, how attention is computed, and the properties that differ from EXACT.
RUNTIME: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "KV_CACHE_PRECISION f16": ("fp32", "sdpa", {"KV_CACHE_PRECISION": "f16"}),
    "KV_CACHE_PRECISION bf16": ("fp32", "sdpa", {"KV_CACHE_PRECISION": "bf16"}),
    "KV_CACHE_PRECISION u8 (OpenVINO's default)": ("fp32", "sdpa", {"KV_CACHE_PRECISION": "u8"}),
    "fused attention, f32 cache": ("fp32", "fused", {"KV_CACHE_PRECISION": "f32"}),
    "fused attention, bf16 cache (its default)": ("fp32", "fused", {"KV_CACHE_PRECISION": "bf16"}),
    "fused attention, int8 cache": ("fp32", "fused", {"KV_CACHE_PRECISION": "u8"}),
    "INFERENCE_PRECISION_HINT bf16": ("fp32", "sdpa", {"INFERENCE_PRECISION_HINT": "bf16"}),
    "INFERENCE_PRECISION_HINT f16": ("fp32", "sdpa", {"INFERENCE_PRECISION_HINT": "f16"}),
    "int8 weights, DYNAMIC_QUANTIZATION_GROUP_SIZE 32": ("int8", "sdpa", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}),
    "int8 weights, its default": ("int8", "sdpa", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": ""}),
}
STEPS = 8
DEFAULTS = dict.fromkeys(EXACT, "")
# Names of a row: how attention and linear layers are computed, and the properties that differ from EXACT.
WIDTHS: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "INFERENCE_PRECISION_HINT bf16": ("sdpa", "openvino", {"INFERENCE_PRECISION_HINT": "bf16"}),
    "INFERENCE_PRECISION_HINT bf16, DYNAMIC_QUANTIZATION_GROUP_SIZE 32": (
        "sdpa",
        "openvino",
        {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
    ),
    **{
        f"INFERENCE_PRECISION_HINT f32, DYNAMIC_QUANTIZATION_GROUP_SIZE {size}": (
            "sdpa",
            "openvino",
            {"DYNAMIC_QUANTIZATION_GROUP_SIZE": size},
        )
        for size in ("32", "64", "128", "256")
    },
    "fused attention, bf16 cache": ("fused", "openvino", {"KV_CACHE_PRECISION": "bf16"}),
    "fused attention, int8 cache": ("fused", "openvino", {"KV_CACHE_PRECISION": "u8"}),
    **{
        f"native linear layers, DYNAMIC_QUANTIZATION_GROUP_SIZE {size}": (
            "sdpa",
            "fused",
            {"DYNAMIC_QUANTIZATION_GROUP_SIZE": size},
        )
        for size in ("32", "64", "128")
    },
    "native linear layers, prompts in 8 bits a token on AMX": (
        "sdpa",
        "fused-int8",
        {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
    ),
    **{
        f"all of OpenVINO's defaults, {kind} linear layers and attention": (attention, linear, DEFAULTS)
        for kind, attention, linear in (("its own", "sdpa", "openvino"), ("native", "fused", "fused"))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("formats", "outliers", "activations", "runtime", "widths"))
    parser.add_argument("model", nargs="?", type=Path, help="folder of an IR, for `widths`")
    args = parser.parse_args()
    if (args.table == "widths") != (args.model is not None):
        parser.error("`widths` needs a folder, and nothing else takes one")
    if args.model:
        widths(args.model)
        return
    tables = {"formats": formats, "outliers": outliers, "activations": activations, "runtime": runtime}
    with tempfile.TemporaryDirectory() as folder:
        tables[args.table](Path(folder))


def formats(folder: Path) -> None:
    """The tiny model in every format, against fp32.

    Every second topic of what it was trained on is read as running text, without the tokens of a conversation; the
    other topics are what the methods that look at texts are calibrated on.
    """
    text = Text()
    sentences: tuple[list[str], list[str]] = [], []
    for i, topic in enumerate(dict.fromkeys(turn.topic for turn in text.turns)):
        sentences[i % 2].extend(f"{turn.question}\n{turn.answer}" for turn in text.turns if turn.topic == topic)
    calibration, evaluation = sentences
    first = {(turn.topic, turn.language): turn for turn in reversed(text.turns)}
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHATGLM3)
    reference = export_model(TINY_CHATGLM3, folder / "fp32", weight_format="fp32")
    print(
        "| weights | bits a weight | perplexity of answers | of running text | KL (nats) | top-1 | answers unchanged |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, settings in FORMATS.items():
        how: dict[str, Any] = {"weight_format" if isinstance(settings, str) else "quantization_config": settings}
        if "AWQ" in name:
            how["dataset"] = calibration
        with redirect_stdout(sys.stderr):  # NNCF's progress
            candidate = export_model(TINY_CHATGLM3, folder / "candidate", **how)
        found = compare(
            reference,
            candidate,
            evaluation,
            reference_config=EXACT,
            candidate_config=EXACT,
            max_tokens=1_000_000,
            prompts=0,
        )
        model = OVChatGLMForCausalLM.from_pretrained(candidate, ov_config=EXACT)
        answers = [model.chat(tokenizer, turn.question, do_sample=False)[0] == turn.answer for turn in first.values()]
        loss = 100 * (found.candidate_perplexity / found.reference_perplexity - 1)
        print(
            f"| {name} | {linear_bits(candidate):.2f} | {answer_perplexity(model, tokenizer, first.values()):.4f} | "
            f"{found.candidate_perplexity:.2f} ({loss:+.1f} %) | {found.kl_divergence:.5f} | "
            f"{100 * found.top1_agreement:.2f} % | {sum(answers)} of {len(answers)} |",
            flush=True,
        )
    print(f"\nfp32: {found.reference_perplexity:.2f} on running text, {found.tokens} tokens")


def answer_perplexity(model: OVChatGLMForCausalLM, tokenizer: Any, turns: Iterable[Turn]) -> float:
    """Perplexity of the tiny model's answers as answers, with the token that ends them: what it was trained for."""
    losses = []
    for turn in turns:
        prompt = tokenizer.build_chat_input(turn.question)["input_ids"]
        parts = [tokenizer.encode(part, add_special_tokens=False) for part in ("\n", turn.answer)]
        answer = [*parts[0], *parts[1], tokenizer.convert_tokens_to_ids("<|user|>")]
        logits = model(torch.cat([torch.as_tensor(prompt), torch.tensor([answer])], dim=1)).logits[0]
        losses.append(cross_entropy(logits[-len(answer) - 1 : -1], torch.tensor(answer), reduction="none"))
    return torch.cat(losses).mean().exp().item()


def linear_bits(folder: Path) -> float:
    """Mean bits of a weight in the linears of the blocks, with scales and zero points."""
    bits = numbers = 0
    for node in ov.Core().read_model(folder / "openvino_model.xml").get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name.startswith("layers.") and "_proj.weight" in name:
            bits += node.get_element_type().bitwidth * np.prod(node.shape)
            numbers += np.prod(node.shape) if name.endswith(".weight") else 0
    return bits / numbers


def outliers(folder: Path) -> None:
    """The error of linears 4096 -> 4096, relative to their output, in every integer and 4-bit format."""
    generator = np.random.default_rng(0)
    normal = generator.standard_normal((4096, 4096), np.float32) * 0.02
    columns = generator.choice(4096, 41, replace=False)  # 1 %
    loud_weights = normal.copy()
    loud_weights[:, columns] *= 8
    inputs = generator.standard_normal((64, 4096), np.float32)
    loud_inputs = inputs.copy()
    loud_inputs[:, columns] *= 20
    heavy = generator.standard_t(4, (4096, 4096)).astype(np.float32) * 0.014
    cases = {
        "normal": (normal, inputs),
        "heavy tails (Student's t, 4 degrees)": (heavy, inputs),
        "1 % loud columns (x 8)": (loud_weights, inputs),
        "1 % loud inputs (x 20)": (normal, loud_inputs),
    }
    print(f"| weights | {' | '.join(cases)} |")
    print(f"|---|{'---|' * len(cases)}")
    for name, settings in FORMATS.items():
        if "fp16" in name or "bf16" in name or "ratio" in name or "AWQ" in name:
            continue
        errors = [linear_error(weight, x, settings) for weight, x in cases.values()]
        print(f"| {name} | {' | '.join(f'{100 * error:.2f} %' for error in errors)} |", flush=True)


def activations(folder: Path) -> None:
    """The error that rounded activations give an int8 linear 4096 -> 1024, relative to its output in f32."""
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((64, 4096), np.float32)
    gate, up = generator.standard_normal((2, 64, 4096), np.float32)
    cases = {"normal": inputs, "Student's t, 4 degrees": generator.standard_t(4, inputs.shape).astype(np.float32)}
    for share, times in ((0.01, 20), (0.001, 100)):
        loud = inputs.copy()
        loud[:, generator.choice(4096, round(share * 4096), replace=False)] *= times
        cases[f"{100 * share:g} % loud inputs (x {times})"] = loud
    cases["silu(normal) * normal"] = gate / (1 + np.exp(-gate)) * up
    weight = generator.standard_normal((1024, 4096), np.float32) * 0.02
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "8 bits, groups of 32 (OpenVINO's default without AMX)": _linear(
            weight, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
        ),
        "8 bits, one scale a token": lambda x: exact(np.rint(x / _steps(x)) * _steps(x)),
        "native": _linear(weight, {}, linear="native"),
        "native-int8": _linear(weight, {}, linear="native-int8"),
    }
    exact = _linear(weight, {})
    print(f"| activations | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    for name, compute in ways.items():
        errors = [np.linalg.norm(compute(x) - exact(x)) / np.linalg.norm(exact(x)) for x in cases.values()]
        print(f"| {name} | {' | '.join(f'{100 * error:.2f} %' for error in errors)} |", flush=True)


def _steps(x: np.ndarray) -> np.ndarray:
    """One step of 8 bits for each row."""
    return np.abs(x).max(-1, keepdims=True) / 127


def _linear(
    weight: np.ndarray, properties: Mapping[str, str], linear: str = "openvino"
) -> Callable[[np.ndarray], np.ndarray]:
    """An int8 linear in f32, but for `properties`."""
    model = _compressed(weight, "int8", {})
    if linear != "openvino":
        fuse_linears(model, rounds_tokens=linear == "native-int8")
    compiled = ov.Core().compile_model(model, "CPU", EXACT | properties)
    return lambda x: compiled(x)[0].copy()


def linear_error(weight: np.ndarray, inputs: np.ndarray, settings: str | dict[str, Any]) -> float:
    """Norm of the error of `inputs @ weight.T` by that of the result."""
    name, details = (settings, {}) if isinstance(settings, str) else ("int4", settings)
    found = ov.Core().compile_model(_compressed(weight, name, details), "CPU", EXACT)(inputs)[0]
    exact = inputs @ weight.T
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _compressed(weight: np.ndarray, name: str, details: Mapping[str, Any]) -> ov.Model:
    """A linear as a model, its weights in this format."""
    config = quantization.refined(name, **details)
    config.ignored_scope = {"names": ["x"], "validate": False}  # so that NNCF and not the export rounds
    config.all_layers = config.bits == 4 or None
    parameter = ops.parameter([-1, weight.shape[1]], np.float32, name="x")
    product = ops.matmul(parameter, ops.constant(weight), False, True)
    model = ov.Model([ops.result(product)], [parameter], "linear")
    with redirect_stdout(sys.stderr):
        quantization.compress(model, config)
    return model


def runtime(folder: Path) -> None:
    """Logits and greedy ids of the golden checkpoints under every setting, against f32."""
    print(f"| setting | {' | '.join(CHECKPOINTS)} |")
    print(f"|---|{'---|' * len(CHECKPOINTS)}")
    expected = {
        (name, weights): list(steps(load(folder, name, weights, "sdpa", {}), name))
        for name in CHECKPOINTS
        for weights in ("fp32", "int8")
    }
    for setting, (weights, attention, properties) in RUNTIME.items():
        cells = []
        for name in CHECKPOINTS:
            found = steps(load(folder, name, weights, attention, properties), name)
            differences, divergences, equal = [], [], 0
            for a, b in zip(expected[name, weights], found):
                differences.append((a - b).abs().max().item())
                divergences.append((a.exp() * (a - b)).sum().item())
                equal += int(a.argmax() == b.argmax())
            cells.append(f"{max(differences):.3f}, {abs(np.mean(divergences)):.0e}, {equal} of {len(differences)}")
        print(f"| {setting} | {' | '.join(cells)} |", flush=True)


def widths(folder: Path) -> None:
    """Logits of a model under every setting, against f32, at all 160 tokens of a random prompt."""
    prompt = torch.randint(5, 30000, (1, 160), generator=torch.Generator().manual_seed(1))

    def log_probabilities(attention: str, linear: str, properties: Mapping[str, str]) -> torch.Tensor:
        model = OVChatGLMForCausalLM.from_pretrained(
            folder, attention=attention, linear=linear, ov_config=_properties(properties)
        )
        return model(prompt).logits[0].double().log_softmax(-1)

    expected = log_probabilities("sdpa", "openvino", {})
    print("| setting | largest change | KL (nats) | top-1 |\n|---|---|---|---|")
    for setting, (attention, linear, properties) in WIDTHS.items():
        found = log_probabilities(attention, linear, properties)
        divergence = (expected.exp() * (expected - found)).sum(-1).mean().item()
        largest = (expected - found).abs().max().item()
        agreement = 100 * (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
        print(f"| {setting} | {largest:.3f} | {divergence:.1e} | {agreement:.0f} % |", flush=True)


def load(folder: Path, name: str, weights: str, attention: str, properties: Mapping[str, str]) -> OVChatGLMForCausalLM:
    output = folder / name / weights
    if not output.is_dir():
        export_model(ROOT / "tests" / "data" / "models" / name, output, weight_format=weights)
    return OVChatGLMForCausalLM.from_pretrained(output, attention=attention, ov_config=_properties(properties))


def _properties(properties: Mapping[str, str]) -> dict[str, str]:
    """Those that differ from EXACT; without a value: OpenVINO's default."""
    return {key: value for key, value in (EXACT | properties).items() if value}


def steps(model: OVChatGLMForCausalLM, name: str) -> Iterator[torch.Tensor]:
    """Log-probabilities f32 `[vocab]` behind a prompt, and behind each of the next given tokens."""
    with np.load(ROOT / "tests" / "data" / "model_io" / f"{name}.npz") as golden:
        prompt = torch.from_numpy(golden["single_input_ids"])
    random = torch.Generator().manual_seed(0)
    given = torch.randint(100, 200, (1, STEPS - 1), generator=random)
    output = model(prompt, logits_to_keep=1)
    yield output.logits[0, -1].log_softmax(-1)
    ids = prompt
    for i in range(STEPS - 1):
        ids = torch.cat([ids, given[:, i : i + 1]], dim=1)
        inputs = model.prepare_inputs_for_generation(
            ids, attention_mask=torch.ones_like(ids), past_key_values=output.past_key_values, use_cache=True
        )
        output = model(**inputs)
        yield output.logits[0, -1].log_softmax(-1)


if __name__ == "__main__":
    main()
