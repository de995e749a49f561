# SPDX-License-Identifier: Apache-2.0
"""Exports an original ChatGLM checkpoint to a folder with an OpenVINO model, its configuration and its tokenizer. The
folder gets all of these or none."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..choices import FLOATING_FORMATS, KV_CACHE_PRECISIONS, canonical
from .arguments import UsageError, add_hub_arguments, add_weight_format, hub_arguments, positive_integer


# Argument names that OVWeightQuantizationConfig has too; None means that the user did not say.
_QUANTIZATION_ARGUMENTS = (
    "group_size",
    "group_size_fallback",
    "ratio",
    "sym",
    "all_layers",
    "backup_precision",
    "sensitivity_metric",
    "scale_estimation",
    "gptq",
    "lora_correction",
    "num_samples",
)
# Options whose names differ from those arguments.
_OPTIONS = {"quant_method": "awq", "statistics_path": "quantization_statistics_path"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chatglm-ov export`."""
    parser.add_argument("model", help="Hub id or folder of an original checkpoint, such as THUDM/chatglm3-6b")
    parser.add_argument("output", type=Path, help="folder to write")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all but the model and the output, whose form `optimum-cli` prescribes; names and meanings are its own."""
    weights = parser.add_argument_group("weights")
    _add_weight_options(weights)
    _add_text_options(weights)
    _add_model_options(parser.add_argument_group("model"))
    add_hub_arguments(parser)


def _add_weight_options(weights: Any) -> None:
    add_weight_format(weights)
    weights.add_argument(
        "--sym",
        action=argparse.BooleanOptionalAction,
        help="symmetric integers, without zero points (default: yes for int8, no for int4)",
    )
    weights.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights per scale, -1: a whole row (default: 64; 32 for mxfp4, -1 for cb4)",
    )
    weights.add_argument(
        "--group-size-fallback",
        choices=("error", "ignore", "adjust"),
        help="what to do with layers that the group size does not divide",
    )
    weights.add_argument("--ratio", type=float, help="part of the layers that becomes 4-bit, 0 to 1 (default: 1)")
    weights.add_argument(
        "--backup-precision", choices=("none", "int8_sym", "int8_asym"), help="of the layers that do not become 4-bit"
    )
    weights.add_argument(
        "--all-layers", action="store_true", default=None, help="4-bit embedding and output layer as well"
    )


def _add_text_options(weights: argparse._ArgumentGroup) -> None:
    """Adds the methods that look at activations, and the texts that these need."""
    weights.add_argument(
        "--dataset",
        metavar="TEXT",
        help="for the methods below and for --ratio: a text file; wikitext2, c4, c4-new or gsm8k from the Hub; auto: "
        "what the model generates; ':seq_len=N' behind a name sets the tokens of a sample (default: 128)",
    )
    weights.add_argument(
        "--num-samples", type=positive_integer, metavar="N", help="samples of the data set (default: 128)"
    )
    weights.add_argument("--awq", action="store_true", help="activation-aware scaling of weights")
    weights.add_argument(
        "--scale-estimation", action="store_true", default=None, help="scales that minimise the error of each layer"
    )
    weights.add_argument("--gptq", action="store_true", default=None, help="rounding that minimises the error (slow)")
    weights.add_argument(
        "--lora-correction", action="store_true", default=None, help="low-rank layers that take up the error"
    )
    weights.add_argument(
        "--sensitivity-metric", metavar="NAME", help="which layers stay 8-bit when the ratio is below 1"
    )
    weights.add_argument(
        "--quantization-statistics-path", metavar="DIR", help="keeps statistics of activations for the next export"
    )
    weights.add_argument("--quant-mode", metavar="MODE", help="refused: activations are not quantised, only weights")


def _add_model_options(model: Any) -> None:
    model.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=adapter,
        metavar="DIR[=WEIGHT]",
        help="folder of a PEFT LoRA adapter to merge; may be given several times",
    )
    model.add_argument(
        "--attention",
        type=canonical,
        choices=("openvino", "native"),
        default="openvino",
        help="openvino: portable, becomes native when it is loaded; native: holds this package's operation, for CPU "
        "and this package alone (default: %(default)s)",
    )
    model.add_argument(
        "--kv-cache-precision",
        choices=tuple(KV_CACHE_PRECISIONS),
        help="of the caches of --attention native, whose f16 is bf16 (default: bf16)",
    )
    model.add_argument(
        "--linear",
        choices=("openvino", "native"),
        default="openvino",
        help="native: int8 and int4 layers of the blocks are this package's native operations, for openvino-genai and "
        "Model Server on CPU (default: %(default)s)",
    )
    model.add_argument(
        "--ovms", action="store_true", help="add what makes the folder a repository of OpenVINO Model Server"
    )
    model.add_argument(
        "--prefix-encoder", metavar="PATH", help="folder or file of a P-Tuning v2 training, or of PEFT's PREFIX_TUNING"
    )
    model.add_argument(
        "--rope-ratio-type",
        choices=("linear", "theta"),
        help="what rope_ratio means: positions divided by it, or the base multiplied (default: the tokenizer tells)",
    )
    model.add_argument(
        "--trust-remote-code", action="store_true", help="has no effect: no code of a repository is ever run"
    )


def adapter(text: str) -> str | tuple[str, float]:
    """Reads `DIR` or `DIR=WEIGHT`; the name of a folder that is there may have an equals sign."""
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return text
    try:
        return folder, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: the weight {weight!r} is not a number") from None


def run(args: argparse.Namespace) -> int:
    """Exports and says where the result is."""
    if args.kv_cache_precision is not None and args.attention == "openvino":
        raise UsageError("--kv-cache-precision: only with --attention native; else it is an option of chatglm-ov chat")
    weights = weight_arguments(args)
    from .. import export_model
    from ..integrations.recognition import warn_once
    from .progress import export_progress

    if args.trust_remote_code:
        warn_once(args.model)

    with export_progress() as progress:
        output = export_model(
            args.model,
            args.output,
            **weights,
            **hub_arguments(args),
            rope_ratio_type=args.rope_ratio_type,
            adapters=args.adapter,
            prefix_encoder=args.prefix_encoder,
            attention=args.attention,
            kv_cache_precision=args.kv_cache_precision,
            linear=args.linear,
            ovms=args.ovms,
            progress=progress,
        )
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    has_tokenizer = (output / "tokenizer_config.json").is_file()
    print(f"{output}: {size / 1e6:,.1f} MB." + f" Try it: chatglm-ov chat --model {args.output}" * has_tokenizer)
    return 0


def weight_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns keyword arguments of `export_model`: a format by name, or the settings that details make of it.

    Raises:
        UsageError: details without a format that they could refine.
        ValueError: optimum-intel refuses the combination.
    """
    if args.quant_mode is not None:
        raise UsageError("--quant-mode: activations are not quantised, only weights; use --weight-format int8 or int4")
    details = {name: getattr(args, name) for name in _QUANTIZATION_ARGUMENTS if getattr(args, name) is not None}
    if args.awq:
        details["quant_method"] = "awq"
    if args.quantization_statistics_path is not None:
        details["statistics_path"] = args.quantization_statistics_path
    dataset = {"dataset": args.dataset} if args.dataset else {}
    if args.weight_format is None or args.weight_format in FLOATING_FORMATS:
        if details or dataset:
            raise UsageError(
                f"{_given(details | dataset)}: only for quantised weights, but --weight-format is "
                f"{args.weight_format or 'not given'}; add for example --weight-format int4"
            )
        return {"weight_format": args.weight_format}
    from ..export.quantization import refined, uses_texts

    quantization_config = refined(args.weight_format, **details)
    if dataset and not uses_texts(quantization_config):
        raise UsageError(
            "--dataset: nothing looks at texts; add --awq, --scale-estimation, --gptq, --lora-correction or a --ratio "
            "below 1, all for 4-bit weights"
        )
    of_texts = {name: value for name, value in details.items() if name in ("num_samples", "statistics_path")}
    if of_texts and not dataset:
        raise UsageError(f"{_given(of_texts)}: only with --dataset")
    if not details:
        return {"weight_format": args.weight_format, **dataset}
    return {"quantization_config": quantization_config, **dataset}


def _given(names: Iterable[str]) -> str:
    return ", ".join("--" + _OPTIONS.get(name, name).replace("_", "-") for name in names)
