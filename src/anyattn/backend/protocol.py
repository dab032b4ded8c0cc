"""The protocol of a backend and its laws.

A backend is a class that defines its names, the packages that contain its kernel, its place in `auto`'s order, a
declaration (`declarations`, one `Capabilities` per type of device), rules that no field can express (`rejects`), a pure
description of how a call reaches its kernel (`lower`), and the call itself (`run`). The registry, errors, reports and
the documentation's tables are made from it.

Laws, checked for every backend by `anyattn.testing`:
    1. A call that isn't refused returns what `anyattn.reference` returns, forward and backward.
    2. A refused call raises before `load` runs, with every reason.
    3. `reasons`, `lower` and `rejects` are pure: they depend on their arguments only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from anyattn.backend import needs
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.declared_reasons import declared_reasons, named_device
from anyattn.backend.known_bad.table import hits
from anyattn.backend.patterns import KernelPattern
from anyattn.environment import Environment, detect
from anyattn.sources.packages import FUNCTIONS, Package, first_that_serves, package_reasons
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec

Output = Tensor | tuple[Tensor, Tensor]


class Parts(NamedTuple):
    """The tensors of a call besides query, key and value; the spec says what they mean.

    Attributes:
        key: Boolean `(B, S_kv)` or `(B or 1, 1, 1, S_kv)`, or integer lengths `(B,)`; the user's own tensor.
        dense: Boolean or floating, with four dimensions, each full or 1.
        block: A FlexAttention BlockMask.
        sinks: `(H,)`.
        cu_seqlens_q: int32 `(B + 1,)`: where each packed sequence's queries begin.
        cu_seqlens_k: The same for keys.
    """

    key: Tensor | None = None
    dense: Tensor | None = None
    block: Any | None = None
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Lowering:
    """How a call reaches a kernel; constants only, so that torch.compile can trace through it.

    Attributes:
        entry: The kernel's function.
        is_causal: Whether the kernel's own causal flag is set.
        dense: Whether every part of the mask is joined into one dense mask.
        copy: Whether query, key and value are copied to aligned, contiguous storage.
        compiled: Whether the kernel is compiled, by the backend itself or with the user's code.
        pad_keys: Whether keys are padded to a multiple of 16, and masked.
        upcast: Whether query, key and value are cast to float32, and the output back.
        repeat_heads: Whether key and value heads are repeated in memory, for a kernel without GQA.
        pattern: The pattern as it is passed to the kernel, with the rows and keys that are left.
        keys: How a key mask reaches the kernel: `"lengths"` (allowed keys come first), `"front"` (they are moved
            there), `"packed"` (the allowed keys of all entries are packed), or empty.
        head_dims: What head_dim and head_dim_v are padded to, if the adapter pads them.
        conversions: What is done, in words.
    """

    entry: str
    is_causal: bool = False
    dense: bool = False
    copy: bool = False
    compiled: bool = False
    pad_keys: bool = False
    upcast: bool = False
    repeat_heads: bool = False
    pattern: KernelPattern | None = None
    keys: Literal["", "lengths", "front", "packed"] = ""
    head_dims: tuple[int, int] | None = None
    conversions: tuple[Conversion, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A decided call: what `run` needs.

    Attributes:
        backend: The backend's name.
        spec: The call.
        lowering: How it reaches the kernel.
        rescale: Whether sinks are added to the result, by rescaling with lse.
    """

    backend: str
    spec: AttentionSpec
    lowering: Lowering
    rescale: bool = False


Run = Callable[[Plan, Tensor, Tensor, Tensor, Parts], Output]
Runner = Callable[[Tensor, Tensor, Tensor], Output]
MaskedRunner = Callable[[Tensor, Tensor, Tensor, Any], Output]


