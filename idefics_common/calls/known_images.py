"""Recognises images that are given once more, so that they are not encoded again.

A tensor of image states is known to come from one tensor of images: that very object, unchanged. Neither is kept
alive, and no pixels are compared; equal images in another tensor are encoded again, with the same result.
"""

import weakref

_source_of = {}  # id of the states: weak references to the states and to the images, and the version of the images


def remember_source(states, images, version=0) -> None:
    """Note that `states` were made from `images`.

    Args:
        states, images: tensors of any framework.
        version: changes whenever the values of `images` do; None where that cannot be known: then nothing is noted.
    """
    if version is None:
        return
    key = id(states)
    forget = weakref.ref(states, lambda _: _source_of.pop(key, None))
    _source_of[key] = forget, weakref.ref(images), version


def is_source(images, states, version=0) -> bool:
    """Whether `states` are known to have been made from `images` as they are now."""
    return images is not None and source_of(states) is images and _source_of[id(states)][2] == version


def source_of(states):
    """The images that `states` were made from, if that is known and they still exist; else None."""
    known = _source_of.get(id(states))
    return known[1]() if known is not None and known[0]() is states else None
