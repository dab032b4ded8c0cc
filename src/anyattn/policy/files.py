"""Policies as TOML files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from anyattn.errors import InvalidSettingError

FILE_NAME: Final = "anyattn_policy.toml"
"""The file beside a model."""


def file_for(path: Path) -> Path:
    """Return the file that a path means: itself if it ends in `.toml`, else the one in the folder."""
    return path if path.suffix == ".toml" and not path.is_dir() else path / FILE_NAME


def read(file: Path) -> dict[str, Any]:
    """Read a file.

    Raises:
        FileNotFoundError: If there is no such file.
        InvalidSettingError: If it isn't TOML.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no policy at {file}. Policy.save(folder) writes one.")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettingError(f"{file} isn't TOML: {error}") from error


def to_toml(data: Mapping[str, Any]) -> str:
    """Write a policy's plain data as TOML.

    Its values are printable text, lists of such, numbers and booleans, which JSON writes as TOML does.
    """
    lines = [f"{key} = {_value(value)}" for key, value in data.items() if key != "rules"]
    for rule in data["rules"]:
        lines += ["", "[[rules]]", *(f"{key} = {_value(value)}" for key, value in rule.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
