# SPDX-License-Identifier: Apache-2.0
"""The values of arguments that have a few. Imports nothing: the command line lists them without waiting for torch."""

ATTENTIONS = ("sdpa", "fused", "auto")
LINEARS = ("openvino", "fused", "fused-int8", "auto")

KV_CACHE_PRECISIONS = {"bf16": "bf16", "f16": "bf16", "u8": "i8", "f32": "f32"}
"""The cache precision for each value of OpenVINO's property `KV_CACHE_PRECISION` that fused attention serves."""

FLOATING_FORMATS = ("original", "fp32", "fp16", "bf16")
QUANTIZED_FORMATS = ("int8", "int4", "nf4", "mxfp4", "cb4")
WEIGHT_FORMATS = FLOATING_FORMATS + QUANTIZED_FORMATS

WAYS = ("sdpa", "fused", "fused-int8", "paged")
"""What is timed: OpenVINO's stateful attention, the fused operation with its bf16 and its int8 cache, and
openvino-genai with OpenVINO's PagedAttention; each with OpenVINO's own defaults for everything that is not chosen."""
