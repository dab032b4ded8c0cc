"""What happens before a call is decided for the first time: measuring it, if `ANYATTN_TUNE` asks for that."""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

from torch import Tensor

from anyattn.errors import InvalidSettingError
from anyattn.scopes import defaults
from anyattn.types.spec import AttentionSpec

TUNE: Final = "ANYATTN_TUNE"


def tune_first(
    spec: AttentionSpec,
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
) -> None:
    """Measure a call with every backend that `auto` may take for it, if the variable says so.

    Raises:
        InvalidSettingError: If the variable holds neither a yes nor a no.
    """
    word = os.environ.get(TUNE)
    if not word:
        return
    wanted = defaults.means_yes(word)
    if wanted is None:
        raise InvalidSettingError(f"{TUNE} is {word!r}; set it to 1, yes, true or on to measure calls, or to 0.")
    if wanted:
        # By its name, since measuring stands above running and isn't imported without need.
        importlib.import_module("anyattn.tuning.in_place").tune_first(spec, scope, query, key, value, attn_mask, sinks)
