# SPDX-License-Identifier: Apache-2.0
"""How this package fits into transformers: what is told to it and changed in it, and the public names."""
