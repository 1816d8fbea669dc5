"""config.json -> ModelConfig, for every family; what our model cannot express is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, DIFFUSION_ARCHITECTURES, FAMILY_OF_MODEL_TYPE, LACKING
from megatron_dllm.hf.config_meaning import canonical
from megatron_dllm.hf.config_sizes import read_dtype, read_sizes
from megatron_dllm.hf.config_values import ConfigValues, brief
from megatron_dllm.hf.known_keys import refuse_unknown_keys
from megatron_dllm.hf.serving import usual_block_size
from megatron_dllm.hf.sliding_window import refuse_window
from megatron_dllm.hf.tokenizer_folder import GENERATION_FILE
from megatron_dllm.run.files import read_json_object, refuse_dead_link


@dataclass(frozen=True)
class SourceConfig:
    """What config.json says.

    Attributes:
        model: the sizes; token ids as the file states them, -1 if it does not.
        block_size: block size of a diffusion model, or None.
        is_diffusion: position i predicts token i (LLaDA2, SDAR) instead of token i + 1.
        dtype: in which the file says that the tensors are stored, "bfloat16" for one, or None.
        context_length: of the training, which exports of this project state; None where the file does not.
    """

    model: ModelConfig
    block_size: int | None
    is_diffusion: bool
    dtype: str | None
    context_length: int | None = None

    @property
    def decoded_block_size(self) -> int:
        """Tokens denoised together: what the file says, else SGLang's class; 1 for an autoregressive model."""
        if not self.is_diffusion:
            return 1
        return self.block_size or usual_block_size(self.model.family)


def read_hf_config(folder: Path) -> SourceConfig:
    """Read a model folder's config.json.

    Raises:
        ValueError: a value is missing, or the model cannot be expressed exactly.
    """
    path = folder / "config.json"
    refuse_dead_link(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; name a Hugging Face model folder.")
    config = read_json_object(path, "download it again")
    path_of_stops = folder / GENERATION_FILE
    if path_of_stops.is_file():
        _check_generation(path, config, path_of_stops)
    return from_hf_config(config, str(path))


def _check_generation(path: Path, config: dict[str, Any], path_of_stops: Path) -> None:
    """Refuse a folder whose two files disagree on the token that ends a text, or on the mask token."""
    generation = read_json_object(path_of_stops, "download it again")
    for key in ("eos_token_id", "mask_token_id"):
        ours, theirs = config.get(key), generation.get(key)
        # Of several stop tokens, a chat's end of turn for one, one in common is enough.
        if ours is not None and theirs is not None and not any(item in _as_list(theirs) for item in _as_list(ours)):
            raise ValueError(
                f"{path}: {key} ({brief(ours)}) and {path_of_stops}: {key} ({brief(theirs)}) state the same setting "
                "and differ; correct whichever is wrong."
            )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def from_hf_config(config: dict[str, Any], source: str = "config.json") -> SourceConfig:
    """Translate a config.json's content.

    Args:
        config: the parsed file.
        source: its name, for errors.

    Raises:
        ValueError: a value is missing, or the model cannot be expressed exactly.
    """
    family = _family(config, source)
    reader = ConfigValues(canonical(config, source), source)
    model = read_sizes(reader, family)
    refuse_window(config, model, source)
    refuse_unknown_keys(reader, family)
    is_diffusion = family in DIFFUSION_ARCHITECTURES
    longest = model.max_position_embeddings
    block_size = _block_size(reader, longest) if is_diffusion else None
    return SourceConfig(model, block_size, is_diffusion, read_dtype(reader), _context_length(reader, longest))


def _family(config: dict[str, Any], source: str) -> str:
    """The family that model_type names, or without one the architecture; both must belong together."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    classes = [] if classes is None else classes
    if not isinstance(classes, list):
        raise ValueError(f"{source}: architectures ({brief(classes)}) must be a list of names.")
    if model_type is None:
        return _family_of_class(classes, source)
    if isinstance(model_type, str) and model_type in LACKING:
        raise ValueError(
            f"{source}: model_type ({model_type}) is not converted: it has {LACKING[model_type]}, which our model "
            f"lacks; convert one of {', '.join(FAMILY_OF_MODEL_TYPE)}."
        )
    if not isinstance(model_type, str) or model_type not in FAMILY_OF_MODEL_TYPE:
        raise ValueError(
            f"{source}: model_type ({brief(model_type)}) is not known; known are {', '.join(FAMILY_OF_MODEL_TYPE)}."
        )
    family = FAMILY_OF_MODEL_TYPE[model_type]
    for name in classes:
        # Ling 1.x, for one, has another architecture under the same model_type.
        if name != ARCHITECTURE_CLASS[family]:
            raise ValueError(
                f"{source}: architectures ({brief(name)}) and model_type ({model_type}) do not belong together: "
                f"only {ARCHITECTURE_CLASS[family]} is known under this model_type; correct whichever is wrong."
            )
    return family


def _family_of_class(classes: list[Any], source: str) -> str:
    """Ling's own code writes no model_type."""
    found = [family for family, name in ARCHITECTURE_CLASS.items() if classes and name == classes[0]]
    if not found:
        raise ValueError(
            f"{source} lacks model_type, and architectures ({brief(classes)}) names none of "
            f"{', '.join(ARCHITECTURE_CLASS.values())}; add model_type as the model's authors gave it."
        )
    return found[0]


def _context_length(reader: ConfigValues, longest: int) -> int | None:
    """Tokens of the longest segment in training, None where the file does not say."""
    length: int | None = reader.get("training_context_length", None)
    if length is not None and not 1 <= length <= longest:
        raise ValueError(
            f"{reader.source}: training_context_length ({length}) must lie in [1, max_position_embeddings] = "
            f"[1, {longest}]; leave it out if it is not known."
        )
    return length


def _block_size(reader: ConfigValues, longest: int) -> int | None:
    """Block size of a diffusion model, None where the file leaves it to whoever decodes."""
    size: int | None = reader.get("block_length", None)
    if size is not None and not 1 <= size <= longest:
        raise ValueError(
            f"{reader.source}: block_length ({size}) must lie in [1, max_position_embeddings] = [1, {longest}]; it "
            "counts the tokens that are denoised together."
        )
    return size
