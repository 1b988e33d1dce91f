"""Chat messages for `IdeficsProcessor.apply_chat_template`: the format of the -instruct checkpoints as a Jinja
template, and what messages may hold.

A turn is the speaker's name with a colon, what it says with its images where they were, and ``<end_of_utterance>``;
turns stand on lines of their own, after the beginning of text::

    <s>User: What is in this picture?<image><end_of_utterance>
    Assistant: A cat.<end_of_utterance>
    User:<image>And in this one?<end_of_utterance>
    Assistant:

A system message is text of its own before the first turn. Base checkpoints, whose tokenizer has no
``<end_of_utterance>``, get the same without it.
"""

from collections.abc import Mapping

from idefics_common.prompts.prompt import END_OF_UTTERANCE_TOKEN, IMAGE_TOKEN, check_no_image_file, shortened
from idefics_common.prompts.tokenizer_checks import has_token

# The minus signs take out line ends and indentation; "\n" inside the strings stays. The two words in capitals stand
# for tokens, filled in below.
_TEMPLATE = """
{{- bos_token | default('', true) }}
{%- for message in messages %}
    {%- set role = message['role'] %}
    {%- if role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('roles are system, user and assistant, got ' ~ role) }}
    {%- endif %}
    {%- set content = message['content'] %}
    {%- if content is string %}
        {%- set content = [{'type': 'text', 'text': content}] %}
    {%- endif %}
    {%- if role != 'system' %}
        {{- role | capitalize ~ ':' }}
        {%- if content and content[0]['type'] == 'text' %}{{- ' ' }}{%- endif %}
    {%- endif %}
    {%- if role == 'assistant' %}
        {%- generation %}
            {%- for part in content %}
                {%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- 'IMAGE_TOKEN' }}{%- endif %}
            {%- endfor %}
            {{- 'END_OF_TURN' }}
        {%- endgeneration %}
    {%- else %}
        {%- for part in content %}
            {%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- 'IMAGE_TOKEN' }}{%- endif %}
        {%- endfor %}
        {%- if role == 'user' %}{{- 'END_OF_TURN' }}{%- endif %}
    {%- endif %}
    {%- if not loop.last %}{{- '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\nAssistant:' }}{%- endif %}
"""


def default_chat_template(tokenizer) -> str:
    """The template for a tokenizer's checkpoint: with ``<end_of_utterance>`` where the tokenizer has it."""
    end = END_OF_UTTERANCE_TOKEN if has_token(tokenizer, END_OF_UTTERANCE_TOKEN) else ""
    return _TEMPLATE.strip().replace("IMAGE_TOKEN", IMAGE_TOKEN).replace("END_OF_TURN", end)


def check_conversation(conversation, *, urls_only: bool) -> list:
    """Refuse messages that hold anything but text and images, and with `urls_only` files under other keys than "path".

    transformers also opens a file that is named under ``"url"``, and its tests rely on it. Messages often come from
    outside, so where fetching is off, they must not make this machine read a file in this way either.

    Args:
        conversation: messages, or a list of lists of them, as for `IdeficsProcessor.apply_chat_template`.
        urls_only: only ``"path"`` may name a file.

    Returns:
        a copy, in which ``"base64"`` is a data URI, so that it cannot be taken for the name of a file.

    Raises:
        ValueError: naming message and part: a content type that is neither text nor image; a text that is nothing but
            the path of an image file; with `urls_only`, a string under ``"url"`` or ``"image"`` that is no http, https
            or data URL.
        TypeError: for a message or a part that is no dictionary.
    """
    if any(isinstance(message, (list, tuple)) for message in conversation):
        return [
            [_check_message(one, f"conversation {row}, message {i}", urls_only) for i, one in enumerate(messages)]
            for row, messages in enumerate(conversation)
        ]
    return [_check_message(message, f"message {index}", urls_only) for index, message in enumerate(conversation)]


def _check_message(message, name: str, urls_only: bool) -> dict:
    if not isinstance(message, Mapping):
        raise TypeError(f"{name}: expected a dictionary of role and content, got {type(message).__name__}.")
    content = message.get("content")
    if isinstance(content, str):
        check_no_image_file(content, name)
    if not isinstance(content, (list, tuple)):
        return dict(message)
    parts = [_check_part(part, f"{name}, part {index}", urls_only) for index, part in enumerate(content)]
    return {**message, "content": parts}


def _check_part(part, name: str, urls_only: bool) -> dict:
    if not isinstance(part, Mapping):
        raise TypeError(f"{name}: expected a dictionary with a type, got {type(part).__name__}.")
    kind = part.get("type")
    if kind == "text":
        if isinstance(part.get("text"), str):
            check_no_image_file(part["text"], name)
        return dict(part)
    if kind == "image_url":  # as OpenAI's interface spells it
        source = part.get("image_url")
        part = {"type": "image", "url": source.get("url") if isinstance(source, Mapping) else source}
    elif kind == "images":  # so transformers' own tests of models for any input spell it
        part = {**part, "type": "image"}
    elif kind != "image":
        raise ValueError(f"{name}: content of type {kind!r} is not supported; the types are text and image.")
    # datasets fill keys that a part does not have with None
    part = {key: value for key, value in part.items() if value is not None}
    for key in ("url", "image"):
        source = part.get(key)
        if urls_only and isinstance(source, str) and not source.lower().startswith(("http://", "https://", "data:")):
            raise ValueError(
                f'{name}: "{key}" must be an http, https or data URL where fetching is off, got {shortened(source)}; '
                'a file goes under "path".'
            )
    if isinstance(part.get("base64"), str) and part["base64"][:5].lower() != "data:":
        part["base64"] = f"data:image/unknown;base64,{part['base64']}"
    return part
