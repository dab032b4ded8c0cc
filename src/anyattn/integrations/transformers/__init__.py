"""Transformers, running its attention through anyattn.

```python
import anyattn
from anyattn.integrations import transformers as integration

integration.enable()                                                # idempotent
model = AutoModel.from_pretrained(..., attn_implementation="anyattn")
anyattn.set_attention_backend(model, "auto")                        # a pin on its attention layers
integration.disable()                                               # everything as before
```
"""

from __future__ import annotations

from anyattn.integrations.transformers import policies as policies
from anyattn.integrations.transformers.layers import Layer, attention_layers
from anyattn.integrations.transformers.models import (
    SetReport,
    handles,
    reset_attention_backend,
    set_attention_backend,
)
from anyattn.integrations.transformers.state import disable, enable, enabled, is_enabled
from anyattn.integrations.transformers.versions import NAME, SUPPORTED, UnsupportedVersionError

__all__ = [
    "NAME",
    "SUPPORTED",
    "Layer",
    "SetReport",
    "UnsupportedVersionError",
    "attention_layers",
    "disable",
    "enable",
    "enabled",
    "handles",
    "is_enabled",
    "reset_attention_backend",
    "set_attention_backend",
]
