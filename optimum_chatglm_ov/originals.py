# SPDX-License-Identifier: Apache-2.0
"""What scripts written for the original model classes call, beside `chat()` and `stream_chat()`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import BatchEncoding, PretrainedConfig

from .chat import StreamedTokens
from .runtime.compilation import core
from .runtime.token_stream import TokenStream
from .tokenization.chat_rules import RULES, History, Response
from .tokenization.messages import as_messages
from .tokenization.template_chat import GENERATION, chat_tokenizer, has_template
from .tokenization.thoughts import without_thought


logger = logging.getLogger(__name__)

_NO_EFFECT = {
    "bfloat16": 'pass `dtype=torch.bfloat16` (weights) or `ov_config={"INFERENCE_PRECISION_HINT": "bf16"}`',
    "cpu": 'the device is chosen with `device="CPU"`, the default',
    "cuda": 'OpenVINO runs on its own devices: pass `device="GPU"` for one of Intel\'s',
    "float": 'pass `dtype=torch.float32` (weights) or `ov_config={"INFERENCE_PRECISION_HINT": "f32"}` (computation)',
    "half": 'pass `dtype=torch.float16` (weights) or `ov_config={"INFERENCE_PRECISION_HINT": "f16"}` (computation)',
    "quantize": 'pass `quantization_config={"bits": 4}` or `load_in_8bit=True`',
}


# Of torch, and none of OpenVINO's; "xpu" is Intel's GPU, but a script that says so means torch.
_DEVICES_OF_TORCH = ("hpu", "meta", "mps", "xla", "xpu")


def openvino_device(device: Any) -> str:
    """Names OpenVINO's device that `device` means: a name, a `torch.device`, or the number of one of CUDA's.

    CUDA's are none of OpenVINO's: the CPU takes their place, and the log says so.

    Raises:
        ValueError: it is another of torch's devices, or nothing of all that.
    """
    name = str(device) if isinstance(device, (str, torch.device)) else ""
    kind = "cuda" if type(device) is int else name.partition(":")[0].lower()
    if kind == "cuda":
        logger.warning(f"The device {device!r} has no effect: {_NO_EFFECT['cuda']}. The model runs on the CPU.")
        return "CPU"
    if not name or kind in _DEVICES_OF_TORCH:
        raise ValueError(
            f"`device` is {device!r}; expected a device of OpenVINO, here {', '.join(core.available_devices)}, or "
            'a way to choose among them ("AUTO"). Leave it out for the CPU.'
        )
    return name


def _without_effect(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        logger.warning(
            f"`{name}()` has no effect: {_NO_EFFECT[name]}, to `from_pretrained`. The model is returned as it is."
        )
        return self

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"Returns the model as it is, and logs what to use instead: {_NO_EFFECT[name]}."
    return method


def _generations(config: PretrainedConfig) -> tuple[str, ...]:
    """Lists the generations whose rules a model may have."""
    return (GENERATION,) if has_template(config) else config.generations


def _generation_of_messages(config: PretrainedConfig) -> str:
    """Guesses a model's generation among those whose conversations are messages; a tokenizer would know for sure."""
    if has_template(config):
        return GENERATION
    family = config.named_family()
    if family is not None and RULES[family.generation].has_messages:
        return family.generation
    return "glm4" if config.has_vocabulary_of_ranks else "chatglm3"


