"""YAML below, command line above: both become one list of tokens for one HfArgumentParser."""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from .runtime import UserError

SECTIONS = ("model", "data")
_BUILT_IN = Path(__file__).with_name("configs")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


Sections = dict[str, dict[str, Any]]


def parse(
    classes: Sequence[type], argv: Sequence[str], *, sections: Sequence[str] = SECTIONS, about: str | None = None
) -> tuple[list[Any], Sections]:
    """Fills the dataclasses from `--config FILE` and the command line, which wins.

    Args:
        classes: argument dataclasses with disjoint field names.
        argv: command line without the program's name.
        sections: names of the free sections that the recipe has.
        about: the end of `--help`.

    Returns:
        One instance of each class, and the free sections: `model:` in the YAML, `--model.NAME VALUE`; likewise `data`.

    Raises:
        UserError: unknown or malformed settings, with the nearest known names.
    """
    parser = _Parser(classes, allow_abbrev=False, epilog=about)  # type: ignore[arg-type]
    known = [f.name for cls in classes for f in dataclasses.fields(cls)]
    flat, given = _split_sections(argv, sections)
    settings = _read_config(flat, sections)
    found = {name: {**settings.pop(name, {}), **values} for name, values in given.items()}
    for key in settings:
        if key not in known:
            raise UserError(f"unknown key {key!r} in {_config_flag(flat)}{near(key, known)}")
    *values, rest = parser.parse_args_into_dataclasses(
        _tokens(settings) + flat, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}{near(rest[0].lstrip('-').split('=')[0], known, '--')}")
    return values, found


def typed_values(cls: type, values: dict[str, Any]) -> Any:
    """An instance of a dataclass from values of YAML, converted to the types of its fields.

    Raises:
        UserError: a value of another type.
    """
    whole = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in values.items()}
    parser = _Parser([cls], allow_abbrev=False)  # type: ignore[list-item]
    return parser.parse_args_into_dataclasses(_tokens(whole), look_for_args_file=False)[0]


def build_config(config_class: type, settings: dict[str, Any]) -> Any:
    """The model's configuration; an unknown hyperparameter is an error that names the nearest known ones."""
    known = [f.name for f in dataclasses.fields(config_class)] + list(getattr(config_class, "attribute_map", {}))
    for key in settings:
        if key not in known:
            raise UserError(f"unknown hyperparameter {key!r} of {config_class.__name__}{near(key, known)}")
    try:
        return config_class(**settings)
    except Exception as error:  # strict dataclasses wrap the validator's error in their own classes
        cause = error.__cause__ or error
        text = " ".join(str(cause).split()).removeprefix(f"{config_class.__name__}: ")
        raise UserError(f"{config_class.__name__}: {text}") from error


def find_config(name: str) -> Path:
    """The file `name`, or the recipe configuration of that name that comes with the package.

    Raises:
        UserError: neither exists.
    """
    built_in = {path.stem: path for path in sorted(_BUILT_IN.glob("*.yaml"))}
    if name in built_in:
        return built_in[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no file {name!r} for --config; built-in names: {', '.join(built_in)}")
    return path


def _read_config(argv: Sequence[str], sections: Sequence[str]) -> dict[str, Any]:
    name = _config_flag(argv)
    if name is None:
        return {}
    path = find_config(name)
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected 'key: value' lines, got {settings!r}")
    for name in sections:
        section = settings.get(name) or {}
        if not isinstance(section, dict):
            raise UserError(f"{path}: expected 'key: value' lines under {name!r}, got {section!r}")
        settings[name] = {key: _number(value) for key, value in section.items()}
    return settings


def _config_flag(argv: Sequence[str]) -> str | None:
    for position, token in enumerate(argv):
        if token == "--config" and position + 1 < len(argv):
            return argv[position + 1]
        if token.startswith("--config="):
            return token.removeprefix("--config=")
    return None


def _split_sections(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], Sections]:
    flat: list[str] = []
    sections: Sections = {name: {} for name in names}
    tokens = iter(argv)
    for token in tokens:
        section, dot, rest = token.removeprefix("--").partition(".")
        if not (token.startswith("--") and dot and section in names):
            flat.append(token)
            continue
        name, equals, text = rest.partition("=")
        value = text if equals else next(tokens, None)
        if value is None:
            raise UserError(f"{token} needs a value")
        sections[section][name] = _number(yaml.safe_load(value))
    return flat, sections


def _number(value: Any) -> Any:
    """YAML reads 1e-3 (no dot) as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _tokens(settings: dict[str, Any]) -> list[str]:
    tokens: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        tokens += [f"--{key}", *map(str, values)]
    return tokens


def near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean ...?" with the known names closest to `name`, or nothing."""
    matches = difflib.get_close_matches(name.replace("-", "_"), list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(prefix + match for match in matches)}?" if matches else ""
