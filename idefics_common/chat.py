"""The chat format of the -instruct checkpoints, as a Jinja template for `IdeficsProcessor.apply_chat_template`.

A turn is the speaker's name with a colon, what it says with its images where they were, and ``<end_of_utterance>``;
turns stand on lines of their own, after the beginning of text::

    <s>User: What is in this picture?<image><end_of_utterance>
    Assistant: A cat.<end_of_utterance>
    User:<image>And in this one?<end_of_utterance>
    Assistant:

A system message is text of its own before the first turn. Base checkpoints, whose tokenizer has no
``<end_of_utterance>``, get the same without it.
"""

from idefics_common.prompts import END_OF_UTTERANCE_TOKEN, IMAGE_TOKEN
from idefics_common.tokenizer_checks import has_token

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
