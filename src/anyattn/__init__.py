"""One call for attention in PyTorch, over every attention kernel you can install."""

from typing import TYPE_CHECKING

from anyattn import integrations as integrations
from anyattn import masks
from anyattn.api import attention, scaled_dot_product_attention
from anyattn.errors import (
    AnyattnError,
    AnyattnWarning,
    BackendUnavailableError,
    InvalidCallError,
    InvalidSettingError,
    KernelError,
    UnknownBackendError,
    UnsupportedCallError,
)
from anyattn.introspection import BackendRow, backends, explain, plan
from anyattn.masks.values import prepare_mask
from anyattn.pins.steps import denoising_step
from anyattn.policy.policy import Policy
from anyattn.policy.rule import Rule
from anyattn.scopes.recording import record
from anyattn.settings import (
    attention_backend,
    replace_sdpa,
    reset,
    reset_attention_backend,
    set_attention_backend,
    set_default_backend,
)
from anyattn.types.decision import Candidate, Decision, Preference
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec, MaskSpec
from anyattn.varlen import attention_varlen

__version__ = "0.1.0"

if TYPE_CHECKING:
    from anyattn.testing.verify import verify

__all__ = [
    "AnyattnError",
    "AnyattnWarning",
    "AttentionSpec",
    "BackendRow",
    "BackendUnavailableError",
    "Candidate",
    "Conversion",
    "Decision",
    "InvalidCallError",
    "InvalidSettingError",
    "KernelError",
    "MaskSpec",
    "Policy",
    "Preference",
    "Reason",
    "Rule",
    "UnknownBackendError",
    "UnsupportedCallError",
    "__version__",
    "attention",
    "attention_backend",
    "attention_varlen",
    "backends",
    "denoising_step",
    "explain",
    "masks",
    "plan",
    "prepare_mask",
    "record",
    "replace_sdpa",
    "reset",
    "reset_attention_backend",
    "scaled_dot_product_attention",
    "set_attention_backend",
    "set_default_backend",
    "verify",
]


def __getattr__(name: str) -> object:
    # The conformance suite is imported when it is first asked for, so that a plain import stays quick.
    if name == "verify":
        from anyattn.testing.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
