# SPDX-License-Identifier: Apache-2.0
"""Original checkpoints: their tensors, and what is merged into them."""
