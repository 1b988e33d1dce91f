"""JSON objects from untrusted files: no duplicate keys, no NaN, no lone surrogates, no runaway nesting."""

import json
import re

from idefics_common.checkpoint.errors import quote

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json_object(data: bytes) -> dict:
    """The JSON object in `data`, which must be UTF-8 and hold nothing else.

    Raises ValueError (UnicodeDecodeError and JSONDecodeError among them), never another exception.
    """
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            # JSON readers with unsigned integers take -0 for a float; so do we, and refuse it where an
            # integer is due.
            parse_int=lambda digits: -0.0 if digits == "-0" else int(digits),
        )
    except RecursionError:
        raise ValueError("its objects are nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"expected an object {{...}}, got {type(parsed).__name__}")
    return parsed


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {quote(key)} appears twice in one object")
        for text in (key, value):
            if isinstance(text, str) and _LONE_SURROGATE.search(text):
                raise ValueError(f"{quote(text)} holds half a surrogate pair, which is no character")
        result[key] = value
    return result


def _refuse_constant(constant: str):
    raise ValueError(f"{constant} is not JSON")