class Backend:
    """One attention implementation under one name; subclass it, one file per family.

    A subclass with a name of its own inherits neither `aliases` nor `auto_rank`.

    Attributes:
        name: Its canonical name.
        family: The group of backends that share a kernel's source.
        aliases: Other names, including Diffusers'.
        packages: The distributions that contain its kernel, the likeliest first; one is enough. Empty if it comes with
            torch.
        auto_rank: Its place when `auto` tries the backends that declare the call's type of device: the lowest number
            first, and among equals the one registered first. `native` has 10; `native_math`, which takes nearly every
            call, has 90, so a backend with the default is tried after it. For some calls on CUDA the kernels that
            `anyattn.selection.resolve.rule` names are tried before all others.
        declarations: What it accepts, per type of device.
        downloads: Whether `load` may download the kernel; then it is loaded only when requested by name, never by
            `auto` or by listings.
        is_double: Whether it is a contract double of the tests, in place of the real kernel.
        quantises: Whether the adapter itself quantises; then results are coarse whatever kernel runs.
        slow_start: Whether its first call imports or compiles for seconds; it isn't measured in the midst of a program.
        bound_traces: Whether what `bind` returns also works inside every tracer and transform, refuses mismatched
            dtypes and devices, follows autocast as SDPA does, and computes the gradients that are needed.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[Package, ...]] = ()
    auto_rank: ClassVar[int] = 100
    declarations: ClassVar[Mapping[str, Capabilities]] = {}
    downloads: ClassVar[bool] = False
    is_double: ClassVar[bool] = False
    quantises: ClassVar[bool] = False
    slow_start: ClassVar[bool] = False
    bound_traces: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            cls.aliases = vars(cls).get("aliases", ())
            cls.auto_rank = vars(cls).get("auto_rank", Backend.auto_rank)

    @property
    def needs(self) -> str:
        """What it needs, in words: packages with their versions, and the device."""
        return needs.needs(self.packages, self.declarations)

    @property
    def install(self) -> str:
        """The commands that install its kernel; empty if it comes with torch."""
        return needs.install(self.packages)

    def package(self, env: Environment) -> Package | None:
        """Return the package that contains the kernel on a machine, or None. Law: pure."""
        return first_that_serves(self.packages, env)

    def origin(self, env: Environment) -> str:
        """Return where the kernel's code comes from: a distribution with its version, or a Hub revision. Law: pure."""
        package = self.package(env)
        return "" if package is None else package.origin(env)

    def availability(self, env: Environment) -> Iterator[Reason]:
        """Yield why the kernel can't be had here: no such device, not installed, too old. Law: pure."""
        yield from self.no_device(env)
        yield from package_reasons(self.packages, env)

    def no_device(self, env: Environment) -> Iterator[Reason]:
        """Yield a reason if the machine has none of the declared devices. Law: pure."""
        if not any(env.device(kind) for kind in self.declarations):
            need = named_device(*self.declarations)
            yield Reason("no_device", need, ", ".join(device.type for device in env.devices))

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        """Return the declaration for the call's device, or None. Law: pure."""
        return self.declarations.get(spec.device_type)

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        """Yield the reasons that no field of the declaration can express. Law: pure."""
        return iter(())

    def reasons(self, spec: AttentionSpec, env: Environment) -> tuple[Reason, ...]:
        """Return every reason for refusing the call; none means that it admits it. Law: pure."""
        caps = self.capabilities(spec, env)
        found = [*self.availability(env)]
        no_device = any(reason.code == "no_device" for reason in found)
        if caps is None:
            if not no_device:
                need = f"tensors on {' or '.join(self.declarations)}"
                found.append(Reason("device_type", need, spec.device_type, "move them, or choose another backend"))
            return tuple(dict.fromkeys(found))
        declared = declared_reasons(caps, spec, env.device(spec.device_type, spec.device_index))
        # A missing device is reported once.
        found += (reason for reason in declared if not (no_device and reason.code == "no_device"))
        found += self.rejects(spec, env)
        found += self.known_bad(spec, env)
        return tuple(dict.fromkeys(found))

    def known_bad(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        """Yield the rows of the known-bad table that the lowering doesn't already avoid. Law: pure."""
        return (row.reason() for row in hits((self.name,), spec, env))

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        """Return how an admitted call reaches the kernel. Law: pure, and exact."""
        raise NotImplementedError(f"the backend {self.name} has no lower(); see anyattn.backend.Backend")

    def length_period(self, spec: AttentionSpec) -> int:
        """Return by which number lengths of calls without a mask have to be alike to be decided alike. Law: pure.

        With 1, reasons and lowerings are thresholds in S_q, S_kv and products of them, and what `bind` returns runs
        other lengths too. With more, they also go by the residues of both lengths by this number. With 0, the default,
        every pair of lengths is decided.
        """
        return 0

    def load(self) -> None:
        """Import the kernel; called once, before the first `run`. Law: nothing else imports it.

        It stores the kernel's functions as `anyattn.sources.packages.FUNCTIONS[name]`.

        Raises:
            Exception: Whatever the kernel's package raises; it is reported as BackendUnavailableError.
        """
        if self.packages:
            FUNCTIONS[self.name] = self.prepare((self.package(detect()) or self.packages[0]).load())

    def prepare(self, functions: Any) -> Any:
        """Return what `run` uses of the imported functions, with what is read from their signatures.

        Raises:
            ImportError: If `run` can't call them.
        """
        return functions

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        """Call the kernel, in the spec's layout. Law: returns what the reference returns; inputs are unchanged.

        It returns `(out, lse)` if `plan.spec.return_lse` or `plan.rescale` is set; the latter is for a backend that
        declares lse and not sinks, which anyattn then adds. Rows without a key give zeros, finite gradients, and lse
        -inf. Strides along head_dim are 1 if the declaration requires it.

        torch.compile traces it; read fields of the plan and its spec, and no properties.
        """
        raise NotImplementedError

    def bind(self, plan: Plan) -> Runner | None:
        """Return a shorter way to run a plan without tensors besides query, key and value, or None.

        `run(query, key, value)` gets plain tensors of the plan's shapes and dtype, on one device, and isn't traced or
        transformed, unless `bound_traces` is set.
        """
        return None

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        """Return a shorter way to run a plan with a mask and without sinks, `run(query, key, value, attn_mask)`.

        `attn_mask` is a mask's tensor or object, as the user passed it; for all else see `bind`.
        """
        return None
