"""Which Diffusers is accepted, and how its environment variable reaches anyattn."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anyattn
from anyattn.integrations import diffusers as integration
from anyattn.integrations.diffusers import versions

attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
REGISTRY = attention_dispatch._AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _as_before():
    yield
    integration.disable()


def say_version(monkeypatch, version):
    import diffusers

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "diffusers" else real(name))
    monkeypatch.setattr(diffusers, "__version__", version)


@pytest.mark.parametrize("version", ["0.41.0", "0.42.0", "0.43.0", "0.43.0.dev0", "0.42.2.dev0", "1.0.0"])
def test_unknown_version_is_an_error_and_changes_nothing(monkeypatch, version):
    say_version(monkeypatch, version)
    stock = attention_dispatch.dispatch_attention_fn
    with pytest.raises(integration.UnsupportedVersionError, match=f"{version} is installed.*pip install"):
        integration.enable()
    assert not integration.is_enabled()
    assert attention_dispatch.dispatch_attention_fn is stock
    assert "anyattn" not in list(attention_dispatch.AttentionBackendName)
    assert issubclass(integration.UnsupportedVersionError, anyattn.AnyattnError)


@pytest.mark.parametrize("version", ["0.42.1", "0.42.7"])
def test_known_version_is_accepted(monkeypatch, version):
    say_version(monkeypatch, version)
    assert versions.check_version() == version


def test_missing_diffusers_is_an_error_with_the_cure(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(integration.UnsupportedVersionError, match=r"pip install 'diffusers>=0\.42\.1"):
        integration.enable()


@pytest.mark.parametrize("path", sorted(versions.SIGNATURES))
def test_changed_signature_is_an_error_and_changes_nothing(monkeypatch, path):
    module, _, attributes = path.partition(":")
    *owners, name = attributes.split(".")
    owner = versions.find(f"{module}:{'.'.join(owners)}") if owners else versions.load(module)
    monkeypatch.setattr(owner, name, lambda something_else: None)
    before = dict(REGISTRY._backends)
    with pytest.raises(integration.UnsupportedVersionError, match=rf"{name} takes \(something_else\)"):
        integration.enable()
    assert not integration.is_enabled()
    assert before == REGISTRY._backends


def test_missing_table_is_an_error(monkeypatch):
    monkeypatch.delattr(REGISTRY, "_constraints")
    with pytest.raises(integration.UnsupportedVersionError, match="_constraints is a NoneType instead of a dict"):
        integration.enable()


def test_module_that_sees_another_torch_is_an_error_and_nothing_stays_half_done(monkeypatch):
    import diffusers.models.attention_processor as module

    monkeypatch.setattr(module, "F", object())
    stock = attention_dispatch.dispatch_attention_fn
    with pytest.raises(integration.UnsupportedVersionError, match="expected to hold torch's"):
        integration.enable()
    assert attention_dispatch.dispatch_attention_fn is stock
    assert "anyattn" not in list(attention_dispatch.AttentionBackendName)
    assert not integration.is_enabled()


def test_variable_set_after_the_import_of_diffusers_counts_until_enable(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "anyattn")
    integration.enable()
    assert REGISTRY._active_backend == "anyattn"
    integration.disable()
    assert REGISTRY._active_backend == "native"


def test_variable_does_not_undo_a_choice_made_since(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "anyattn")
    with attention_dispatch.attention_backend("_native_math"):
        integration.enable()
        assert REGISTRY._active_backend == "_native_math"


PROGRAM = """
import sys
import torch
import diffusers
try:
    import diffusers.models.attention_dispatch
except ValueError as error:
    assert "'anyattn' is not a valid" in str(error), error
else:
    sys.exit("Diffusers has learnt the name; the trouble to hide it can go")
import anyattn
assert not [name for name in sys.modules if name.startswith("anyattn.integrations.diffusers")]
from anyattn.integrations import diffusers as integration
integration.enable()
assert "diffusers.models.transformers.transformer_sd3" not in sys.modules
from diffusers.models import attention_dispatch
from diffusers.utils import constants
assert attention_dispatch._AttentionBackendRegistry._active_backend == "anyattn"
assert constants.DIFFUSERS_ATTN_BACKEND == "anyattn"
from diffusers_tiny import make, output
for name in ("flux", "sd3"):
    model, inputs = make(name)
    with anyattn.record() as calls:
        output(name, model, inputs)
    assert {call.chosen for call in calls} == {"native"}, calls
integration.disable()
assert attention_dispatch._AttentionBackendRegistry._active_backend == "native"
"""


def test_variable_set_from_the_start_sends_every_model_to_anyattn():
    paths = [str(Path(anyattn.__file__).parents[1]), str(Path(__file__).parent)]
    environ = {**os.environ, "DIFFUSERS_ATTN_BACKEND": "anyattn", "PYTHONPATH": os.pathsep.join(paths)}
    environ.pop("ANYATTN_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
