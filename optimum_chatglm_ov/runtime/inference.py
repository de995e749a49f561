# SPDX-License-Identifier: Apache-2.0
"""What one call of a model computes, and what generation does around the calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import openvino as ov
import torch
from optimum.intel.openvino import OVModelForCausalLM
from transformers import Cache, GenerationConfig
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ContextLengthError
from .cache import FusedCache
from .compilation import LOGITS_TO_KEEP
from .inputs import check_input_ids, check_prompt, two_dimensional_mask, two_dimensional_positions


# Settings of generation whose way does not lead through this model: the value that means nothing, and why.
_UNSUPPORTED = {
    "guidance_scale": (1, "it computes two sequences in turns, and this model holds the keys and values of one"),
    "penalty_alpha": (0, "contrastive search copies keys and values, which this model keeps inside"),
    "dola_layers": (None, "it compares layers, and this model gives what follows from the last one"),
    "assistant_early_exit": (None, "it leaves a model after some layers, and this one is compiled as a whole"),
    "prefill_chunk_size": (None, "this model computes a prompt in one call"),
    "output_attentions": (False, "attention is one operation, which keeps its weights to itself"),
    "output_hidden_states": (False, "what is between the layers does not leave the compiled model"),
}
# What transformers' generation hands to `forward` besides its own arguments, and has no meaning here.
_ARGUMENTS_OF_GENERATION = {"cache_position", "return_dict", "use_cache"}
# What callers of any model may name, as long as they ask for nothing with it.
_ARGUMENTS_OF_OTHER_MODELS = {"inputs_embeds", "labels", "output_attentions", "output_hidden_states", "token_type_ids"}


class InferenceMixin:
    """`forward` and `generate` of an optimum-intel model class; comes before `CompilationMixin`, whose model it runs.

    An instance holds one sequence (or batch) at a time; calls of several threads take turns.
    """

    _prompt_layout: np.ndarray | None = None  # waiting for the next prompt, see `generate`

    def __init__(self, *args: Any, **kwargs: Any):
        self._turn = threading.RLock()
        super().__init__(*args, **kwargs)

    @contextmanager
    def _turns(self, assistant: Any) -> Iterator[None]:
        """The turn of this model and of the one that drafts for it, if that is of this class, too."""
        models = {id(model): model for model in (self, assistant) if isinstance(model, InferenceMixin)}
        with ExitStack() as turns:
            for _, model in sorted(models.items()):  # by all threads in one order: two could wait for each other
                turns.enter_context(model._turn)
            yield

    def clear_requests(self) -> None:
        """Gives the compiled model and its caches back; the next call compiles again."""
        with self._turn:
            super().clear_requests()
            self._past_length = 0

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        past_key_values: tuple | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes logits; the key/value cache stays in the inference request.

        Args:
            input_ids: int64 `[batch, new_tokens]`.
            attention_mask: int64 `[batch, past + new_tokens]`, 0 for (left) padding; chatglm-6b also takes its
                tokenizer's boolean `[batch, 1, tokens, tokens]`, True = hidden.
            past_key_values: `None` starts a new sequence (the state is reset); what the last call returned goes on,
                with fused attention also after its `crop`.
            position_ids: int64 `[batch, new_tokens]`; chatglm-6b also takes its tokenizer's `[batch, 2, tokens]`.
            logits_to_keep: logits of that many last positions; 0 = all.
            kwargs: `use_cache`, `return_dict` and `cache_position`, which change nothing.

        Returns:
            `logits`, f32 `[batch, new_tokens or logits_to_keep, vocab_size]`, and `past_key_values`: a marker, with
            fused attention a [`FusedCache`].

        Raises:
            ContextLengthError: past and new tokens are more than the context length.
            TypeError: another argument, such as `labels`, `inputs_embeds` or `output_hidden_states`.
            ValueError: a tensor of another shape; an id beyond the vocabulary; a chatglm-6b prompt without `<sop>` or
                a mask token; `past_key_values` that are not what the model holds, or beams.
        """
        unknown = [
            name
            for name, value in kwargs.items()
            if name not in _ARGUMENTS_OF_GENERATION
            and not (name in _ARGUMENTS_OF_OTHER_MODELS and (value is None or value is False))
        ]
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.forward() does not know the argument(s) {unknown}: it computes the logits of "
                "`input_ids`, and nothing else. Leave them out."
            )
        with self._turn:
            return self._forward(input_ids, attention_mask, past_key_values, position_ids, int(logits_to_keep))

    def _forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        past_key_values: tuple | None,
        position_ids: torch.LongTensor | None,
        logits_to_keep: int,
    ) -> CausalLMOutputWithPast:
        self.compile()
        prompt_layout, self._prompt_layout = self._prompt_layout, None
        check_input_ids(input_ids, self.config)
        batch, new_tokens = input_ids.shape
        past_length = self._get_past_length(past_key_values)
        self._check_context(past_length + new_tokens)
        if past_length and batch != len(self.next_beam_idx):
            raise ValueError(
                f"`past_key_values` hold {len(self.next_beam_idx)} sequences, but `input_ids` has {batch} rows. Leave "
                "`past_key_values` out to start new sequences."
            )
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` is {logits_to_keep}; expected a number of positions, or 0 for all.")
        attention_mask = two_dimensional_mask(attention_mask, batch, past_length + new_tokens)
        position_ids, layout = two_dimensional_positions(
            position_ids, attention_mask, batch, new_tokens, past_length, self.config
        )
        if layout is None:
            layout = prompt_layout
        if past_key_values is None and layout is None:
            check_prompt(input_ids, self.config)
        inputs = self.prepare_inputs(input_ids, attention_mask, past_key_values, position_ids)
        if past_key_values is None and layout is not None:
            self._set_prompt_layout(layout)
        copies = None
        if self._first_iter_beam_search:
            if layout is None:
                inputs, copies = self._deduplicate_inputs(inputs)
            self._first_iter_beam_search = False
        inputs[LOGITS_TO_KEEP] = np.array(logits_to_keep, dtype=np.int64)

        if self._fused is not None:
            if past_key_values is None:
                self._fused.reset()
            self._fused.reorder(inputs["beam_idx"])
            self._fused.prepare(len(inputs["input_ids"]), new_tokens)
            inputs = {name: value for name, value in inputs.items() if name in self._fused_inputs}
        try:
            self.request.start_async(inputs, share_inputs=True)
            self.request.wait()
        except RuntimeError:  # OpenVINO's own: nothing was started, or it has ended; another thread's goes on
            raise
        except BaseException:
            # interrupted between the two: the request must not go on while the caller believes that it has ended
            self.request.cancel()
            with suppress(RuntimeError):
                self.request.wait()
            raise
        self.next_beam_idx = np.arange(len(inputs["input_ids"]))  # rows are reordered once
        if self._fused is not None:
            self._fused.advance(new_tokens)
        logits = torch.from_numpy(self.request.get_tensor("logits").data.copy())
        self._past_length = past_length + new_tokens
        if self._fused is None:
            past_key_values = ((),)
        elif past_key_values is None:
            past_key_values = FusedCache(self._fused, self._context_tokens(inputs["attention_mask"]))
        if copies is not None:
            logits, past_key_values = self._expand_outputs_for_generation(copies, logits, past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _get_past_length(self, past_key_values: tuple | FusedCache | None = None) -> int:
        is_marker = self._fused is None and past_key_values == ((),) and self._past_length
        if past_key_values is None or is_marker:
            return super()._get_past_length(past_key_values)
        if not isinstance(past_key_values, FusedCache) or not past_key_values.belongs_to(self._fused):
            raise ValueError(
                f"`past_key_values` is a {type(past_key_values).__name__} that this model has not returned; its "
                "caches hold nothing of it. Leave it out to start a new sequence."
            )
        length = past_key_values.get_seq_length()
        if past_key_values.beams_from is not None and length > past_key_values.beams_from:
            raise ValueError(
                "`past_key_values` hold the beams that a beam search ended with, which are not the sequences that it "
                f"returned. Leave them out, or `crop({past_key_values.beams_from})` them to the prompt."
            )
        return length

    def _deduplicate_inputs(self, model_inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        # optimum-intel's takes rows of equal ids for one, whatever their masks and positions
        rows = np.concatenate([model_inputs[name] for name in ("input_ids", "attention_mask", "position_ids")], axis=1)
        _, first, copies = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        return {
            **{name: value[first] for name, value in model_inputs.items()},
            "beam_idx": np.arange(len(first)),
        }, copies

    def _context_tokens(self, attention_mask: np.ndarray) -> int:
        """Tokens at the beginning of the prompt that see each other in both directions, padding included."""
        for state in self.request.query_state():
            if state.name == "prompt_layout":
                padding = (attention_mask == 0).sum(axis=1)
                return int((padding + state.state.data[:, 0]).max())
        return 0

    def _set_prompt_layout(self, layout: np.ndarray) -> None:
        for state in self.request.query_state():
            if state.name == "prompt_layout":
                state.state = ov.Tensor(layout)

    def _check_context(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ContextLengthError(
                f"{length} tokens (prompt and new ones) were asked for, but the context length of this model is "
                f"{limit}. Shorten the prompt or the history, or lower `max_new_tokens`/`max_length`."
            )

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs: Any):
        """As in transformers; see `GenerationMixin.generate`. `trust_remote_code` has no effect.

        With fused attention also `assistant_model` (another instance of this class, loaded so too),
        `prompt_lookup_num_tokens`, and `past_key_values` of an earlier output of this model, with the whole sequence
        as `input_ids`: what the cache holds of it is not computed again.

        Raises:
            ContextLengthError: the prompt and the tokens to generate are more than the context length; nothing is run.
            ValueError: see `forward`; assisted generation with a cache that cannot take tokens back;
                `past_key_values` that are outdated or hold beams; a folder or repository as `custom_generate`;
                `guidance_scale`, `penalty_alpha`, `dola_layers`, `assistant_early_exit`, `prefill_chunk_size`,
                `output_attentions` or `output_hidden_states`, which are not for this model.
        """
        with self._turns(kwargs.get("assistant_model")):
            return self._generate(inputs, generation_config, **kwargs)

    def _generate(self, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, **kwargs: Any):
        if isinstance(kwargs.get("custom_generate"), (str, os.PathLike)):
            raise ValueError(
                f"`custom_generate` is {str(kwargs['custom_generate'])!r}: no code of a folder or repository is ever "
                "run. Give a function of your own."
            )
        kwargs.pop("trust_remote_code", None)  # some ways of generation are on the Hub by now
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        self._check_settings(settings, kwargs.get("assistant_model"))
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None:
            check_input_ids(input_ids, self.config)
            self._limit_length(input_ids.shape[1], settings, generation_config, kwargs)
        if (past := kwargs.get("past_key_values")) is not None:
            self._check_continuation(past, input_ids, settings)
        try:
            if input_ids is not None:
                self._prepare_tensors(input_ids, settings, kwargs)
            output = super().generate(inputs, generation_config, **kwargs)
            if self._fused is not None and self._fused.past_length:  # what a search chose last
                self._fused.reorder(self.next_beam_idx)
                self.next_beam_idx = np.arange(self._fused.batch_size)
            past = getattr(output, "past_key_values", None)
            if (settings.num_beams or 1) > 1 and isinstance(past, FusedCache):
                prompt_length = 0 if input_ids is None else input_ids.shape[1]
                if past.get_seq_length() > prompt_length:
                    past.beams_from = prompt_length
            return output
        finally:
            self._first_iter_beam_search = self._second_iter_beam_search = False
            self._prompt_layout = None

    def _prepare_tensors(
        self, input_ids: torch.LongTensor, settings: GenerationConfig, kwargs: dict[str, Any]
    ) -> None:
        """Puts chatglm-6b's own masks and positions in the form that generation goes on with."""
        batch, tokens = input_ids.shape
        mask = two_dimensional_mask(kwargs.pop("attention_mask", None), batch, tokens)
        positions, layout = kwargs.pop("position_ids", None), None
        if kwargs.get("past_key_values") is None:
            positions, layout = two_dimensional_positions(positions, mask, batch, tokens, 0, self.config)
        elif positions is not None and positions.dim() == 3:
            positions = None  # the prompt before has said it; 2-D ones may end early, as those for assistants do
        given = {"attention_mask": mask, "position_ids": positions}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        if layout is not None:
            copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
            self._prompt_layout = layout.repeat(copies, axis=0)

    def _limit_length(
        self,
        prompt_length: int,
        settings: GenerationConfig,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Checks lengths that were asked for, and keeps a checkpoint's own default within the context length."""
        if settings.max_new_tokens is not None:
            self._check_context(prompt_length + settings.max_new_tokens)
            return
        asked = kwargs.get("max_length") or getattr(generation_config, "max_length", None) or 0
        self._check_context(max(prompt_length, asked))
        if (settings.max_length or 0) > self.config.max_position_embeddings:
            kwargs["max_length"] = self.config.max_position_embeddings

    def _check_settings(self, settings: GenerationConfig, assistant: Any) -> None:
        for name, (neutral, reason) in _UNSUPPORTED.items():
            value = getattr(settings, name, None)
            if value not in (None, neutral):
                raise ValueError(f"`{name}` is {value!r}: {reason}. Leave it out.")
        if assistant is not None or settings.prompt_lookup_num_tokens:
            self._check_rollback(assistant)

    def _check_rollback(self, assistant: Any) -> None:
        for name, model in (("model", self), ("assistant model", assistant)):
            if not isinstance(model, OVModelForCausalLM):
                continue  # no assistant, or one of another library
            if isinstance(model, InferenceMixin):
                model.compile()
            if getattr(model, "_fused", None) is None:
                raise ValueError(
                    "Assisted generation (`assistant_model`, `prompt_lookup_num_tokens`) takes tokens back, and the "
                    f"key/value cache inside this {name} cannot. Load it as "
                    '`OVChatGLMForCausalLM.from_pretrained(..., attention="native")`.'
                )
        if assistant is self:
            raise ValueError("`assistant_model` is this very model; load another, which has caches of its own.")

    def _check_continuation(
        self, past_key_values: Any, input_ids: torch.Tensor | None, settings: GenerationConfig
    ) -> None:
        self.compile()
        if not isinstance(past_key_values, Cache):
            raise ValueError(
                f"`past_key_values` is a {type(past_key_values).__name__}; `generate` goes on from the `FusedCache` "
                "that a model with fused attention returns. Leave it out."
            )
        past_length = self._get_past_length(past_key_values)
        if input_ids is None or input_ids.shape[-1] <= past_length:
            raise ValueError(
                f"`past_key_values` hold {past_length} tokens; expected `input_ids` of the whole sequence, those "
                "tokens and new ones. Pass more, or `crop()` the cache first."
            )
        if (settings.num_beams or 1) > 1:
            raise ValueError("A beam search cannot go on from `past_key_values`. Leave them out.")
        rows = input_ids.shape[0] * (settings.num_return_sequences or 1)
        if rows != past_key_values.batch_size:
            raise ValueError(
                f"`past_key_values` hold {past_key_values.batch_size} sequences (each beam is one), but {rows} were "
                "asked for (rows of `input_ids`, times `num_return_sequences`). Leave `past_key_values` out."
            )

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any):
        generator = super()._get_candidate_generator(generation_config, *args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            return _WithinLength(generator, generation_config.max_length)
        return generator

    def _temporary_reorder_cache(self, past_key_values: Any, beam_idx: torch.Tensor) -> Any:
        # what the beam search of transformers 4 calls
        return self._reorder_cache(past_key_values, beam_idx)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("use_cache") is False:
            past_key_values = None
        position_ids = kwargs.get("position_ids")
        if position_ids is not None and position_ids.shape[1] < input_ids.shape[1]:
            # transformers 4 does not go on counting for drafted tokens
            missing = torch.arange(1, input_ids.shape[1] - position_ids.shape[1] + 1, device=position_ids.device)
            kwargs["position_ids"] = torch.cat((position_ids, position_ids[:, -1:] + missing), dim=1)
        model_inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        # only the last logits are read: a prompt's logits would be hundreds of megabytes
        model_inputs[LOGITS_TO_KEEP] = kwargs.get(LOGITS_TO_KEEP) or 1
        return model_inputs


class _WithinLength(CandidateGenerator):
    """Cuts the drafts of prompt lookup so that they, and the token that follows, do not exceed the length limit."""

    def __init__(self, generator: CandidateGenerator, max_length: int):
        self.generator = generator
        self.max_length = max_length

    def get_candidates(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.FloatTensor | None]:
        candidates, _ = self.generator.get_candidates(input_ids)  # no logits: nothing was computed
        return candidates[:, : max(self.max_length - 1, input_ids.shape[1])], None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int):
        self.generator.update_candidate_strategy(input_ids, scores, num_matches)
