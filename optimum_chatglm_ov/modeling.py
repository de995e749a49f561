# SPDX-License-Identifier: Apache-2.0
"""`OVChatGLMForCausalLM`: every ChatGLM generation as an optimum-intel model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from optimum.intel.openvino.configuration import OVConfig, OVWeightQuantizationConfig
from transformers import AutoModelForCausalLM, GenerationConfig

from . import native
from .chat import ChatMixin
from .choices import FLOATING_FORMATS
from .configuration import ChatGLMConfig
from .errors import ModelFileError, openvino_message
from .hub.download import resolve_checkpoint
from .hub.model_card import has_own_card
from .hub.upload import HubMixin
from .integrations.recognition import read_config, warn_once
from .ir import (
    MODEL_FILE,
    OPENVINO_MODEL_FILES,
    end_turns,
    has_openvino_model,
    load_config,
    log_ignored_cache,
    model_folder,
    weight_precision,
)
from .loading import (
    Choices,
    check_not_merged,
    export_temporarily,
    no_ir_error,
    stored_generation_config,
    weight_format_of,
)
from .native import NativeBuildError
from .originals import OriginalsMixin, openvino_device
from .runtime.compilation import core, with_logits_to_keep
from .runtime.model import EngineForCausalLM
from .runtime.reuse.identity import StoredFiles
from .runtime.reuse.settings import ReuseSettings
from .tokenization import has_vocabulary, load_tokenizer


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


class _AutoModelForCausalLM(AutoModelForCausalLM):
    """`AutoModelForCausalLM`, where this class is already registered for its configuration class.

    optimum-intel registers every model class it loads for `AutoConfig` itself, which transformers refuses for classes
    with a `config_class`, as `AutoModelForCausalLM.from_pretrained` needs it.
    """

    @classmethod
    def register(cls, config_class, model_class, exist_ok=False):
        pass


class OVChatGLMForCausalLM(OriginalsMixin, ChatMixin, HubMixin, EngineForCausalLM):
    r"""A ChatGLM model of any generation, run by OpenVINO.

    ```python
    from transformers import AutoTokenizer
    from optimum_chatglm_ov import OVChatGLMForCausalLM

    model = OVChatGLMForCausalLM.from_pretrained("THUDM/chatglm3-6b", export=True)
    tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm3-6b")
    response, history = model.chat(tokenizer, "你好")
    ```

    It is an `OVBaseModel` and a `GenerationMixin`: `generate()`, pipelines, streamers and beam search work as with any
    optimum-intel model. Keys and values live in its `engine`; each instance has its own.
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
        device: str | torch.device | int = "CPU",
        ov_config: Mapping[str, str] | None = None,
        compile: bool = True,
        compile_only: bool = False,
        trust_remote_code: bool | None = None,
        attention: str | None = None,
        linear: str | None = None,
        prefix_cache: str | Path | bool | None = None,
        prefix_cache_size: int | str | None = None,
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
            device: OpenVINO device; one of CUDA ("cuda", a number) means the CPU, and the log says so.
            ov_config: OpenVINO properties, for example `{"KV_CACHE_PRECISION": "u8"}`.
            compile: compile at once; otherwise at the first call.
            compile_only: hand the IR file straight to the compiler; such a model cannot be saved or changed.
            trust_remote_code: has no effect; no remote code is ever run.
            attention: who computes attention: "native" (the operation of this package, built at first use; an error
                if it cannot be), "openvino" or "auto" (native on CPU, without `compile_only`; OpenVINO, with one
                warning, if it cannot be). Unset: `CHATGLM_OV_ATTENTION`, else "auto". An IR that was exported with
                native attention has no other. The names "fused" and "sdpa" of version 0.1.0 mean the first two.
            linear: who computes linear layers with int8 and int4 weights: "native" (the operations of this package;
                an error if they cannot), "native-int8" (the same; CPUs with AMX round long prompts to 8 bits, one
                scale a token), "openvino" or "auto" (native on CPUs where that is faster, those with VNNI or AMX;
                without `compile_only`). With VNNI the operations round activations to 8 bits in groups of
                `DYNAMIC_QUANTIZATION_GROUP_SIZE`, as OpenVINO does; with AMX, to 16 bits. Where that property is 0,
                or `EXECUTION_MODE_HINT` is ACCURACY, "auto" leaves the layers to OpenVINO. Unset:
                `CHATGLM_OV_LINEAR`, else "openvino" with `attention="openvino"` and "auto" with others.
            prefix_cache: keeps keys and values of prompts, so that equal beginnings are computed once; it needs native
                attention. A folder: of every generation, there, also for other processes and later ones (it then
                holds what was said; its owner alone can read it). True: of every generation, in memory. Unset: of
                `chat()` and `stream_chat()` alone, in memory. False: nothing, apart from `past_key_values`.
            prefix_cache_size: what is kept at most, in bytes or as "20GB" (the default of a folder; in memory "1GB").
            rope_ratio_type, adapters, prefix_encoder: see `export_model`.
            generation_config: replaces the one in the folder.

        Raises:
            CheckpointError, ExportError, ValueError, OSError: see `export_model`.
            NativeBuildError: see `compile`; also for an IR that was exported with native attention.
            PrefixCacheError: the folder `prefix_cache` cannot be used.
        """
        reuse = ReuseSettings.of(prefix_cache, prefix_cache_size)
        choices = Choices.of(attention, linear, compile_only)
        device = openvino_device(device)
        unknown = [*args, *sorted(set(kwargs) - _ARGUMENTS_OF_TRANSFORMERS)]
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained() does not know the argument(s) {unknown}.")
        rope_ratio_type = rope_ratio_type or getattr(config, "rope_ratio_type", None)
        weight_format = weight_format_of(kwargs.pop("torch_dtype", dtype))
        source = resolve_checkpoint(
            model_id,
            subfolder=subfolder,
            export=bool(export),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        read_config(source)
        if trust_remote_code:
            warn_once(str(model_id))
        has_ir = has_openvino_model(source)
        if export is False and not has_ir:
            raise no_ir_error(model_id)
        folder, temporary = source, None
        if export or not has_ir:
            temporary = export_temporarily(
                source,
                compile_only=compile_only,
                load_in_8bit=load_in_8bit,
                weight_format=weight_format,
                quantization_config=quantization_config,
                rope_ratio_type=rope_ratio_type,
                adapters=adapters,
                prefix_encoder=prefix_encoder,
            )
            folder = Path(temporary.name) / "model"
            load_in_8bit = quantization_config = config = None  # those of the export
        else:
            check_not_merged(str(model_id), adapters, prefix_encoder)
            if native.is_fused(folder / MODEL_FILE):
                choices.check_fused_ir(str(model_id), compile_only, load_in_8bit, quantization_config)
        if config is None:
            config = load_config(folder, rope_ratio_type)
        config.name_or_path = str(model_id)
        if compile_only and (load_in_8bit or quantization_config is not None):
            raise ValueError("A model loaded with `compile_only=True` cannot be quantised; load it without.")
        model = cls._of_folder(folder, config, device, ov_config, compile_only, generation_config, choices, reuse)
        model._temporary_folder = temporary
        if load_in_8bit or quantization_config is not None:
            model._quantize(quantization_config or {"bits": 8}, folder)
        elif (folder / OVConfig.CONFIG_NAME).is_file():
            model._openvino_config = OVConfig.from_pretrained(folder)
        if compile:
            model.compile()
        if temporary is None and generation_config is None:
            model._mend_generation_config(folder)
        if not use_cache:
            model.generation_config.use_cache = False
        return model

    @staticmethod
    def load_model(file_name: str | Path, quantization_config: Any = None) -> ov.Model:
        """Reads an IR, also one with native attention.

        Raises:
            ModelFileError: a file is damaged, cannot be read, or is not there.
            NativeBuildError: it has, and the native library is not there and cannot be built.
        """
        file = Path(file_name)
        for part in (file, file.with_suffix(".bin")):
            if not os.access(part, os.R_OK):
                found = "no permission to read it" if part.exists() else "not found"
                raise ModelFileError(f"{part}: {found}; a model is an .xml and a .bin file. Copy or export it again.")
        if native.is_native(file):
            try:
                native.load(core)
            except NativeBuildError as error:
                raise NativeBuildError(
                    f"{file.parent}: this IR holds native operations and cannot run without: {error}"
                ) from error
        try:
            return core.read_model(file, file.with_suffix(".bin"))
        except RuntimeError as error:
            raise ModelFileError(
                f"{file}: OpenVINO does not read it ({openvino_message(error)}). It or the .bin file beside it is "
                "damaged, or was not copied to its end: copy or export it again."
            ) from error

    @classmethod
    def _of_folder(
        cls,
        folder: Path,
        config: ChatGLMConfig,
        device: str,
        ov_config: Mapping[str, str] | None,
        compile_only: bool,
        generation_config: GenerationConfig | None,
        choices: Choices,
        reuse: ReuseSettings,
    ) -> OVChatGLMForCausalLM:
        """Reads the IR in `folder`, compiled already where `compile_only` leaves nothing to change."""
        ov_config = dict(ov_config or {})
        stored = StoredFiles.of([folder / name for name in OPENVINO_MODEL_FILES])
        model = cls.load_model(folder / MODEL_FILE)
        if compile_only:
            model = core.compile_model(with_logits_to_keep(model), device.upper(), ov_config)
        loaded = cls(
            model,
            config,
            device=device,
            ov_config=ov_config,
            model_save_dir=folder,
            compile=compile_only,
            compile_only=compile_only,
            generation_config=generation_config or stored_generation_config(folder),
            attention=choices.attention,
            linear=choices.linear,
            reuse=reuse,
        )
        loaded._stored_files = stored
        return loaded

    def _mend_generation_config(self, folder: Path) -> None:
        """Lets answers stop where a turn ends, and keep the cache, as an export says, also if the folder does not."""
        if self.generation_config.use_cache is False:
            file = folder / "generation_config.json"
            log_ignored_cache(file if file.is_file() else folder / "config.json")
        self.generation_config.use_cache = self.config.use_cache = True
        if not has_vocabulary(folder):
            return
        try:
            end_turns(self.generation_config, load_tokenizer(folder))
        except (OSError, ValueError) as error:
            logger.warning(
                f"{folder}: the tokenizer cannot be read ({error}); `generate` stops only at the ids that "
                "generation_config.json names."
            )

    def _quantize(self, quantization_config: OVWeightQuantizationConfig | Mapping[str, Any], folder: Path) -> None:
        from .export import quantization  # running a model needs no exporter

        settings = quantization.resolve_config(self.config, None, quantization_config, 0)
        precision = weight_precision(self.model)
        if precision not in FLOATING_FORMATS:
            raise ValueError(
                f"{folder}: the weights are {precision} already and cannot be quantised again. Leave out "
                "`load_in_8bit` and `quantization_config`, or export the original checkpoint with them."
            )
        tokenizer = None if settings.dataset is None else load_tokenizer(folder)
        quantization.compress(self.model, settings, tokenizer)
        self._stored_files = None
        self._openvino_config = OVConfig(quantization_config=quantization.for_saving(settings))

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
            if has_vocabulary(source):
                from .export.openvino_tokenizers import save_tokenizers

                save_tokenizers(load_tokenizer(source), folder)
            if not has_own_card(save_directory):
                self.save_model_card(folder)
        if push_to_hub:
            return self.push_to_hub(Path(save_directory), **kwargs)
