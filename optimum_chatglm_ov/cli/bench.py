# SPDX-License-Identifier: Apache-2.0
"""Times the first token and the tokens after it, and says what share of the memory's bandwidth they use; without a
model, of the tiny one that comes with the package. With --attention-only, the attention of one layer alone,
with --linear-only its linear layers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import LINEARS, WAYS, canonical
from ..errors import ExportError
from .arguments import (
    UsageError,
    add_computation_options,
    check_writable,
    computation_options,
    non_negative_integer,
    positive_integer,
)


if TYPE_CHECKING:
    from ..measure.attention import Measurement as AttentionMeasurement
    from ..measure.linear import Measurement as LinearMeasurement
    from ..measure.speed import Measurement

_NEW_TOKENS = 32
_ROWS = (1, 16, 64, 1024)
_SHORT_REPETITIONS = 10  # as many more where one takes milliseconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chatglm-ov bench`."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder of an exported model; several are compared")
    parser.add_argument(
        "--attention",
        nargs="+",
        type=canonical,
        choices=WAYS,
        help=f"ways of computing attention; paged is openvino-genai's (default: {' '.join(WAYS[:2])})",
    )
    parser.add_argument(
        "--linear",
        type=canonical,
        choices=LINEARS,
        help="who computes the linear layers of native ways (default: auto)",
    )
    parser.add_argument(
        "--prompt-tokens",
        nargs="+",
        type=positive_integer,
        default=[32, 1024],
        metavar="N",
        help="prompt lengths (default: 32 1024)",
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_integer,
        metavar="N",
        help=f"tokens to generate (default: {_NEW_TOKENS})",
    )
    parser.add_argument(
        "--repetitions", type=positive_integer, default=3, metavar="N", help="the median counts (default: 3)"
    )
    parser.add_argument("--threads", type=non_negative_integer, default=0, metavar="N", help="0: one a core (default)")
    add_computation_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them, as PNG, SVG or PDF")
    parser.add_argument(
        "--attention-only",
        choices=("chatglm3", "chatglm"),
        help="one attention layer with these dimensions instead of models: --prompt-tokens new ones at once, and one "
        "token after as many",
    )
    parser.add_argument(
        "--linear-only",
        choices=("chatglm3", "chatglm"),
        help="the linear layers of one block, and the output layer, with these dimensions instead of models",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=positive_integer,
        metavar="N",
        help=f"tokens at once with --linear-only (default: {' '.join(map(str, _ROWS))})",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints a markdown table row by row, and writes the files asked for."""
    properties = computation_options(args)
    _check_options(args, properties)
    for file in filter(None, (args.json, args.plot)):
        check_writable(file)
    from ..measure.speed import cpu_description, machine_peaks
    from ..measure.tables import markdown_lines

    peaks = machine_peaks(args.threads)
    header = [cpu_description(), *_peak_texts(peaks), *(f"{name}={value}" for name, value in properties.items())]
    print(", ".join(header) + "\n")
    if args.linear_only:
        found = _linear_only(args, peaks)
    else:
        found = _attention_only(args, peaks["stream"]) if args.attention_only else _models(args)
    rows: list[dict[str, Any]] = []
    for line in markdown_lines(_kept(found, rows)):
        print(line, flush=True)
    try:
        if args.json:
            written = {"cpu": cpu_description(), "peaks": peaks, "properties": properties, "measurements": rows}
            args.json.write_text(json.dumps(written, indent=2) + "\n")
        if args.plot:
            plot(rows, args.plot)
    except OSError as error:
        raise ExportError(f"{error.filename}: cannot be written ({error.strerror})") from error
    return 0


def _check_options(args: argparse.Namespace, properties: dict[str, str]) -> None:
    """Raises `UsageError` for options that do not go together, and for a plot that could not be drawn."""
    if args.attention_only:
        if args.models or args.plot or args.attention:
            raise UsageError("--attention-only takes no models, measures every --attention and draws no plot")
        if args.linear or args.new_tokens:
            raise UsageError("--attention-only measures no linear layers, and one new token; leave those options out")
        if properties:
            raise UsageError("--attention-only compares ways at their default precisions; leave out others")
    if args.linear_only:
        if args.models or args.plot or args.attention or args.attention_only:
            raise UsageError("--linear-only takes no models, measures no attention and draws no plot")
        if args.linear or args.new_tokens:
            raise UsageError("--linear-only measures every --linear, and --rows at once; leave those options out")
        if properties:
            raise UsageError("--linear-only compares ways at their default precisions; leave out others")
    elif args.rows:
        raise UsageError("--rows goes with --linear-only; prompts have --prompt-tokens")
    if args.plot:
        _check_plot(args.plot)


@dataclass(frozen=True)
class _Row:
    values: dict[str, Any]
    """As JSON has it."""
    cells: dict[str, str]
    """As the table has it."""


