"""Options as people write them, and what they mean: ``key=value,...`` or JSON, to structs.

    driver=quorum,vote-threshold=1,children.0=a,children.1.driver=null
        ──parse──►  {"driver": "quorum", "vote-threshold": "1", "children": ["a", {"driver": "null"}]}
        ──fit────►  the same with 1 in place of "1", because the struct wants an integer there

* ``,,`` in a value is a comma; a key that is given twice has the value given last.
* A dot in a key is a step down: ``server.host=x`` is ``{"server": {"host": "x"}}``. Where all keys of a level are
  numbers it is a list, which must begin at 0 and have no gap.
* A first word without ``=`` is the value of the *implied* key, where there is one.
* What begins with ``{`` is JSON, also behind ``json:``. Its values have their types already.

Words become switches (on, off, yes, no, true, false, y, n), integers (also 0x10, and with the suffixes of sizes) or
numbers where the struct wants them. Errors name the option with its path, and what would be right.

Source: the man page of QEMU's storage daemon and the behaviour of QEMU 7.2 for the words; nothing else is promised
there for wrong input.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from blockstep.errors import OptionError
from blockstep.units import LEAST, MOST, parse_size

T = TypeVar("T")

_FRAGMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*|\d{1,9}")
#: The words of switches.
SWITCH: Final = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False,
                 "n": False}
_WORD: Final = re.compile(r"(?:[^,]|,,)*")


def read(text: str, kind: type[T], option: str, implied: str | None = None, switches: Collection[str] = ()) -> T:
    """``text`` as a struct of type ``kind`` (or a union of structs). Raises OptionError."""
    return fit(parse(text, option, implied, switches), kind, option, words=not is_json(text))


def is_json(text: str) -> bool:
    """Whether an option's text is JSON."""
    return text.startswith(("{", "json:"))


def parse(text: str, option: str, implied: str | None = None, switches: Collection[str] = ()) -> dict[str, Any]:
    """The text as nested dicts and lists; see the module. Raises OptionError that names ``option`` and the key.

    A word of ``switches`` may stand alone for ``word=on``, and with ``no`` before it for ``word=off``.
    """
    if is_json(text):
        return _parse_json(text.removeprefix("json:"), option)
    keys = f"{option}:" if option else ""
    tree: dict[str, Any] = {}
    for number, word in enumerate(_words(text)):
        key, equals, value = word.partition("=")
        if not equals:
            key, value = _alone(word, option, implied if number == 0 else None, switches)
        _put(tree, key, value, keys)
    whole: dict[str, Any] = _listed(tree, keys, "")
    return whole


def _words(text: str) -> list[str]:
    """The text at its single commas. One at the very end ends the last word, and begins no other."""
    words: list[str] = []
    at = 0
    while at < len(text):
        match = _WORD.match(text, at)
        assert match is not None
        words.append(match[0].replace(",,", ","))
        at = match.end() + 1
    return words


def _alone(word: str, option: str, implied: str | None, switches: Collection[str]) -> tuple[str, str]:
    if implied is not None and word:
        return implied, word
    if word in switches:
        return word, "on"
    if word.startswith("no") and word[2:] in switches:
        return word[2:], "off"
    raise OptionError(option, word, "KEY=VALUE, and the like after each comma (a comma in a value is written ',,')")


def _put(tree: dict[str, Any], key: str, value: str, option: str) -> None:
    steps = key.split(".")
    if not all(_FRAGMENT.fullmatch(step) for step in steps) or steps[0].isdigit():
        raise OptionError(option.rstrip(":"), key, "the name of an option, or several with dots between them")
    level = tree
    for depth, step in enumerate(steps[:-1], 1):
        level = level.setdefault(step, {})
        if not isinstance(level, dict):
            raise OptionError(_path(option, ".".join(steps[:depth])), level, f"given in one way: it is in {key!r} too")
    there = level.get(steps[-1])
    if isinstance(there, dict):
        raise OptionError(_path(option, key), value, f"given in one way: there is '{key}.{next(iter(there))}' too")
    level[steps[-1]] = value


