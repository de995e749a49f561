# SPDX-License-Identifier: Apache-2.0
"""Running a compiled model: its calls, its caches, and generation around them."""