def _kept(found: Iterator[_Row], rows: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Yields the cells of each row as soon as it is there, and appends its values to `rows`."""
    for row in found:
        rows.append(row.values)
        yield row.cells


def _models(args: argparse.Namespace) -> Iterator[_Row]:
    from ..integrations import registration  # noqa: F401  before any file is read
    from ..measure.speed import measure
    from .embedded import embedded_model

    with ExitStack() as stack:
        models = args.models
        if not models:
            models = [stack.enter_context(embedded_model("int8"))]
            print("The tiny model of the package: its times say little about real ones.\n")
        for m in measure(
            models,
            args.attention or WAYS[:2],
            args.prompt_tokens,
            args.new_tokens or _NEW_TOKENS,
            args.repetitions,
            args.threads,
            computation_options(args),
            args.linear,
        ):
            yield _Row(m.to_dict(), _cells(m))


def _cells(m: Measurement) -> dict[str, str]:
    cpi = "not counted" if m.cycles_per_instruction is None else f"{m.cycles_per_instruction:.2f}"
    return {
        "model": Path(m.model).name,
        "weights": m.weights,
        "attention": m.way,
        "prompt": f"{m.prompt_tokens}",
        "first token (ms)": f"{m.first_token_seconds * 1e3:.1f}",
        "then each (ms)": f"{m.token_seconds * 1e3:.2f}",
        "read (GB/s)": f"{m.bandwidth:.1f}",
        "of a stream": f"{100 * m.bandwidth_share:.0f} %",
        "CPI": cpi,
    }


def _attention_only(args: argparse.Namespace, bandwidth: float) -> Iterator[_Row]:
    from ..measure.attention import CHATGLM3, CHATGLM_6B, measure_attention

    shape = {"chatglm3": CHATGLM3, "chatglm": CHATGLM_6B}[args.attention_only]
    for length in args.prompt_tokens:
        for new, past in ((length, 0), (1, length)):
            repetitions = args.repetitions if new > 1 else _SHORT_REPETITIONS * args.repetitions
            found = measure_attention(shape, new, past, repetitions=repetitions, threads=args.threads)
            for m in found:
                cells = {
                    "attention": m.way,
                    "new tokens": f"{new}",
                    "after": f"{past}",
                    "time of a layer (ms)": f"{m.seconds * 1e3:.3f}",
                    "GFLOP/s": f"{m.gigaflops:.0f}",
                    **_layer_cells(m, bandwidth, found[0].seconds),
                }
                yield _Row(asdict(m), cells)


def _layer_cells(m: AttentionMeasurement | LinearMeasurement, stream: float, native_seconds: float) -> dict[str, str]:
    return {
        "read (GB/s)": f"{m.gigabytes:.1f}",
        "of a stream": f"{100 * m.gigabytes / stream:.0f} %",
        "times native": f"{m.seconds / native_seconds:.2f}",
    }


def _peak_texts(peaks: dict[str, float]) -> list[str]:
    """Formats the peaks of the machine for the header."""
    units = {"stream": "GB/s"}
    return [f"{kind} {peak:.{1 if peak >= 10 else 2}f} {units.get(kind, 'TFLOP/s')}" for kind, peak in peaks.items()]


def _linear_only(args: argparse.Namespace, peaks: dict[str, float]) -> Iterator[_Row]:
    from ..measure.linear import CHATGLM3, CHATGLM_6B, WAYS, measure_linear

    shape = {"chatglm3": CHATGLM3, "chatglm": CHATGLM_6B}[args.linear_only]
    # what the native operations compute with
    kind = next((kind for kind in ("tile-bf16", "vnni-int8", "f32") if kind in peaks), None)
    native_seconds = 0.0  # of the native way, which comes first
    for m in measure_linear(shape, args.rows or _ROWS, repetitions=args.repetitions, threads=args.threads):
        if m.way == WAYS[0]:
            native_seconds = m.seconds
        cells = {
            "layer": m.layer,
            "weights": m.weights,
            "rows": f"{m.rows}",
            "linear": m.way,
            "time of a layer (ms)": f"{m.seconds * 1e3:.3f}",
            "TFLOP/s": f"{m.teraflops:.2f}",
            f"of {kind}": f"{100 * m.teraflops / peaks[kind]:.0f} %" if kind else "",
            **_layer_cells(m, peaks["stream"], native_seconds),
        }
        yield _Row(asdict(m), cells)


def _check_plot(file: Path) -> None:
    """Raises before anything is measured if the plot could not be drawn."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UsageError('--plot needs matplotlib: pip install "optimum-chatglm-ov[bench]"') from error
    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise UsageError(f"--plot {file}: the name must end in one of .{', .'.join(sorted(known))}")


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws first-token time and time per token by prompt length, a line for each model and way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{Path(row['model']).name}, {row['way']}", []).append(row)
    columns = (("first_token_seconds", "first token"), ("token_seconds", "each token after it"))
    for axes, (column, title) in zip(figure.subplots(1, 2), columns):
        for name, points in lines.items():
            axes.plot([p["prompt_tokens"] for p in points], [1e3 * p[column] for p in points], "o-", label=name)
        axes.set(title=title, xlabel="tokens in the prompt", ylabel="milliseconds", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(file, dpi=150)
