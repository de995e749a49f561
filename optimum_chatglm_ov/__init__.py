# SPDX-License-Identifier: Apache-2.0
"""ChatGLM, every generation, on OpenVINO: a plugin of optimum-intel.

Importing it makes `AutoConfig`, `AutoTokenizer`, `AutoModelForCausalLM`, `AutoModel` and pipelines know ChatGLM
checkpoints, original and exported, without remote code.
"""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any


def _is_command() -> bool:
    """Tells whether this process is `chatglm-ov`, which needs torch, transformers and OpenVINO only for its work."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    # "-m" stands there while Python looks for the module to run, and so imports this package
    return os.path.basename(program) == "chatglm-ov" or (program == "-m" and f"{__name__}.cli.main" in sys.orig_argv)


def __getattr__(name: str) -> Any:
    """Imports a public name that is not there yet: `export_model`, and in the process of `chatglm-ov` all of them.

    The first one that is asked for imports and registers everything.
    """
    # `from . import module` asks for a module's name here before it imports it
    if not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is None:
        registration = importlib.import_module(".integrations.registration", __name__)
        if name in registration.__all__:
            return getattr(registration, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    from .export.exporter import export_model as export_model
    from .integrations.registration import *  # noqa: F403
    from .integrations.registration import __all__ as __all__
elif not _is_command():
    registration = importlib.import_module(".integrations.registration", __name__)
    __all__ = registration.__all__
    globals().update({name: value for name, value in vars(registration).items() if name in __all__})
    del registration
