"""Diffusers, running its attention through anyattn.

```python
import anyattn
from anyattn.integrations import diffusers as integration

integration.enable()                                   # idempotent; diverts nothing by itself
pipe.transformer.set_attention_backend("anyattn")      # Diffusers' own setter: anyattn's settings decide
with anyattn.attention_backend("native_math"): ...     # every model of Diffusers follows
anyattn.set_attention_backend(pipe, "auto")            # a pin on everything that computes attention
integration.disable()                                  # everything as before
```
"""

from __future__ import annotations

from anyattn.integrations.diffusers import policies as policies
from anyattn.integrations.diffusers import schedules as schedules
from anyattn.integrations.diffusers.install.coverage import Layer, attention_layers
from anyattn.integrations.diffusers.models import (
    ComponentReport,
    SetReport,
    handles,
    reset_attention_backend,
    set_attention_backend,
)
from anyattn.integrations.diffusers.state import disable, enable, is_enabled
from anyattn.integrations.diffusers.versions import SUPPORTED, UnsupportedVersionError

__all__ = [
    "SUPPORTED",
    "ComponentReport",
    "Layer",
    "SetReport",
    "UnsupportedVersionError",
    "attention_layers",
    "disable",
    "enable",
    "handles",
    "is_enabled",
    "reset_attention_backend",
    "set_attention_backend",
]
