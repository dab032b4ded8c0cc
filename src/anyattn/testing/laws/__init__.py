"""The laws of a backend, by name: `LAWS` lists them, `check` runs one for a backend and a case."""

from __future__ import annotations

from collections.abc import Mapping

from anyattn.backend.capabilities import Capabilities
from anyattn.testing.cases.case import Case
from anyattn.testing.laws import conduct, memory, numbers
from anyattn.testing.laws.base import Law, LawBroken, LawResult

__all__ = ["LAWS", "Law", "LawBroken", "LawResult", "check"]


def _as_it_is(case: Case, caps: Capabilities) -> Case:
    return case


def _dead(case: Case, caps: Capabilities) -> Case:
    """Change a case so that it has rows without a key, in one of several ways."""
    ways = ("padding:dead", "boolean:qk:dead", "bias:bqk:own:dead", "lengths:dead", "causal:lower_right")
    way = ways[case.seed % len(ways)]
    if "dead" in case.mask and "block" not in case.mask:
        return case
    if way == "causal:lower_right" and case.strides != "packed":
        return case.replace(mask=way, seqlen_q=case.seqlen_kv + 4, grad=case.grad.replace("m", ""))
    way = "padding:dead" if way == "causal:lower_right" else way
    return case.replace(mask=way, grad=case.grad.replace("m", ""))


def _halved(case: Case, caps: Capabilities) -> Case:
    # An lse of finfo.min has no digits left to merge by.
    mask = "causal" if "block" in case.mask else case.mask.replace(":min", ":inf")
    return case.replace(lse=True, grad="", sinks=False, mask=mask, seqlen_kv=max(case.seqlen_kv, 2))


def _dropping(case: Case, caps: Capabilities) -> Case:
    mask = case.mask if case.seed % 2 else "none"
    return case.replace(
        dropout_p=(0.1, 0.5, 0.9, 1.0)[case.seed % 4],
        seqlen_kv=(16, 32, 64)[case.seed % 3],
        seqlen_q=max(case.seqlen_q, 16),
        softcap=None,
        scale=0.1,
        mask="none" if "block" in mask else mask,
    )


def _odd_storage(case: Case, caps: Capabilities) -> Case:
    from anyattn.testing.cases.recipes import STRIDES

    kind = case.strides if case.strides != "plain" else STRIDES[1 + case.seed % (len(STRIDES) - 1)]
    same = {"seqlen_kv": case.seqlen_q, "kv_heads": case.heads, "head_dim_v": 0} if kind == "packed" else {}
    return case.replace(strides=kind, **same)


def _lively(case: Case, caps: Capabilities) -> Case:
    # Enough keys, unequal lengths and uneven values, so that every argument has something to change.
    return case.replace(
        grad="", data="normal", strides="plain", seqlen_q=max(case.seqlen_q, 8), seqlen_kv=max(case.seqlen_kv, 11)
    )


LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(1, "right", "accepted: right, forward, lse and gradients", numbers.right, _as_it_is),
        Law(2, "rejected", "refused: before load, with every reason", conduct.rejected, _as_it_is, wide=True),
        Law(3, "liveness", "no argument is dropped", conduct.liveness, _lively, share=8),
        Law(4, "permutation", "batch entries and heads don't see one another", numbers.permutation, _as_it_is, share=3),
        Law(5, "strides", "storage doesn't matter", numbers.strides, _odd_storage, share=3),
        Law(6, "unchanged", "inputs stay as they were", conduct.unchanged, _as_it_is, share=3),
        Law(7, "deterministic", "repeats itself where that is asked for", conduct.deterministic, _as_it_is, share=3),
        Law(8, "dead_rows", "rows without keys: zeros, -inf, no gradient", numbers.dead_rows, _dead, share=2),
        Law(9, "compiled", "compiled as eager", conduct.compiled, _as_it_is, share=16),
        Law(10, "halves", "two halves merged by lse are the whole", numbers.halves, _halved, share=3),
        Law(11, "dropout", "drops what it should and rescales the rest", conduct.dropout, _dropping, share=4),
        Law(12, "unwritten_memory", "what nobody wrote stays out", memory.unwritten_memory, memory.off_tiles, share=6),
        Law(13, "packed_tails", "packed tokens of no sequence: zeros", memory.packed_tails, memory.packable, share=9),
    )
}
"""Every law, by name."""


def check(law: str, backend: str, case: Case) -> LawResult:
    """Run one law for one backend and case.

    Raises:
        LawBroken: If the backend breaks it.
    """
    return LAWS[law].check(backend, case)
