"""A complete checkpoint and a photograph that come with the library, so that a fresh install has something to run.

They are in the wheel, 8 MB of it, because no repository on the hub holds them; it is less than one of the dependencies.
Here they are links to `examples/fashion`, whose page says how the model was trained and how well it answers. The
photograph is of Fashion-MNIST, under the MIT licence.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def sample_checkpoint() -> Path:
    """Directory of an IDEFICS of 2 million parameters, with its processor, that answers questions about clothes."""
    return _HERE / "checkpoint"


def sample_photograph() -> Path:
    """File of a photograph to ask it about: an ankle boot, 28 by 28 pixels."""
    return _HERE / "photograph.png"


__all__ = ["sample_checkpoint", "sample_photograph"]
