"""Which hidden states a call is to return; both rooms ask here."""

from collections.abc import Iterable


def wanted_hidden_states(output_hidden_states, count: int) -> set[int]:
    """Which of `count` hidden states `output_hidden_states` asks for.

    Args:
        output_hidden_states: True for all, False or None for none, an index or several for those, negative ones counted
            from the end; an index that does not exist asks for nothing.

    Raises:
        ValueError: for anything else.
    """
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    indices = list(indices) if isinstance(indices, Iterable) else [None]
    if not all(hasattr(i, "__index__") for i in indices):
        raise ValueError(
            f"output_hidden_states must be True, False, None, an index or several, got {output_hidden_states!r}."
        )
    return {i % count for i in indices if -count <= i < count}
