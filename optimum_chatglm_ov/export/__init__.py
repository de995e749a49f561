# SPDX-License-Identifier: Apache-2.0
"""From an original checkpoint to an OpenVINO IR folder."""
