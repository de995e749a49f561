# SPDX-License-Identifier: Apache-2.0
"""ChatGLM architectures as OpenVINO graphs, and the families of checkpoints that have them."""
