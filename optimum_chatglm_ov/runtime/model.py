# SPDX-License-Identifier: Apache-2.0
"""A causal language model of optimum-intel that computes with an `Engine`.

Private names of optimum-intel 2.2 that its extension points leave no way around:
`_device`, `_compile_only`, `_openvino_config` (attributes that its constructor and its `save_pretrained` share),
`_has_cache_inputs` (its constructor asks it), `_reorder_cache` (transformers' beam search calls it where there is one)
and `_prepare_cache_for_generation`, `_update_model_kwargs_for_generation` (inherited as they are).
Of transformers 4.51 to 5.5: `_prepare_generation_config`, `_get_candidate_generator` and, before 5.0,
`_temporary_reorder_cache`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import openvino as ov
import torch
from optimum.intel.openvino import OVModelForCausalLM
from transformers import GenerationConfig
from transformers.generation import candidate_generator
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..architectures.registry import architecture_of
from ..unsupported import check_settings
from .cache import context_tokens, held_length, past_key_values_of
from .compilation import compile_engine
from .drafts import DraftsWhileFaster
from .engine import LOGITS_TO_KEEP, Engine, StatefulEngine
from .generation import (
    check_continuation,
    check_custom_generate,
    check_rollback,
    longest_output,
    mark_beams,
)
from .inputs import (
    Call,
    check_arguments,
    check_context,
    check_input_ids,
    check_prompt,
    prepare_call,
    two_dimensional_mask,
    two_dimensional_positions,
)
from .reuse.identity import StoredFiles, digest_of_files, digest_of_model, model_identity
from .reuse.prefixes import Prefixes
from .reuse.sequences import CacheFilesMixin
from .reuse.settings import ReuseSettings


class EngineForCausalLM(CacheFilesMixin, OVModelForCausalLM):
    """`forward` and `generate` over an engine, which alone holds keys and values.

    An instance holds one sequence (or batch) at a time; calls of several threads take turns.

    Attributes:
        engine: what runs the compiled model; `None` before `compile`, and after `clear_requests`.
        attention, linear: who computes attention and linear layers, see `compile_engine`.
        reuse: what is kept of prompts, and where.
    """

    engine: Engine | None = None
    attention = "openvino"
    linear = "openvino"
    reuse = ReuseSettings.of()
    _prefixes: Prefixes | None = None
    _stored_files: StoredFiles | None = None  # that hold the model as it is
    _is_conversation = _computes_all = False  # of the generation that runs
    _prompt_layout: np.ndarray | None = None  # waiting for the next prompt, see `generate`

    def __init__(
        self,
        model: ov.Model | ov.CompiledModel,
        config: Any = None,
        *args: Any,
        attention: str = "openvino",
        linear: str = "openvino",
        reuse: ReuseSettings | None = None,
        **kwargs: Any,
    ):
        self._turn = threading.RLock()
        self.attention, self.linear = attention, linear
        self.reuse = reuse or self.reuse
        super().__init__(model, config, *args, **kwargs)

    # The engine ----------------------------------------------------------------------------------------------------

    @property
    def request(self) -> Any:
        """The inference request of the engine."""
        return None if self.engine is None else self.engine.request

    @request.setter
    def request(self, request: Any) -> None:
        # optimum-intel sets it: to `None` where the model changes, else to what it made of a compiled model
        if self._prefixes is not None:
            self._prefixes.keep()
            self._prefixes = None
        if self.engine is not None:
            self.engine.release()
        self.engine = StatefulEngine(request) if isinstance(request, ov.InferRequest) else None

    def compile(self) -> None:
        """Compiles the model, unless it is compiled already.

        Raises:
            NativeBuildError, ValueError: see `compile_engine`.
        """
        if self.engine is not None:
            return
        if self._compile_only:
            self.request = self.model.create_infer_request()
            return
        folder, ov_config = self.model_save_dir, dict(self.ov_config)
        if "GPU" in self._device and folder is not None and not str(folder).startswith(gettempdir()):
            ov_config.setdefault("CACHE_DIR", str(Path(folder, "model_cache")))  # as optimum-intel does
        self.engine = compile_engine(
            self.model,
            device=self._device,
            ov_config=ov_config,
            attention=self.attention,
            linear=self.linear,
            context_length=self.config.max_position_embeddings,
        )
        self._prefixes = self.reuse.prefixes(self.engine, architecture_of(self.config), self._identity)

    def _identity(self) -> bytes:
        """Tells apart what may not share keys and values."""
        stored = self._stored_files
        if stored is not None and stored.are_unchanged:
            weights = digest_of_files(stored)
        else:
            weights = digest_of_model(self.model)
        settings = {"attention": self.attention, "linear": self.linear, "ov_config": sorted(self.ov_config.items())}
        return model_identity(self.engine, weights, settings)

    def clear_requests(self) -> None:
        """Gives the compiled model and its caches back; the next call compiles again."""
        with self._turn:
            super().clear_requests()

    @property
    def stateful(self) -> bool:
        """Whether the model keeps its keys and values itself: always."""
        return True

    @stateful.setter
    def stateful(self, has_state: bool) -> None:
        pass  # optimum-intel looks for state variables, and an IR with fused attention has none

    @staticmethod
    def _has_cache_inputs(model: ov.Model | ov.CompiledModel) -> bool:
        return True

    @contextmanager
    def _turns(self, assistant: Any) -> Iterator[None]:
        """The turn of this model and of the one that drafts for it, if that is of this class, too."""
        models = {id(model): model for model in (self, assistant) if isinstance(model, EngineForCausalLM)}
        with ExitStack() as turns:
            for _, model in sorted(models.items()):  # by all threads in one order: two could wait for each other
                turns.enter_context(model._turn)
            yield

    # One call ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        past_key_values: tuple | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, Any]:
        """Computes logits; keys and values stay in the engine.

        Args:
            input_ids: int64 `[batch, new_tokens]`.
            attention_mask: int64 `[batch, past + new_tokens]`, 0 for (left) padding; chatglm-6b also takes its
                tokenizer's boolean `[batch, 1, tokens, tokens]`, True = hidden.
            past_key_values: `None` starts a new sequence (the engine is reset); what the last call returned goes on,
                with fused attention also after its `crop`.
            position_ids: int64 `[batch, new_tokens]`; chatglm-6b also takes its tokenizer's `[batch, 2, tokens]`.
            logits_to_keep: logits of that many last positions; 0 = all.
            kwargs: `return_dict`, `False` for a tuple; `use_cache` and `cache_position`, which change nothing.

        Returns:
            `logits`, f32 `[batch, new_tokens or logits_to_keep, vocab_size]`, and `past_key_values`: a marker, with
            fused attention a [`FusedCache`].

        Raises:
            ContextLengthError: past and new tokens are more than the context length.
            TypeError: another argument, such as `labels`, `inputs_embeds` or `output_hidden_states`.
            ValueError: a tensor of another shape; an id beyond the vocabulary; a chatglm-6b prompt without `<sop>` or
                a mask token; `past_key_values` that are not what the model holds, or beams.
        """
        check_arguments(f"{type(self).__name__}.forward", kwargs)
        with self._turn:
            output = self._forward(input_ids, attention_mask, past_key_values, position_ids, int(logits_to_keep))
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    def _forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        past_key_values: Any,
        position_ids: torch.LongTensor | None,
        logits_to_keep: int,
    ) -> CausalLMOutputWithPast:
        self.compile()
        engine = self.engine
        prompt_layout, self._prompt_layout = self._prompt_layout, None
        check_input_ids(input_ids, self.config)
        batch, new_tokens = input_ids.shape
        past_length = held_length(engine, past_key_values)
        check_context(past_length + new_tokens, self.config)
        if past_length and batch != engine.batch_size:
            raise ValueError(
                f"`past_key_values` hold {engine.batch_size} sequences, but `input_ids` has {batch} rows. Leave "
                "`past_key_values` out to start new sequences."
            )
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` is {logits_to_keep}; expected a number of positions, or 0 for all.")
        call = prepare_call(input_ids, attention_mask, position_ids, past_length, self.config, prompt_layout)
        copies, known = None, 0
        if past_key_values is None:
            if call.prompt_layout is None:
                check_prompt(input_ids, self.config)
            call, copies = call.distinct_rows()
            known = self._begin(call, new_tokens - (logits_to_keep or new_tokens))
        logits = engine.run(
            {
                "input_ids": call.input_ids[:, known:],
                "attention_mask": call.attention_mask,
                "position_ids": call.position_ids[:, known:],
                LOGITS_TO_KEEP: np.array(logits_to_keep, dtype=np.int64),
            }
        )
        if self._prefixes is not None:
            self._prefixes.after_call(past_key_values is None and self._reuses, is_copied=copies is not None)
        if past_key_values is None:
            past_key_values = past_key_values_of(engine, context_tokens(engine, call.attention_mask))
        if copies is not None:
            logits = logits[copies]
            engine.reorder(copies)
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=past_key_values)

    @property
    def _reuses(self) -> bool:
        """Whether the sequences that begin now go on from what is kept, and are kept."""
        wanted = self.reuse.always or self._is_conversation
        return self._prefixes is not None and wanted and not self._computes_all

    def _begin(self, call: Call, most: int) -> int:
        """Begins the sequences of `call`; returns how many tokens of each row, `most` at most, need no computing."""
        known = self._prefixes.begin(call, most if self._reuses else 0) if self._prefixes is not None else 0
        if not known:
            self.engine.reset()
            if call.prompt_layout is not None:
                self.engine.write_state("prompt_layout", call.prompt_layout)
        return known

    # Generation ----------------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs: Any):
        """As in transformers; see `GenerationMixin.generate`. `trust_remote_code` has no effect.

        With native attention also `assistant_model` (of this class, loaded so too, or a torch model; of another
        vocabulary with `tokenizer` and `assistant_tokenizer`), `prompt_lookup_num_tokens`, and `past_key_values` of an
        earlier output of this model, with the whole sequence as `input_ids`: what they hold is not computed again.

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
        check_custom_generate(kwargs.get("custom_generate"))
        kwargs.pop("trust_remote_code", None)  # some ways of generation are on the Hub by now
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        check_settings(settings)
        if kwargs.get("assistant_model") is not None or settings.prompt_lookup_num_tokens:
            self._check_rollback(kwargs.get("assistant_model"))
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None:
            check_input_ids(input_ids, self.config)
            asked = kwargs.get("max_length") or getattr(generation_config, "max_length", None) or 0
            if limit := longest_output(input_ids.shape[1], asked, settings, self.config):
                kwargs["max_length"] = limit
        if (past := kwargs.get("past_key_values")) is not None:
            self.compile()
            check_continuation(self.engine, past, input_ids, settings)
        self._computes_all = False in (settings.use_cache, kwargs.get("use_cache"))
        try:
            if input_ids is not None:
                self._prepare_tensors(input_ids, settings, kwargs)
            output = super().generate(inputs, generation_config, **kwargs)
            past = getattr(output, "past_key_values", None)
            mark_beams(past, 0 if input_ids is None else input_ids.shape[1], settings)
            return output
        finally:
            self._prompt_layout, self._computes_all = None, False

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

    @torch.no_grad()
    def generate_turn(self, prompt: torch.LongTensor, **settings: Any) -> torch.LongTensor:
        """`generate` of one prompt [1, L], of which nothing is computed again that is known from earlier turns."""
        with self._turns(settings.get("assistant_model")):
            self._is_conversation = True
            try:
                settings["return_dict_in_generate"] = True
                # A prompt has no padding, whatever its ids; positions follow from the mask.
                output = self.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
                return output.sequences
            finally:
                self._is_conversation = False

    def _check_rollback(self, assistant: Any) -> None:
        for name, model in (("model", self), ("assistant model", assistant)):
            if isinstance(model, EngineForCausalLM):
                model.compile()
            if isinstance(model, OVModelForCausalLM):  # else there is no assistant, or it is another library's
                check_rollback(getattr(model, "engine", None), name)
        if assistant is self:
            raise ValueError("`assistant_model` is this very model; load another, which has caches of its own.")

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any):
        generator = super()._get_candidate_generator(generation_config, *args, **kwargs)
        if isinstance(generator, candidate_generator.PromptLookupCandidateGenerator):
            return DraftsWhileFaster(generator, generation_config.max_length)
        if isinstance(generator, candidate_generator.AssistedCandidateGeneratorDifferentTokenizers):
            # transformers 5 hands the positions of this model's tokens to an assistant whose tokens are others
            generator.assistant_kwargs.pop("position_ids", None)
        return generator

    def _reorder_cache(self, past_key_values: Any, beam_idx: torch.Tensor) -> Any:
        self.engine.reorder(beam_idx.cpu().numpy())
        return past_key_values

    def _temporary_reorder_cache(self, past_key_values: Any, beam_idx: torch.Tensor) -> Any:
        # what the beam search of transformers 4 calls
        return self._reorder_cache(past_key_values, beam_idx)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Any = None,
        attention_mask: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Mapping[str, Any]:
        """Arguments of the next `forward`: of `input_ids` `[batch, tokens]`, those that are not held yet."""
        if use_cache is False:
            past_key_values = None
        if position_ids is not None and position_ids.shape[1] < input_ids.shape[1]:
            # transformers 4 does not go on counting for drafted tokens
            missing = torch.arange(1, input_ids.shape[1] - position_ids.shape[1] + 1, device=position_ids.device)
            position_ids = torch.cat((position_ids, position_ids[:, -1:] + missing), dim=1)
        past_length = held_length(self.engine, past_key_values)
        if past_length < input_ids.shape[1]:
            input_ids = input_ids[:, past_length:]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            # only the last logits are read: a prompt's logits would be hundreds of megabytes
            LOGITS_TO_KEEP: kwargs.get(LOGITS_TO_KEEP) or 1,
        }
