# SPDX-License-Identifier: Apache-2.0
"""From an original checkpoint to an OpenVINO IR folder."""

from .exporter import export_model


__all__ = ["export_model"]
