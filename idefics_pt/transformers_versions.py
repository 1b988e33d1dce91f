"""What differs between the supported versions of transformers: the name of the cache.

Up to 5.23 it is `past_key_values`, from 5.24 on `cache`: in the outputs of models, in what `generate` hands from step
to step, and in the arguments of transformers' functions. Our models take both names with every version. What their
calls return has a field of the installed version's name, which can be read as an attribute of either name.
"""

import functools
from dataclasses import dataclass

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def given_cache(past_key_values, cache):
    """The cache of a call that may give it by either name.

    Raises:
        ValueError: if it was given by both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Give one of past_key_values and cache, which are two names of the same, got both.")
    return past_key_values if cache is None else cache


def takes_either_name(method):
    """`method`, one of transformers', with its cache given as `cache` or as `past_key_values`."""

    @functools.wraps(method)
    def taking_either(self, *args, past_key_values=None, cache=None, **kwargs):
        cache = given_cache(past_key_values, cache)
        return method(self, *args, **kwargs if cache is None else {**kwargs, CACHE: cache})

    return taking_either


def output_dataclass(cls):
    """`dataclass` for a `ModelOutput` with a field `cache`, which gets the name that the installed version wants.

    The other name can be read: from 5.24 on `ModelOutput` sees to it, and warns once; before, it is a property.
    """
    if CACHE != "cache":
        cls.__annotations__ = {CACHE if name == "cache" else name: kind for name, kind in cls.__annotations__.items()}
        setattr(cls, CACHE, None)
        cls.cache = property(lambda output: getattr(output, CACHE), doc="`past_key_values`, by its name from 5.24 on.")
    return dataclass(cls)
