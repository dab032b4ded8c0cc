"""The two functions by which Diffusers reaches attention ("doors"), while the integration is enabled.

One replaces Diffusers' dispatcher, the other torch's scaled_dot_product_attention in the modules that call it
themselves. Each sends a call to anyattn if anyattn was asked for, and otherwise runs it as before.
"""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import torch

from anyattn import api
from anyattn.errors import AnyattnWarning
from anyattn.integrations.diffusers.calls import _in_force
from anyattn.integrations.diffusers.calls.arguments import EXTRAS, WINDOW, to_call
from anyattn.integrations.diffusers.versions import BACKEND_NAME
from anyattn.pins.pins import live_scope
from anyattn.process.bounded import Bounded
from anyattn.run import attempts
from anyattn.scopes import _in_force as core
from anyattn.scopes import defaults, lifetime

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Stock:
    """Diffusers' own dispatcher and registry; set when the integration is enabled."""

    dispatch: Callable[..., Any]
    registry: Any


_said: Bounded[tuple[str, str], None] = Bounded(256)
_current = defaults.current.get
_thread = defaults.thread
_held = lifetime.held
_tracing = torch.compiler.is_dynamo_compiling
_modes = torch._C._len_torch_function_stack


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Any:
    """Replace Diffusers' dispatcher; same arguments, same layout (batch, sequence, heads, head_dim).

    Returns:
        A tensor; with `attention_kwargs={"return_lse": True}` `(out, lse)`, lse float32 `(B, H, S_q)`.

    Raises:
        InvalidCallError: If a mask is ambiguous, a key of `attention_kwargs` is unknown, or the call asks for parallel
            attention.
    """
    mine, name = _route(backend)
    if mine and attn_mask is None and not attention_kwargs and parallel_config is None:
        if _modes() and _scores_skipped(query, value, 1):
            return value
        return api.attention(query, key, value, None, dropout_p, is_causal, scale, enable_gqa, backend=name)
    if not mine:
        return Stock.dispatch(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )
    if _modes() and _scores_skipped(query, value, 1):
        return value
    explicit = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    call = to_call(query, key, explicit, attention_kwargs, parallel_config)
    return api.attention(query, key, value, backend=name, **call)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Replace torch's function of this name inside the modules of Diffusers that call it themselves."""
    if not _tracing():
        scope = _current()
        if not (scope.look or _held or _modes() or _thread.entered):
            if scope.asked:
                # A call that is already decided for these shapes needs none of the changes below.
                plain = (dropout_p, is_causal, scale, enable_gqa, None, None, False, "BHSD")
                found = attempts.run_decided(scope, query, key, value, attn_mask, plain)
                if found is not None:
                    return found
            elif Stock.registry._active_backend != BACKEND_NAME:
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
    if not _route(None)[0]:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if _modes() and _scores_skipped(query, value, -2):
        return value
    headless = query.dim() == 3
    if headless:
        attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        query, key, value = query[:, None], key[:, None], value[:, None]
    elif not enable_gqa and query.dim() == key.dim() == value.dim():
        key, value = _broadcast(query, key), _broadcast(query, value)
    out = api.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return out[:, 0] if headless else out


def registered_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
    **attention_kwargs: Any,
) -> Any:
    """Run a call from a reference to Diffusers' dispatcher that was taken before it was replaced."""
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend=BACKEND_NAME,
        parallel_config=_parallel_config,
    )


REGISTERED_NAMES = (*inspect.signature(registered_backend).parameters, *EXTRAS, WINDOW)


class EveryName(frozenset[str]):
    """A set that contains every argument name: Diffusers drops arguments that aren't among a backend's names."""

    def __contains__(self, name: object) -> bool:
        return True


class Proxy(types.ModuleType):
    """A module with some of its names replaced; every other name is looked up in it when it is used."""

    def __init__(self, behind: types.ModuleType, **replaced: Any) -> None:
        super().__init__(behind.__name__, behind.__doc__)
        self.__dict__.update(replaced)
        self.__dict__["_behind"] = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_behind"], name)


FUNCTIONAL = Proxy(torch.nn.functional, scaled_dot_product_attention=scaled_dot_product_attention)
NN = Proxy(torch.nn, functional=FUNCTIONAL)
PROXIES: dict[str, Proxy] = {"F": FUNCTIONAL, "nn": NN}


def _broadcast(query: Tensor, other: Tensor) -> Tensor:
    """Expand one batch entry or head of keys to all of the query's, as torch does implicitly and anyattn doesn't."""
    lead = [size if other.shape[axis] == 1 else other.shape[axis] for axis, size in enumerate(query.shape[:-2])]
    return other.expand(*lead, *other.shape[-2:])


def _route(backend: Any) -> tuple[bool, str | None]:
    """Return whether anyattn runs a call, and which backend the call itself names.

    A pin of anyattn beats the backend that the call names, and so does `override=True`. Under a plain context, or if
    Diffusers' own setter chose anyattn, the backend that the call names is more specific, and anyattn runs that.
    """
    wish = _wish()
    if backend is None:
        return wish != "" or Stock.registry._active_backend == BACKEND_NAME, None
    if backend == BACKEND_NAME or wish in ("pin", "override"):
        return True, None
    if wish == "":
        return False, None
    name = backend if type(backend) is str else backend.value
    if wish == "context" and not torch.compiler.is_compiling():
        _say_once(name)
    return True, name


def _wish() -> str:
    """Return the kind of preference in force, with what compiled code entered on top of it."""
    if not _tracing():
        scope = _current()
        if scope.look or _thread.entered or _held:
            scope = live_scope(scope)
        return _in_force.wish_of(scope.settings)
    wish = _in_force.wish
    for kind, *_, override in core.entered:
        if kind == "pin":
            wish = wish if wish == "override" else "pin"
        elif kind == "route":
            wish = wish or "route"
        elif override:
            wish = "override"
        elif wish != "pin":
            wish = "context"
    return wish


def _say_once(name: str) -> None:
    context = str(lifetime.settings().context)
    if name == context or not _said.once((name, context)):
        return
    warnings.warn(
        f"Inside attention_backend({context!r}) a layer of Diffusers asks for {name!r} by itself (in its "
        f"code, or by Diffusers' own set_attention_backend), which is more specific: it runs on {name!r}. "
        "Decide otherwise with attention_backend(..., override=True), or with a pin on the model.",
        AnyattnWarning,
        stacklevel=4,
    )


def _scores_skipped(query: Tensor, value: Tensor, sequence: int) -> bool:
    """Whether Diffusers' layer-skip guidance asks for the values themselves instead of attention.

    It replaces torch's function while a layer runs (hooks/layer_skip.py of 0.42.1); few kernels call it.
    """
    layer_skip = sys.modules.get("diffusers.hooks.layer_skip")
    if layer_skip is None or query.shape[sequence] != value.shape[sequence]:
        return False
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(isinstance(mode, layer_skip.AttentionScoreSkipFunctionMode) for mode in modes)
