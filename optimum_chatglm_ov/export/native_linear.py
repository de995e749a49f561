# SPDX-License-Identifier: Apache-2.0
"""An IR whose linear layers are native operations, which GenAI and Model Server run with this package's library."""

from __future__ import annotations

import openvino as ov

from .. import native
from ..errors import ExportError
from ..native.fuse_linear import fuse_linears


_OUTPUT = "logits"


def check_linear(linear: str, attention: str) -> None:
    """Refuses what cannot be exported before a checkpoint is read.

    Raises:
        NativeBuildError: `linear="native"`, and the native library is not there and cannot be built.
        ValueError: an unknown choice, or one that contradicts `attention`.
    """
    if linear not in ("openvino", "native"):
        raise ValueError(f"`linear` is {linear!r}; expected 'openvino' or 'native'.")
    if linear == "native":
        if attention != "openvino":
            raise ValueError(
                "`linear='native'` is for openvino-genai and Model Server, which have attention of their own; leave "
                "`attention` out."
            )
        native.extension_path()


def make_linears_native(model: ov.Model) -> None:
    """Replaces the int8 and int4 linear layers of `model`, except its output layer.

    GenAI looks for that one among OpenVINO's operations, to compute the last position alone. The weights are packed
    alike for every CPU. A library of another version that packs otherwise refuses the model.

    Raises:
        ExportError: there are no layers that the native operations take.
    """
    head = model.output(_OUTPUT).node.input_value(0).get_node()
    if not fuse_linears(model, keeps=(head,)):
        raise ExportError(
            "`linear='native'`: the model has no int8 or int4 linear layers that the native operations take. Export "
            "with `weight_format` int8 or int4."
        )
