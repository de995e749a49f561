# SPDX-License-Identifier: Apache-2.0
"""Writes a graph with its weights, and looks whether all of it was written."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from xml.etree import ElementTree

import openvino as ov

from ..errors import ExportError
from ..ir import weight_precision


def save_model(model: ov.Model, file: Path) -> None:
    """Writes `model` as `file` (.xml) and the .bin beside it, weights in their own precision.

    Raises:
        ExportError: fewer bytes were written than the model has.
    """
    _describe(model)
    ov.save_model(model, file, compress_to_fp16=False)
    check_size(file)


def _describe(model: ov.Model) -> None:
    """Writes what made the model into its `rt_info`, in the form optimum-intel reads."""
    for package in ("transformers", "optimum-intel", "nncf", "optimum-chatglm-ov"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        model.set_rt_info(version, ["optimum", f"{package.replace('-', '_')}_version"])
    precision, compression = weight_precision(model), ["nncf", "weight_compression"]
    if precision in ("int8", "int4") and not model.has_rt_info(compression):
        # integers that NNCF did not make: marked as its own, so that no tool quantises them again
        model.set_rt_info(f"{precision}_sym", [*compression, "mode"])


def check_size(xml: Path) -> None:
    """Checks that all was written: where a disk fills up, OpenVINO does not always raise, and the file is too short.

    Raises:
        ExportError: the weights are shorter than the graph says.
    """
    ends = (int(data.get("offset", 0)) + int(data.get("size", 0)) for data in ElementTree.parse(xml).iter("data"))
    expected, weights = max(ends, default=0), xml.with_suffix(".bin")
    found = weights.stat().st_size if weights.is_file() else 0
    if found < expected:
        raise ExportError(
            f"{xml.parent}: only {found} of {expected} bytes of the weights were written; is the disk full? Nothing "
            "was changed."
        )