def _listed(tree: dict[str, Any], option: str, path: str) -> Any:
    """Levels whose keys are numbers, as lists."""
    numbers = [key for key in tree if key.isdigit()]
    inner = {key: _listed(value, option, f"{path}.{key}".lstrip(".")) if isinstance(value, dict) else value
             for key, value in tree.items()}
    if not numbers:
        return inner
    if len(numbers) < len(tree):
        name = next(key for key in tree if not key.isdigit())
        raise OptionError(_path(option, f"{path}.{name}"), tree[name], "a number, as the others there are")
    by_number = {int(key): value for key, value in inner.items()}
    if sorted(by_number) != list(range(len(tree))):
        gap = next(number for number in range(len(tree) + 1) if number not in by_number)
        raise OptionError(_path(option, f"{path}.{gap}"), None, f"given: a list has no gaps, and {path} has "
                          f"{', '.join(sorted(numbers))}")
    return [by_number[number] for number in sorted(by_number)]


def _parse_json(text: str, option: str) -> dict[str, Any]:
    try:
        whole = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise OptionError(option, text, f"valid JSON ({error})") from None
    if not isinstance(whole, dict):
        raise OptionError(option, text, "a JSON object")
    return whole


# --- what the values mean ---


def fit(value: Any, kind: type[T], option: str, words: bool) -> T:
    """``value`` as ``kind``, a struct or a union of structs. ``words``: its values are words of a command line.

    Raises OptionError that names what is wrong by its path in ``option``.
    """
    option = f"{option}:" if option else ""
    fitted = _understood(value, inspect.type_info(kind), option, words)
    try:
        return msgspec.convert(fitted, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        path = where.rstrip("`").lstrip(".")
        right = what.removeprefix("Expected ").replace("`int`", "an integer").replace("`str`", "a string")
        raise OptionError(_path(option, path), _at(value, path), right) from None


def _understood(value: Any, kind: inspect.Type, option: str, words: bool) -> Any:
    """``value`` as msgspec converts it to ``kind``. Raises OptionError for what it never could."""
    if isinstance(kind, inspect.Metadata):
        return _understood(value, kind.type, option, words)
    if isinstance(value, msgspec.Struct):
        return value
    kinds = [one.type if isinstance(one, inspect.Metadata) else one
             for one in (kind.types if isinstance(kind, inspect.UnionType) else (kind,))]
    if isinstance(value, Mapping):
        return _understood_object(dict(value), kinds, option, words)
    if isinstance(value, list):
        for one in kinds:
            if isinstance(one, inspect.ListType):
                return [_understood(item, one.item_type, f"{option}.{index}", words)
                        for index, item in enumerate(value)]
    if isinstance(value, str):
        return _understood_word(value, kinds, option, words)
    _check(value, kinds, option, words)
    return value


def _understood_object(value: dict[str, Any], kinds: list[inspect.Type], option: str, words: bool) -> Any:
    structs = [one for one in kinds if isinstance(one, inspect.StructType)]
    if not structs:
        _check(value, kinds, option, words)
        return value
    struct = _chosen(value, structs, option)
    fields = {field.encode_name: field for field in struct.fields}
    for name in value:
        if name not in fields and name != struct.tag_field:
            for field in fields.values():  # a kind that is not there explains the options that would belong to it
                if isinstance(field.type, inspect.Metadata | inspect.LiteralType) and field.encode_name in value:
                    _check_literal(value[field.encode_name], field.type, _path(option, field.encode_name), words)
            known = sorted([*fields, *([struct.tag_field] if struct.tag_field else [])])
            raise OptionError(_path(option, name), value[name], f"left out; there is {_nearest(name, known)}")
    for field in fields.values():
        if field.required and field.encode_name not in value:
            raise OptionError(_path(option, field.encode_name), None, f"given: {_expected([field.type], words)}")
    return {name: item if name == struct.tag_field else _understood(item, fields[name].type, _path(option, name), words)
            for name, item in value.items()}


def _check_literal(value: Any, kind: inspect.Type, option: str, words: bool) -> None:
    """Raises OptionError for a word that is none of ``kind``'s, if those can be listed."""
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.LiteralType):
        _check(value, [kind], option, words)


def _chosen(value: dict[str, Any], structs: list[inspect.StructType], option: str) -> inspect.StructType:
    """The struct of a union that the tag says."""
    field = structs[0].tag_field
    if field is None:
        return structs[0]
    for struct in structs:
        if struct.tag == value.get(field):
            return struct
    tags = ", ".join(str(struct.tag) for struct in structs)
    raise OptionError(_path(option, field), value.get(field), f"one of {tags}" if len(structs) > 1 else tags)


