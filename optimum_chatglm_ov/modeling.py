# SPDX-License-Identifier: Apache-2.0
"""`OVChatGLMForCausalLM`: every ChatGLM generation as an optimum-intel model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino as ov
import torch
from optimum.intel.openvino import OVModelForCausalLM
from optimum.intel.openvino.configuration import OVConfig, OVWeightQuantizationConfig
from optimum.intel.openvino.modeling_base import core
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, GenerationConfig
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import native, quantization
from .cache import FusedCache
from .chat import ChatMixin
from .compilation import LOGITS_TO_KEEP, CompilationMixin, choice
from .configuration import ChatGLMConfig
from .errors import ContextLengthError, ModelFileError, openvino_message
from .export import MODEL_FILE, export_model, load_config, model_folder
from .hub import HubMixin, has_openvino_model, has_own_card, resolve_checkpoint
from .native import NativeBuildError


logger = logging.getLogger(__name__)

# What transformers' own loaders and optimum-intel's users pass along, and has no meaning here.
_ARGUMENTS_OF_TRANSFORMERS = {
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "attn_implementation",
    "code_revision",
    "device_map",
    "library_name",
    "low_cpu_mem_usage",
    "stateful",
    "task",
    "torch_dtype",
    "use_safetensors",
    "variant",
}
_WEIGHT_FORMAT_OF_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class _AutoModelForCausalLM(AutoModelForCausalLM):
    """`AutoModelForCausalLM`, where this class is already registered for its configuration class.

    optimum-intel registers every model class it loads for `AutoConfig` itself, which transformers refuses for classes
    with a `config_class`, as `AutoModelForCausalLM.from_pretrained` needs it.
    """

    @classmethod
    def register(cls, config_class, model_class, exist_ok=False):
        pass


class OVChatGLMForCausalLM(ChatMixin, HubMixin, CompilationMixin, OVModelForCausalLM):
    r"""A ChatGLM model of any generation, run by OpenVINO.

    ```python
    from transformers import AutoTokenizer
    from optimum_chatglm_ov import OVChatGLMForCausalLM

    model = OVChatGLMForCausalLM.from_pretrained("THUDM/chatglm3-6b", export=True)
    tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm3-6b")
    response, history = model.chat(tokenizer, "你好")
    ```

    It is an `OVBaseModel` and a `GenerationMixin`: `generate()`, pipelines, streamers and beam search work as with any
    optimum-intel model. The key/value cache lives in the inference request; each instance has its own.
    """

    config_class = ChatGLMConfig
    auto_model_class = _AutoModelForCausalLM
    _supports_cache_class = True  # transformers 4 asks before it hands a `Cache` back

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *args: Any,
        export: bool | None = None,
        config: ChatGLMConfig | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        load_in_8bit: bool | None = None,
        quantization_config: OVWeightQuantizationConfig | Mapping[str, Any] | None = None,
        dtype: torch.dtype | str | None = None,
        use_cache: bool = True,
        device: str = "CPU",
        ov_config: Mapping[str, str] | None = None,
        compile: bool = True,
        compile_only: bool = False,
        trust_remote_code: bool | None = None,
        attention: str | None = None,
        linear: str | None = None,
        rope_ratio_type: str | None = None,
        adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
        prefix_encoder: str | Path | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> OVChatGLMForCausalLM:
        """Loads an IR folder, or exports an original checkpoint and loads the result.

        Args:
            model_id: local folder or Hub id of an IR or of an original checkpoint.
            export: `True` exports, `False` loads an IR, unset exports when there is no IR.
            config: replaces the configuration read from the folder of an IR; an export takes only its
                `rope_ratio_type`.
            revision, token, cache_dir, local_files_only, force_download, subfolder: as in transformers.
            load_in_8bit: int8 weights; `False` keeps them as stored. Unset: int8 for models over 10^9 parameters.
            quantization_config: see `export_model`; also for an IR whose weights are floating-point numbers.
            dtype: precision that the weights are exported in, of models of any size (also as `torch_dtype`), unless
                `load_in_8bit` or `quantization_config` asks for another; "auto" says nothing. An IR keeps its own.
            use_cache: `False` computes every step of a generation from its first token.
            device: OpenVINO device.
            ov_config: OpenVINO properties, for example `{"KV_CACHE_PRECISION": "u8"}`.
            compile: compile at once; otherwise at the first call.
            compile_only: hand the IR file straight to the compiler; such a model cannot be saved or changed.
            trust_remote_code: has no effect; no remote code is ever run.
            attention: "fused" (the native operation of this package, built at first use; an error if it cannot be),
                "sdpa" (OpenVINO's own) or "auto" (fused on CPU, without `compile_only`; OpenVINO's own, with one
                warning, if it cannot be). Unset: `CHATGLM_OV_ATTENTION`, else "auto". An IR that was exported fused
                has no other.
            linear: who computes linear layers with int8 and int4 weights: "fused" (the native operations of this
                package; an error if they cannot), "openvino" or "auto" (the native operations on CPUs where they are
                the faster, which multiply bytes (VNNI) and have no AMX; without `compile_only`). Both round
                activations to 8 bits in groups of `DYNAMIC_QUANTIZATION_GROUP_SIZE`; where that property is 0, or
                `EXECUTION_MODE_HINT` is ACCURACY, "auto" leaves them to OpenVINO. Unset: `CHATGLM_OV_LINEAR`, else
                "openvino" with `attention="sdpa"` and "auto" with others.
            rope_ratio_type, adapters, prefix_encoder: see `export_model`.
            generation_config: replaces the one in the folder.

        Raises:
            CheckpointError, ExportError, ValueError, OSError: see `export_model`.
            NativeBuildError: see `compile`; also for an IR that was exported fused.
        """
        hub_arguments = dict(
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        named = attention is not None
        attention = choice("attention", attention, ("sdpa", "fused", "auto"), "CHATGLM_OV_ATTENTION")
        own = "openvino" if attention == "sdpa" else "auto"
        linear = choice("linear", linear, ("openvino", "fused", "auto"), "CHATGLM_OV_LINEAR", own)
        if compile_only:
            for argument, chosen in (("attention", attention), ("linear", linear)):
                if chosen == "fused":
                    raise ValueError(
                        f'`compile_only` compiles the IR as it is; `{argument}="fused"` (or CHATGLM_OV_'
                        f"{argument.upper()}=fused) changes it. Leave one out."
                    )
            attention, linear = "sdpa", "openvino"
        unknown = [*args, *sorted(set(kwargs) - _ARGUMENTS_OF_TRANSFORMERS)]
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained() does not know the argument(s) {unknown}.")
        if config is not None:
            rope_ratio_type = rope_ratio_type or getattr(config, "rope_ratio_type", None)
        weight_format = _weight_format(kwargs.pop("torch_dtype", dtype))
        source = resolve_checkpoint(model_id, subfolder=subfolder, export=bool(export), **hub_arguments)
        has_ir = has_openvino_model(source)
        if export is False and not has_ir:
            raise FileNotFoundError(
                f"{model_id}: no openvino_model.xml was found, and `export=False` forbids making one. Leave `export` "
                "unset to export the original checkpoint."
            )
        temporary = None
        if export or not has_ir:
            if compile_only:
                raise ValueError(
                    "`compile_only` loads an IR and cannot export; run `chatglm-ov export` or `save_pretrained` first."
                )
            if quantization_config is None and load_in_8bit:
                quantization_config = {"bits": 8}
            if quantization_config is not None:
                weight_format = None
            elif load_in_8bit is False:
                weight_format = weight_format or "original"
            # not a context manager: the IR must live as long as the model that maps it
            temporary = TemporaryDirectory(prefix="optimum_chatglm_ov-")
            folder = export_model(
                source,
                Path(temporary.name) / "model",
                weight_format=weight_format,
                quantization_config=quantization_config,
                rope_ratio_type=rope_ratio_type,
                adapters=adapters,
                prefix_encoder=prefix_encoder,
            )
            quantization_config = None
            config = None  # the one that was exported
        else:
            if adapters or prefix_encoder:
                raise ValueError(
                    f"{model_id}: `adapters` and `prefix_encoder` are merged at export, but this is exported already. "
                    "Export the original checkpoint again with them (`export=True`)."
                )
            folder = source
            if native.is_fused(folder / MODEL_FILE):
                for argument, is_given in (
                    ("compile_only", compile_only),
                    ("attention='sdpa'" if named else "CHATGLM_OV_ATTENTION=sdpa", attention == "sdpa"),
                    ("load_in_8bit", load_in_8bit),
                    ("quantization_config", quantization_config is not None),
                ):
                    if is_given:
                        raise ValueError(
                            f"{model_id}: `{argument}` is not for this IR, which holds the fused attention operation. "
                            "Leave it out, or export the original checkpoint again in the portable form."
                        )
            if load_in_8bit or quantization_config is not None:
                if compile_only:
                    raise ValueError("A model loaded with `compile_only=True` cannot be quantised; load it without.")
                quantization_config = quantization.resolve_config(
                    load_config(folder), None, quantization_config or {"bits": 8}, 0
                )
        if config is None:
            config = load_config(folder, rope_ratio_type)
        config.name_or_path = str(model_id)
        model = cls._from_pretrained(
            model_id=folder,
            config=config,
            device=device,
            ov_config=dict(ov_config or {}),
            compile=compile and compile_only,  # otherwise below, with the attention that was chosen
            compile_only=compile_only,
            generation_config=generation_config,
        )
        model._attention, model._linear = attention, linear
        if quantization_config is not None:
            model._quantize(quantization_config, folder)
        if compile:
            model.compile()
        model._temporary_folder = temporary
        if model._openvino_config is None and (folder / OVConfig.CONFIG_NAME).is_file():
            model._openvino_config = OVConfig.from_pretrained(folder)
        if not use_cache:
            model.generation_config.use_cache = False
        return model

    @staticmethod
    def load_model(file_name: str | Path, quantization_config: Any = None) -> ov.Model:
        """Reads an IR, also one with fused attention.

        Raises:
            ModelFileError: a file is damaged, cannot be read, or is not there.
            NativeBuildError: it has, and the native library is not there and cannot be built.
        """
        file = Path(file_name)
        for part in (file, file.with_suffix(".bin")):
            if not os.access(part, os.R_OK):
                found = "no permission to read it" if part.exists() else "not found"
                raise ModelFileError(f"{part}: {found}; a model is an .xml and a .bin file. Copy or export it again.")
        if native.is_fused(file):
            try:
                native.load(core)
            except NativeBuildError as error:
                raise NativeBuildError(
                    f"{file.parent}: this IR holds the fused attention operation and cannot run without: {error}"
                ) from error
        try:
            return OVModelForCausalLM.load_model(file, quantization_config)
        except RuntimeError as error:
            raise ModelFileError(
                f"{file}: OpenVINO does not read it ({openvino_message(error)}). It or the .bin file beside it is "
                "damaged, or was not copied to its end: copy or export it again."
            ) from error

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

    def _quantize(self, quantization_config: OVWeightQuantizationConfig, folder: Path) -> None:
        precision = quantization.weight_precision(self.model)
        if precision not in quantization.FLOATING_FORMATS:
            raise ValueError(
                f"{folder}: the weights are {precision} already and cannot be quantised again. Leave out "
                "`load_in_8bit` and `quantization_config`, or export the original checkpoint with them."
            )
        tokenizer = None if quantization_config.dataset is None else AutoTokenizer.from_pretrained(folder)
        quantization.compress(self.model, quantization_config, tokenizer)
        self._openvino_config = OVConfig(quantization_config=quantization.for_saving(quantization_config))

    # Inference -------------------------------------------------------------------------------------------------------

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

        Returns:
            `logits`, f32 `[batch, new_tokens or logits_to_keep, vocab_size]`, and `past_key_values`: a marker, with
            fused attention a [`FusedCache`].

        Raises:
            ContextLengthError: past and new tokens are more than the context length.
            ValueError: a chatglm-6b prompt without `<sop>` or a mask token; `past_key_values` or `attention_mask` that
                do not belong to what the caches of fused attention hold.
        """
        self.compile()
        attention_mask, position_ids, layout = self._two_dimensional(attention_mask, position_ids)
        if layout is None:
            layout = self._prompt_layout
        self._prompt_layout = None
        past_length = self._get_past_length(past_key_values)
        self._check_context(past_length + input_ids.shape[1])
        if past_key_values is None:
            self._check_prompt(input_ids, layout)
        if past_length == 0:
            self.next_beam_idx = np.arange(len(input_ids))  # a cache that was reset may hold other rows from now on
        inputs = self.prepare_inputs(input_ids, attention_mask, past_key_values, position_ids)
        if past_key_values is None and layout is not None:
            self._set_prompt_layout(layout)
        copies = None
        if self._first_iter_beam_search:
            if layout is None:
                inputs, copies = self._deduplicate_inputs(inputs)
            self._first_iter_beam_search = False
        inputs[LOGITS_TO_KEEP] = np.array(int(logits_to_keep), dtype=np.int64)

        if self._fused is not None:
            if past_key_values is None:
                self._fused.reset()
            self._check_mask_length(inputs["attention_mask"], past_length + input_ids.shape[1])
            self._fused.reorder(inputs["beam_idx"])
            self._fused.prepare(len(inputs["input_ids"]), input_ids.shape[1])
            inputs = {name: value for name, value in inputs.items() if name in self._fused_inputs}
        try:
            self.request.start_async(inputs, share_inputs=True)
            self.request.wait()
        except BaseException:
            # interrupted between the two: the request must not go on while the caller believes that it has ended
            self.request.cancel()
            with suppress(RuntimeError):
                self.request.wait()
            raise
        self.next_beam_idx = np.arange(len(inputs["input_ids"]))  # rows are reordered once
        if self._fused is not None:
            self._fused.advance(input_ids.shape[1])
        logits = torch.from_numpy(self.request.get_tensor("logits").data.copy())
        self._past_length = past_length + input_ids.shape[1]
        if self._fused is None:
            past_key_values = ((),)
        elif past_key_values is None:
            past_key_values = FusedCache(self._fused, self._context_tokens(inputs["attention_mask"]))
        if copies is not None:
            logits, past_key_values = self._expand_outputs_for_generation(copies, logits, past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _get_past_length(self, past_key_values: tuple | FusedCache | None = None) -> int:
        if past_key_values is None or (self._fused is None and not isinstance(past_key_values, Cache)):
            return super()._get_past_length(past_key_values)
        if not isinstance(past_key_values, FusedCache) or not past_key_values.belongs_to(self._fused):
            raise ValueError(
                f"`past_key_values` is a {type(past_key_values).__name__} that this model has not returned; its "
                "caches hold nothing of it. Leave it out to start a new sequence."
            )
        return past_key_values.get_seq_length()

    def _check_mask_length(self, attention_mask: np.ndarray, length: int) -> None:
        if attention_mask.shape[1] != length:
            raise ValueError(
                f"`attention_mask` covers {attention_mask.shape[1]} tokens; the past and the new ones are {length}."
            )

    def _context_tokens(self, attention_mask: np.ndarray) -> int:
        """Tokens at the beginning of the prompt that see each other in both directions, padding included."""
        for state in self.request.query_state():
            if state.name == "prompt_layout":
                padding = (attention_mask == 0).sum(axis=1)
                return int((padding + state.state.data[:, 0]).max())
        return 0

    _prompt_layout: np.ndarray | None = None  # waiting for the next prompt, see `generate`

    def _two_dimensional(
        self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, np.ndarray | None]:
        """chatglm-6b's own masks and positions in the graph's form.

        Returns the 2-D mask, 2-D positions, and what the 2-D positions say of the prompt: i32 `[batch, 2]`, context
        length and position of the mask token.
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = (~attention_mask[:, 0].bool().all(dim=1)).long()
        if position_ids is None or position_ids.dim() != 3:
            return attention_mask, position_ids, None
        first, second = position_ids[:, 0], position_ids[:, 1]
        kept = torch.ones_like(first) if attention_mask is None else attention_mask
        context_length = ((second == 0) & (kept != 0)).sum(dim=1)
        layout = torch.stack((context_length, first[:, -1]), dim=1).int().numpy()
        return attention_mask, None, layout

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

    def _check_prompt(self, input_ids: torch.Tensor, layout: np.ndarray | None) -> None:
        if self.config.architecture != "chatglm" or layout is not None:
            return
        masks = (input_ids == self.config.gmask_token_id) | (input_ids == self.config.mask_token_id)
        if not ((input_ids == self.config.bos_token_id).any(dim=1) & masks.any(dim=1)).all():
            raise ValueError(
                f"A chatglm-6b prompt must hold [gMASK] ({self.config.gmask_token_id}) or [MASK] "
                f"({self.config.mask_token_id}) and <sop> ({self.config.bos_token_id}); the tokenizer adds them "
                "unless `add_special_tokens=False`."
            )

    # Generation ------------------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs: Any):
        """As in transformers; see `GenerationMixin.generate`.

        With fused attention also `assistant_model` (another instance of this class, loaded so too),
        `prompt_lookup_num_tokens`, and `past_key_values` of an earlier output of this model, with the whole sequence
        as `input_ids`: what the cache holds of it is not computed again.

        Raises:
            ContextLengthError: the prompt and the tokens to generate are more than the context length; nothing is run.
            ValueError: assisted generation with a cache that cannot take tokens back; `past_key_values` that are
                outdated or hold beams; `guidance_scale`, which computes two sequences in turns.
        """
        kwargs["attention_mask"], kwargs["position_ids"], layout = self._two_dimensional(
            kwargs.get("attention_mask"), kwargs.get("position_ids")
        )
        for name in ("attention_mask", "position_ids"):
            if kwargs[name] is None:
                del kwargs[name]
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        if settings.guidance_scale not in (None, 1):
            raise ValueError(
                f"`guidance_scale` is {settings.guidance_scale}: it computes two sequences in turns, and this model "
                "holds the keys and values of one. Leave it out."
            )
        assistant = kwargs.get("assistant_model")
        if assistant is not None or settings.prompt_lookup_num_tokens:
            self._check_rollback(assistant)
        if isinstance(past := kwargs.get("past_key_values"), Cache):
            self._check_continuation(past, input_ids, settings)
        if input_ids is not None:
            prompt = input_ids.shape[-1]
            if settings.max_new_tokens is not None:
                self._check_context(prompt + settings.max_new_tokens)
            elif kwargs.get("max_length") is not None or generation_config is not None:
                self._check_context(max(prompt, settings.max_length or 0))
            else:  # a default of the checkpoint
                self._check_context(prompt)
                kwargs["max_length"] = min(settings.max_length or 20, self.config.max_position_embeddings)
        if layout is not None:
            copies = (settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences) or 1
            self._prompt_layout = layout.repeat(copies, axis=0)
        try:
            output = super().generate(inputs, generation_config, **kwargs)
            past = getattr(output, "past_key_values", None)
            if (settings.num_beams or 1) > 1 and isinstance(past, FusedCache):
                past.beams_from = 0 if input_ids is None else input_ids.shape[-1]
            return output
        finally:
            self._first_iter_beam_search = self._second_iter_beam_search = False
            self._prompt_layout = None

    def _check_rollback(self, assistant: Any) -> None:
        for name, model in (("model", self), ("assistant model", assistant)):
            if not isinstance(model, OVModelForCausalLM):
                continue  # no assistant, or one of another library
            if isinstance(model, OVChatGLMForCausalLM):
                model.compile()
            if getattr(model, "_fused", None) is None:
                raise ValueError(
                    "Assisted generation (`assistant_model`, `prompt_lookup_num_tokens`) takes tokens back, and the "
                    f"key/value cache inside this {name} cannot. Load it as "
                    '`OVChatGLMForCausalLM.from_pretrained(..., attention="fused")`.'
                )
        if assistant is self:
            raise ValueError("`assistant_model` is this very model; load another, which has caches of its own.")

    def _check_continuation(
        self, past_key_values: Cache, input_ids: torch.Tensor | None, settings: GenerationConfig
    ) -> None:
        self.compile()
        past_length = self._get_past_length(past_key_values)
        if input_ids is None or input_ids.shape[-1] <= past_length:
            raise ValueError(
                f"`past_key_values` hold {past_length} tokens; expected `input_ids` of the whole sequence, those "
                "tokens and new ones. Pass more, or `crop()` the cache first."
            )
        if past_key_values.beams_from is not None and past_length > past_key_values.beams_from:
            raise ValueError(
                "`past_key_values` hold the beams that a beam search ended with, which are not the sequences that it "
                f"returned. Leave them out, or `crop({past_key_values.beams_from})` them to the prompt."
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

    # Saving ----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any):
        """Writes the IR, configuration, tokenizer and model card; the folder is complete or as it was before.

        With `push_to_hub=True` it is then uploaded; `kwargs` go to `push_to_hub`.

        Raises:
            ExportError: the folder cannot be written, or holds original weights.
            ValueError: the model was loaded with `compile_only=True`.
        """
        if self._compile_only:
            raise ValueError("A model loaded with `compile_only=True` cannot be saved; load it without.")
        with model_folder(save_directory) as folder:
            super().save_pretrained(folder)
            source = Path(self.model_save_dir)
            if any((source / name).is_file() for name in ("tokenizer.model", "ice_text.model")):
                AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            if not has_own_card(save_directory):
                self.save_model_card(folder)
        if push_to_hub:
            return self.push_to_hub(Path(save_directory), **kwargs)


def _weight_format(dtype: torch.dtype | str | None) -> str | None:
    """The `weight_format` that `dtype` of transformers' `from_pretrained` asks for, `None` if it asks for none.

    Raises:
        ValueError: a type that weights cannot have.
    """
    if dtype is None or dtype == "auto":
        return None
    weight_format = _WEIGHT_FORMAT_OF_DTYPE.get(str(dtype).removeprefix("torch."))
    if weight_format is None:
        raise ValueError(
            f"`dtype` is {dtype!r}; expected torch.float32, torch.float16, torch.bfloat16 or 'auto'. Integers are "
            "asked for with `load_in_8bit` or `quantization_config`."
        )
    return weight_format


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
