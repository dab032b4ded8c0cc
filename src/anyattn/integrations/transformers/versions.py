"""Which releases of Transformers this integration was written for, and whether the one here is as expected."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from anyattn.errors import AnyattnError

SUPPORTED = ">=5.23,<6"
"""The releases of Transformers that the integration accepts, as a version specifier.

5.23 is the oldest that was run. Later ones are accepted if everything in `SIGNATURES` looks as it does there.
"""

NAME = "anyattn"
"""The value of `attn_implementation` that sends a model's attention to anyattn."""

SIGNATURES: dict[str, tuple[str, ...]] = {
    "modeling_utils:AttentionInterface.register": ("key", "value"),
    "modeling_utils:AttentionInterface.get_interface": ("self", "attn_implementation", "default"),
    "masking_utils:AttentionMaskInterface.register": ("key", "value"),
    "masking_utils:sdpa_mask": (
        "batch_size",
        "q_length",
        "kv_length",
        "q_offset",
        "kv_offset",
        "mask_function",
        "attention_mask",
        "local_size",
        "allow_is_causal_skip",
        "allow_is_bidirectional_skip",
        "use_vmap",
        "device",
        "kwargs",
    ),
    "masking_utils:and_masks": ("mask_functions",),
    "masking_utils:causal_mask_function": ("batch_idx", "head_idx", "q_idx", "kv_idx"),
    "masking_utils:bidirectional_mask_function": ("batch_idx", "head_idx", "q_idx", "kv_idx"),
    "masking_utils:sliding_window_overlay": ("sliding_window",),
    "masking_utils:sliding_window_bidirectional_overlay": ("sliding_window",),
    "masking_utils:chunked_overlay": ("chunk_size", "left_padding"),
    "masking_utils:packed_sequence_mask_function": ("packed_sequence_mask",),
    "masking_utils:remap_positions_for_packed_sequence": ("mask_function", "position_ids"),
    "masking_utils:prepare_padding_mask": ("attention_mask", "kv_length", "kv_offset"),
    "modeling_utils:PreTrainedModel.get_correct_attn_implementation": ("self", "requested_attention", "is_init_check"),
    "modeling_utils:PreTrainedModel.set_attn_implementation": ("self", "attn_implementation", "allow_all_kernels"),
    "modeling_utils:PreTrainedModel._can_set_attn_implementation": (),
}
"""What is called, replaced or read, with the parameters that it must have."""

MAPPINGS = ("modeling_utils:AttentionInterface._global_mapping", "masking_utils:AttentionMaskInterface._global_mapping")
"""The dicts in which Transformers looks a name up."""


class UnsupportedVersionError(AnyattnError, RuntimeError):
    """This release of Transformers isn't one that the integration knows; nothing was changed."""


def check_version() -> str:
    """Return the installed version of Transformers, without importing it.

    Raises:
        UnsupportedVersionError: If Transformers isn't installed, or in a release outside `SUPPORTED`.
    """
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedVersionError(
            f"The Transformers integration needs transformers{SUPPORTED}, and none is installed. "
            f"Install it with: pip install 'transformers{SUPPORTED}'"
        ) from error
    loaded = getattr(sys.modules.get("transformers"), "__version__", found)
    for version in (found, loaded):
        if Version(version).is_prerelease or Version(version) not in SpecifierSet(SUPPORTED):
            raise UnsupportedVersionError(
                f"The Transformers integration knows transformers{SUPPORTED}; {version} is installed. Nothing was "
                f"changed. Install a known one with: pip install 'transformers{SUPPORTED}'"
            )
    return found


def check_interface() -> None:
    """Compare everything that will be registered with, replaced or read with what it must look like.

    Raises:
        UnsupportedVersionError: If anything is missing or has other parameters; it lists every difference.
    """
    wrong = [
        f"{path} takes ({', '.join(found)}) instead of ({', '.join(wanted)})"
        for path, wanted in SIGNATURES.items()
        if (found := _parameters(find(path))) != wanted
    ]
    if find("utils.output_capturing:_active_collector") is None:
        wrong.append("utils.output_capturing:_active_collector is missing")
    wrong += [f"{path} isn't a dict" for path in MAPPINGS if not isinstance(find(path), dict)]
    if wrong:
        raise UnsupportedVersionError(
            f"This Transformers ({check_version()}) differs from the release that the integration was written for. "
            f"Nothing was changed. Install one that it knows (5.23 was run), or a newer anyattn. Differences: "
            f"{'; '.join(wrong)}."
        )


def find(path: str) -> Any:
    """Return what `"module:attribute.attribute"` names below the package transformers; None if nothing does."""
    module_name, _, attributes = path.partition(":")
    found: Any = importlib.import_module(f"transformers.{module_name}")
    for attribute in attributes.split("."):
        found = getattr(found, attribute, None)
    return found


def _parameters(function: Any) -> tuple[str, ...]:
    if not callable(function):
        return ("nothing: it is missing",)
    return tuple(inspect.signature(function).parameters)