def _understood_word(value: str, kinds: list[inspect.Type], option: str, words: bool) -> Any:
    if "\0" in value:  # in JSON
        raise OptionError(option.rstrip(":"), value, "without NUL")
    if words and not any(isinstance(one, inspect.StrType | inspect.LiteralType) for one in kinds):
        for one in kinds:
            meant = _meant(value, one)
            if meant is not None:
                _check_range(meant, option)
                return meant
    _check(value, kinds, option, words)
    return value


def _meant(word: str, kind: inspect.Type) -> Any:
    """What a word says where ``kind`` is wanted, or None if it makes no sense there."""
    if isinstance(kind, inspect.BoolType):
        return SWITCH.get(word)
    try:
        if isinstance(kind, inspect.IntType):
            if re.fullmatch(r"[+-]?\d+", word):
                return int(word)
            return int(word, 16) if re.fullmatch(r"0[xX][0-9a-fA-F]+", word) else parse_size(word)
        if isinstance(kind, inspect.FloatType):
            return float(word)
    except (ValueError, OptionError):
        pass
    return None


_PYTHON: Final[tuple[tuple[type[inspect.Type], tuple[type, ...]], ...]] = (
    (inspect.StrType, (str,)), (inspect.IntType, (int,)), (inspect.FloatType, (float, int)),
    (inspect.BoolType, (bool,)), (inspect.NoneType, (type(None),)), (inspect.ListType, (list,)),
    (inspect.DictType, (dict,)),
)


def _check(value: Any, kinds: list[inspect.Type], option: str, words: bool) -> None:
    for one in kinds:
        if isinstance(one, inspect.AnyType) or (isinstance(one, inspect.LiteralType) and value in one.values):
            return
        for kind, types in _PYTHON:
            if isinstance(one, kind) and isinstance(value, types) and (bool in types or not isinstance(value, bool)):
                _check_range(value, option)
                return
    raise OptionError(option.rstrip(":"), value, _expected(kinds, words))


def _check_range(value: Any, option: str) -> None:
    if isinstance(value, int) and not LEAST <= value <= MOST:
        raise OptionError(option.rstrip(":"), value, f"from {LEAST} to {MOST}")


def _expected(kinds: list[inspect.Type], words: bool) -> str:
    """What would be right, for people."""
    said: list[str] = []
    for kind in kinds:
        one = kind.type if isinstance(kind, inspect.Metadata) else kind
        if isinstance(one, inspect.UnionType):
            said.append(_expected(list(one.types), words))
        elif isinstance(one, inspect.LiteralType):
            said += [str(value) for value in one.values]
        elif isinstance(one, inspect.StructType):
            said.append(f"its members ({', '.join(field.encode_name for field in one.fields)})"
                        if not words else f"given as {option_names(one)}")
        elif type(one) in _NAMES and not (words and isinstance(one, inspect.NoneType)):
            said.append(_NAMES[type(one)][words])
    return " or ".join(dict.fromkeys(said))


def option_names(struct: inspect.StructType) -> str:
    """The members of a struct as the ends of dotted keys."""
    names = [*([struct.tag_field] if struct.tag_field else []), *(field.encode_name for field in struct.fields)]
    return ", ".join(f".{name}" for name in names)


#: In JSON, on a command line.
_NAMES: Final[dict[type[inspect.Type], tuple[str, str]]] = {
    inspect.StrType: ("a string", "a string"), inspect.IntType: ("an integer", "an integer"),
    inspect.FloatType: ("a number", "a number"), inspect.BoolType: ("true or false", "on or off"),
    inspect.NoneType: ("null", ""), inspect.ListType: ("a list", "a list (.0, .1, ...)"),
    inspect.DictType: ("an object", "further options behind a dot"),
}


def _nearest(name: str, known: list[str]) -> str:
    import difflib  # in errors only

    found = difflib.get_close_matches(name, known, 1)
    return f"'{found[0]}'" if found else ", ".join(known)


def _path(option: str, path: str) -> str:
    """``--option: path.to.it``: ``option`` ends with a colon while there is no path."""
    if not path:
        return option.rstrip(":")
    return f"{option} {path}" if option.endswith(":") else ".".join(filter(None, (option, path)))


def _at(value: Any, path: str) -> Any:
    for step in filter(None, path.split(".")):
        if not isinstance(value, Mapping) or step not in value:
            return value
        value = value[step]
    return value
