# SPDX-License-Identifier: Apache-2.0
"""What transformers is told of this package."""
