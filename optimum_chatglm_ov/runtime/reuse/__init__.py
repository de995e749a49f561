# SPDX-License-Identifier: Apache-2.0
"""Keys and values that are computed once: kept in memory, in a folder, in a file."""
