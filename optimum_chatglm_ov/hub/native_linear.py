# SPDX-License-Identifier: Apache-2.0
"""What the model card says of native linear layers."""

from __future__ import annotations

import json

import openvino as ov


_OPERATIONS = ("ChatGLMLinear", "ChatGLMMLP")


def has_native_linears(model: ov.Model) -> bool:
    """Tells whether linear layers of `model` are native operations of this package."""
    return any(node.get_type_name() in _OPERATIONS for node in model.get_ops())


def native_linear_usage(repo_id: str) -> str:
    """Says how openvino-genai and Model Server load such a model."""
    return f"""
The linear layers are native operations of optimum_chatglm_ov, for CPU. Other programs need its library:

```python
import openvino_genai
from optimum_chatglm_ov import extension_path

folder = {json.dumps(str(repo_id), ensure_ascii=False)}  # a local folder
pipeline = openvino_genai.LLMPipeline(folder, "CPU", {{"extensions": [str(extension_path())]}})
print(pipeline.generate("你好", max_new_tokens=64))
```

OpenVINO Model Server takes the path of the library in `--cpu_extension`. Weights are packed alike for every CPU; a
library that reads another packing refuses the model and says so.
"""
