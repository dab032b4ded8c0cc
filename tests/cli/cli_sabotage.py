"""Backends of another package that fail in every way a kernel can; the tests install them beside anyattn."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import torch

from anyattn.adapters.native import Native
from anyattn.backend.protocol import Backend


class _Like(Backend):
    """`native`, so that a subclass can spoil it in `run`."""

    family = "sabotage"
    declarations = {"cpu": Native.declarations["cpu"]}

    def lower(self, spec, env):
        return Native().lower(spec, env)


class Aborts(_Like):
    name = "aborts"

    @staticmethod
    def run(plan, query, key, value, parts):
        sys.stderr.write("kernel: assertion failed\n")
        os.abort()


class AbortsInBackward(_Like):
    name = "aborts_in_backward"

    @staticmethod
    def run(plan, query, key, value, parts):
        if plan.spec.needs_grad:
            os.abort()
        return Native.run(plan, query, key, value, parts)


class Segfaults(_Like):
    name = "segfaults"

    @staticmethod
    def run(plan, query, key, value, parts):
        ctypes.string_at(0)


class Hangs(_Like):
    name = "hangs"

    @staticmethod
    def run(plan, query, key, value, parts):
        if "SABOTAGE_PID" in os.environ:
            Path(os.environ["SABOTAGE_PID"]).write_text(str(os.getpid()))
        while True:
            time.sleep(1)


class Leaves(_Like):
    name = "leaves"

    @staticmethod
    def run(plan, query, key, value, parts):
        os._exit(0)


class Raises(_Like):
    name = "raises"

    @staticmethod
    def run(plan, query, key, value, parts):
        raise RuntimeError("no kernel image is available\nsecond line")


class Wrong(_Like):
    name = "wrong"

    @staticmethod
    def run(plan, query, key, value, parts):
        return Native.run(plan, 1.01 * query, key, value, parts)


class GivesNaN(_Like):
    name = "gives_nan"

    @staticmethod
    def run(plan, query, key, value, parts):
        return torch.full_like(query, float("nan"))


class Chatty(_Like):
    name = "chatty"

    @staticmethod
    def run(plan, query, key, value, parts):
        print("hello from the kernel")
        os.write(1, b"hello from C\n")
        return Native.run(plan, query, key, value, parts)


ALL = (Aborts, AbortsInBackward, Segfaults, Hangs, Leaves, Raises, Wrong, GivesNaN, Chatty)
