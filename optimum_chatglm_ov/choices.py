# SPDX-License-Identifier: Apache-2.0
"""The values of arguments that have a few. Imports nothing: the command line lists them without waiting for torch."""

ATTENTIONS = ("openvino", "native", "auto")
"""Who computes attention: OpenVINO, the native operation of this package, or the latter where it can."""
LINEARS = ("openvino", "native", "native-int8", "auto")
"""Who computes linear layers, in the same words; "native-int8" rounds activations further."""
_EARLIER_NAMES = {"sdpa": "openvino", "fused": "native", "fused-int8": "native-int8"}

KV_CACHE_PRECISIONS = {"bf16": "bf16", "f16": "bf16", "u8": "i8", "f32": "f32"}
"""The cache precision for each value of OpenVINO's property `KV_CACHE_PRECISION` that fused attention serves."""

FLOATING_FORMATS = ("original", "fp32", "fp16", "bf16")
QUANTIZED_FORMATS = ("int8", "int4", "nf4", "mxfp4", "cb4")
WEIGHT_FORMATS = FLOATING_FORMATS + QUANTIZED_FORMATS

WAYS = ("openvino", "native", "native-int8", "paged")
"""What is timed: OpenVINO's stateful attention, the native operation with its bf16 and its int8 cache, and
openvino-genai with OpenVINO's PagedAttention; each with OpenVINO's own defaults for everything that is not chosen."""


def canonical(value: str) -> str:
    """Returns the name of a choice; version 0.1.0 called some "sdpa", "fused" and "fused-int8"."""
    return _EARLIER_NAMES.get(value, value)
