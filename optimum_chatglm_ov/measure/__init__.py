# SPDX-License-Identifier: Apache-2.0
"""Measurements: speed of models and of their parts, and how much two models differ."""
