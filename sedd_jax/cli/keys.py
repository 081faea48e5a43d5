"""What is written after --config.KEY= on a command line."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sedd_jax import registry
from sedd_jax.config import KEYS, check_value, with_values
from sedd_jax.host.imports import import_modules


def parse(key: str, text: str) -> Any:
    """The value of --config.KEY=TEXT on a command line; ValueError as by check_value.

    A whole number may be written 1e6 too, several imports with commas, and parameters as JSON; the
    key schedule.parameters.NAME is of one of them.
    """
    section, _, parameter = key.partition(".parameters.")
    if parameter and f"{section}.parameters" in KEYS:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
        return text
    booleans = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    readings: list[Any] = [text]
    names = () if text == "()" else tuple(filter(None, text.split(",")))
    for read in (
        float,
        int,
        _whole_of_float,
        lambda text: booleans[text.lower()],
        lambda text: names,
        json.loads,
    ):
        with contextlib.suppress(ValueError, LookupError, RecursionError):
            readings.append(read(text))
    allowed = (value for value in readings if key in KEYS and KEYS[key].holds(value))
    value = next(allowed, text)
    check_value(key, value)
    return value


def _whole_of_float(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def with_texts(config: ConfigDict, texts: Mapping[str, str]) -> ConfigDict:
    """`with_values` of what is written after --config.KEY=."""
    changed = with_values(config, values_of(texts, config))
    for key in texts:
        _check_is_read(key, changed)
    return changed


def _check_is_read(key: str, config: ConfigDict) -> None:
    """ValueError for a field of sedd_jax's own parts where the config names a registered one."""
    kind, _, field = key.partition(".")
    if kind not in registry.KINDS or ".parameters." in key:  # sections of one part each
        return
    name, read = config[kind].name, ("name", "parameters", *registry.KINDS[kind].given)
    if registry.is_registered(kind, name) and field not in read:
        raise ValueError(
            f"config.{key} is of sedd_jax's own, {kind} {name!r} does not read it; give its own "
            f"fields, as config.{kind}.parameters.{field}"
        )


def values_of(texts: Mapping[str, str], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of what is written after --config.KEY=, see `parse`; schedule.parameters.NAME
    changes one of the config's parameters. Runs the modules of "imports" first: the other values
    may name what they register."""
    config = config or {}
    names = config.get("imports", ())
    if "imports" in texts:
        names = parse("imports", texts["imports"])
    check_value("imports", names)
    import_modules(names)
    values: dict[str, Any] = {}
    for key in sorted(texts, key=lambda key: ".parameters." in key):  # last
        value = parse(key, texts[key])
        if ".parameters." in key:
            whole, _, parameter = key.rpartition(".")
            section = config.get(whole.partition(".")[0], {})
            before = values.get(whole, section.get("parameters", {}))
            values[whole] = {**before, parameter: value}
        else:
            values[key] = value
    return values