class OriginalsMixin:
    """Methods of the original model classes for a [`ChatMixin`]."""

    bfloat16, cpu, cuda, float, half, quantize = map(
        _without_effect, ("bfloat16", "cpu", "cuda", "float", "half", "quantize")
    )

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Any:
        """Moves the model to an OpenVINO device; a type of numbers changes nothing, as in optimum-intel.

        CUDA's devices are none of OpenVINO's: nothing moves, and the log says so.

        Raises:
            ValueError: see [`openvino_device`].
        """
        if isinstance(device, torch.dtype):
            return super().to(device, *args, **kwargs)
        if type(device) is int or str(device).lower().startswith("cuda"):
            return self.cuda()
        name = openvino_device(device)
        return super().to(name if isinstance(device, str) else device, *args, **kwargs)

    def build_inputs(
        self, tokenizer: Any, query: str, history: History | None = None, role: str = "user"
    ) -> BatchEncoding:
        """Builds the prompt of one more turn, int64 tensors [1, L]; arguments as those of `chat()`."""
        return chat_tokenizer(tokenizer, self).build_chat_input(query, history=history, role=role).to(self.device)

    def process_response(
        self, output: str | None = None, history: History | None = None, response: str | None = None
    ) -> str | tuple[Response, History]:
        """Makes a response of a generated text.

        Args:
            output: the text.
            response: the same, as ChatGLM and ChatGLM2 name it.
            history: from ChatGLM3 on, the messages, with the one that is answered; left as it is. Without it the text
                is processed as ChatGLM and ChatGLM2 do.

        Returns:
            The response; with `history` a pair, the response (a text, or a call as a dictionary) and the messages with
            those of the text.

        Raises:
            ToolCallError: the arguments of a call cannot be read.
            TypeError: `history` for ChatGLM, whose conversations are pairs; no text, or two.
        """
        if (output is None) == (response is None):
            raise TypeError("process_response() takes one text, as `output` or `response`.")
        output = response if output is None else output
        if has_template(self.config):
            output = without_thought(output)
        possible = [RULES[generation] for generation in _generations(self.config)]
        if history is not None and not any(rules.has_messages for rules in possible):
            raise TypeError("process_response() takes the text alone with ChatGLM-6B; leave `history` out.")
        if history is None:
            return (possible[0].process_text or RULES["chatglm2"].process_text)(output)
        return RULES[_generation_of_messages(self.config)].read_answer(output, as_messages(history))

    @torch.no_grad()
    def stream_generate(
        self,
        input_ids: torch.LongTensor,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        return_past_key_values: bool = False,
        past_key_values: StreamedTokens | None = None,
        **kwargs: Any,
    ) -> Iterator[torch.LongTensor | tuple[torch.LongTensor, StreamedTokens]]:
        """Generates step by step; closing the iterator stops it.

        Args:
            input_ids: int64 [B, L].
            generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, kwargs: as in `generate`.
            return_past_key_values: also give a second item, which goes on from here, of one sequence.
            past_key_values: such an item; `input_ids` are what follows it.

        Yields:
            int64 [B, L + n] after the n-th step: `input_ids` and all new tokens.

        Raises:
            ValueError: see `generate`; beams, or more than one sequence for each row, were asked for.
        """
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        for name in ("num_beams", "num_return_sequences"):
            if (getattr(settings, name, None) or 1) != 1:
                raise ValueError(
                    f"`stream_generate` shows the sequence of each row while it grows, so `{name}` is 1; repeat the "
                    "rows of `input_ids` for several samples, or use `generate`."
                )
        batch, given = input_ids.shape[0], input_ids
        if past_key_values is not None:
            given = torch.cat((past_key_values.input_ids, input_ids), dim=1)
            for name in (
                "attention_mask",
                "position_ids",
            ):  # of `input_ids` alone, or with the past; it has no padding
                kwargs.pop(name, None)
            kwargs["attention_mask"] = torch.ones_like(given)
        optional = {
            "logits_processor": logits_processor,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
        }
        settings = {name: value for name, value in optional.items() if value is not None} | kwargs
        ids, step = given, []
        with TokenStream(
            self.generate,
            inputs=given,
            generation_config=generation_config,
            stopping_criteria=stopping_criteria,
            **settings,
        ) as tokens:
            for token in tokens:
                step.append(token)
                if len(step) < batch:
                    continue
                cached, ids = ids, torch.cat((ids, torch.tensor(step)[:, None]), dim=1)
                step = []
                new_ids = ids[:, given.shape[1] - input_ids.shape[1] :]
                yield (new_ids, StreamedTokens(cached)) if return_past_key_values else new_ids
