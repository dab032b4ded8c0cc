"""Every backend name that is known, its aliases, and how to install what it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class KnownBackend:
    """A backend's names and where its kernel comes from.

    Attributes:
        name: Its one canonical name.
        family: The group of backends that share a kernel source.
        needs: What has to be installed, with the oldest version that serves.
        install: The command that installs it; empty where it comes with torch. Errors and doctor take it from here.
        aliases: Other names, Diffusers' among them.
    """

    name: str
    family: str
    needs: str
    install: str = ""
    aliases: tuple[str, ...] = ()


_FLASH2 = "pip install 'flash-attn>=2.6.3,<3' --no-build-isolation"
_SAGE = "build SageAttention >= 2.1.1 from its sources (github.com/thu-ml/SageAttention); PyPI has 1.0.6 alone"
_HUB = "pip install 'kernels>=0.12'"

KNOWN: tuple[KnownBackend, ...] = (
    KnownBackend("native", "native", "torch >= 2.8"),
    KnownBackend("native_flash", "native", "torch >= 2.8", aliases=("_native_flash",)),
    KnownBackend("native_efficient", "native", "torch >= 2.8", aliases=("_native_efficient",)),
    KnownBackend("native_cudnn", "native", "torch >= 2.8 with cuDNN", aliases=("_native_cudnn",)),
    KnownBackend("native_math", "native", "torch >= 2.8", aliases=("_native_math",)),
    KnownBackend("flex", "flex", "torch >= 2.8", aliases=("flex_attn",)),
    KnownBackend(
        "flash2",
        "flash2",
        "flash-attn >= 2.6.3, an NVIDIA GPU of sm80 or newer",
        _FLASH2,
        ("flash", "flash_attn", "flash_varlen", "flash_attn_2"),
    ),
    KnownBackend(
        "flash3",
        "flash3",
        "flash_attn_interface or flash_attn_3, an NVIDIA GPU of sm90",
        "pip install fa3-fwd (forward only), or build hopper/ of github.com/Dao-AILab/flash-attention",
        ("_flash_3", "_flash_varlen_3", "flash_attn_3"),
    ),
    KnownBackend(
        "flash3_fp8",
        "flash3",
        "flash_attn_interface, flash_attn_3 or fa3-fwd, an NVIDIA GPU of sm90; quantises to fp8",
        "pip install fa3-fwd (forward only), or build hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    KnownBackend(
        "flash4",
        "flash4",
        "flash-attn-4, an NVIDIA GPU of sm90 to sm103",
        "pip install --pre flash-attn-4",
        ("flash_attn_4", "_flash_4"),
    ),
    KnownBackend("sage", "sage", "SageAttention >= 2.1.1", _SAGE, ("sage_attn", "sage_varlen")),
    KnownBackend("sage_int8_fp16", "sage", "SageAttention >= 2.1.1, sm80+", _SAGE, ("_sage_qk_int8_pv_fp16_cuda",)),
    KnownBackend(
        "sage_int8_fp16_triton", "sage", "SageAttention >= 2.1.1, sm80+", _SAGE, ("_sage_qk_int8_pv_fp16_triton",)
    ),
    KnownBackend("sage_int8_fp8", "sage", "SageAttention >= 2.1.1, sm89+", _SAGE, ("_sage_qk_int8_pv_fp8_cuda",)),
    KnownBackend(
        "sage_int8_fp8_sm90", "sage", "SageAttention >= 2.1.1, sm90", _SAGE, ("_sage_qk_int8_pv_fp8_cuda_sm90",)
    ),
    KnownBackend("xformers", "xformers", "xformers >= 0.0.29", "pip install 'xformers>=0.0.29'"),
    KnownBackend(
        "aiter",
        "aiter",
        "amd-aiter >= 0.1.5 and an AMD GPU (PyPI's 'aiter' is another package)",
        "pip install 'amd-aiter>=0.1.5'",
        ("aiter_fa2",),
    ),
    KnownBackend(
        "xla", "xla", "torch_xla >= 2.5 and a TPU", "pip install 'torch_xla[tpu,pallas]>=2.5'", ("_native_xla",)
    ),
    KnownBackend(
        "npu",
        "npu",
        "torch_npu and an Ascend NPU",
        "pip install torch_npu (of torch's own minor version)",
        ("_native_npu",),
    ),
    KnownBackend(
        "flash2_hub", "flash2", "kernels >= 0.12", _HUB, ("flash_hub", "flash_varlen_hub", "flash_attn_2_hub")
    ),
    KnownBackend("flash3_hub", "flash3", "kernels >= 0.12", _HUB, ("_flash_3_hub", "_flash_3_varlen_hub")),
    KnownBackend("flash4_hub", "flash4", "kernels >= 0.12", _HUB, ("flash_4_hub",)),
    KnownBackend("sage_hub", "sage", "kernels >= 0.12", _HUB),
    KnownBackend(
        "sage_blackwell_hub", "sage_blackwell", "kernels >= 0.12, an NVIDIA GPU of sm120; computes in fp4", _HUB
    ),
    KnownBackend("aiter_hub", "aiter", "kernels >= 0.12 and an AMD GPU", _HUB, ("aiter_fa2_hub",)),
)
"""Every backend of the plan, in the order in which tables list them."""

BY_NAME: dict[str, KnownBackend] = {known.name: known for known in KNOWN}

ALIASES: dict[str, str] = {alias: known.name for known in KNOWN for alias in known.aliases}


def canonical(name: str, extra: Iterable[str] = ()) -> str | None:
    """Turn a name or an alias into the canonical name; None where nothing has it.

    Args:
        name: What a person wrote; case doesn't matter.
        extra: Further canonical names, of third parties.
    """
    lowered = name.strip().lower()
    for candidate in (lowered, lowered.replace("-", "_")):
        if candidate == AUTO or candidate in BY_NAME or candidate in extra:
            return candidate
        if candidate in ALIASES:
            return ALIASES[candidate]
    return name if name in extra else None


def nearest(name: str, extra: Iterable[str] = ()) -> list[str]:
    """Give the known names and aliases that look most like a misspelt one."""
    import difflib

    known = [AUTO, *BY_NAME, *ALIASES, *extra]
    return difflib.get_close_matches(name.strip().lower(), known, n=4, cutoff=0.4)
