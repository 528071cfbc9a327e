r"""Chat templates by name, in the formats of well-known families of models, with ``{% generation %}`` marks.

Each marks the content of an answer and its end mark. The instructions about tools are in our words; what the formats
define, such as special tokens, roles and the form of calls and results, is theirs.

    chatml     <|im_start|>role\n...<|im_end|>; calls and results of tools as Hermes writes them
    llama-3    <|start_header_id|>role<|end_header_id|>\n\n...<|eot_id|>; one call of a tool in a message, as Llama 3.1
    qwen3      chatml with reasoning in <think>, only in the answers to the last question
    gemma      <start_of_turn>user or model; a system message begins the first question; no tools
    mistral    [INST] ...[/INST], with tools before the last question; a system message begins the first question
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from bigbatch.errors import InputError

# White space: a tag that begins with "-" removes what is before it, and transformers removes a line break after a tag.

_CALLS = """\
{%- macro calls(message) %}
    {%- for call in message.tool_calls %}
        {{- '' if loop.first and not message.content else '\\n' }}
        {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
        {{- '\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""

_TOOLS = """\
{%- macro tool_list() %}
    {{- '# Tools\\n\\nThese functions can be called, one JSON schema on each line:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '</tools>\\n\\nWrite each call as a JSON object in tags:\\n<tool_call>\\n' }}
    {{- '{"name": <name of the function>, "arguments": <object with its arguments>}\\n</tool_call>' }}
{%- endmacro %}
"""

_TURNS = """\
{%- set has_system = messages[0].role == 'system' %}
{%- set turns = messages[1:] if has_system else messages %}
"""

_SYSTEM = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0].content + '\\n\\n' if has_system else '' }}
    {{- tool_list() + '<|im_end|>\\n' }}
{%- elif has_system %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
"""

CHATML = (
    _CALLS
    + _TOOLS
    + _TURNS
    + _SYSTEM
    + """\
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content + calls(message) + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)

QWEN3 = (
    _CALLS
    + _TOOLS
    + _TURNS
    + _SYSTEM
    + """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- set text = message.content %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not thought and '</think>' in text %}
            {%- set thought = text.split('</think>')[0].split('<think>')[-1] %}
            {%- set text = text.split('</think>')[-1] %}
        {%- endif %}
        {%- set thought = thought.strip('\\n') %}
        {%- set text = text.lstrip('\\n') %}
        {%- generation %}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text + calls({'content': text, 'tool_calls': message.tool_calls or []}) + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|im_start|>user' }}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|im_end|>\\n' }}
    {%- elif not (loop.first and has_system) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false else '' }}
{%- endif %}
"""
)

LLAMA_3 = (
    _TURNS
    + """\
{%- macro header(role) %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- endmacro %}
{{- bos_token }}
{%- if tools %}
    {{- header('system') + 'Environment: ipython\\n\\n' }}
    {{- messages[0].content | trim + '\\n\\n' if has_system else '' }}
    {{- 'These functions can be called. Write a call as {"name": <name>, "parameters": <object with arguments>}.' }}
    {%- for tool in tools %}
        {{- '\\n\\n' + tool | tojson(indent=4) }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- elif has_system %}
    {{- header('system') + messages[0].content | trim + '<|eot_id|>' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {{- header('assistant') }}
        {%- if message.tool_calls and (message.tool_calls | length > 1 or message.content | trim) %}
            {{- raise_exception('a Llama 3 message is either text or one call of a tool') }}
        {%- endif %}
        {%- generation %}
        {%- if message.tool_calls %}
            {%- set call = message.tool_calls[0].function %}
            {{- {'name': call.name, 'parameters': call.arguments} | tojson }}
        {%- endif %}
        {{- message.content | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- header('ipython' if message.role == 'tool' else message.role) + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""
)

GEMMA = (
    "{{- bos_token }}"
    + _TURNS
    + """\
{%- if tools %}
    {{- raise_exception('the gemma format has no tools') }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role not in ('user', 'assistant') or message.tool_calls %}
        {{- raise_exception('the gemma format has only user, assistant and one system message first, and no tools') }}
    {%- elif (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('in the gemma format, user and assistant take turns, and the user begins') }}
    {%- elif message.role == 'assistant' %}
        {{- '<start_of_turn>model\\n' }}
        {%- generation %}
        {{- message.content | trim + '<end_of_turn>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<start_of_turn>user\\n' + (messages[0].content | trim + '\\n\\n' if loop.first and has_system else '') }}
        {{- message.content | trim + '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
)

MISTRAL = (
    "{{- bos_token }}"
    + _TURNS
    + """\
{%- set last = namespace(question=-1, role='assistant') %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if last.role != 'assistant' %}
            {{- raise_exception('in the mistral format, user and assistant take turns, and the user begins') }}
        {%- endif %}
        {%- if tools and loop.index0 == last.question %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (messages[0].content + '\\n\\n' if loop.first and has_system else '') }}
        {{- message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {%- set id = {'call_id': message.tool_call_id} if message.tool_call_id else {} %}
        {{- '[TOOL_RESULTS] ' + dict({'content': message.content}, **id) | tojson + '[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {%- if loop.first or last.role == 'assistant' %}
            {{- raise_exception('in the mistral format, user and assistant take turns, and the user begins') }}
        {%- elif message.tool_calls and message.content %}
            {{- raise_exception('a message in the mistral format is either text or calls of tools') }}
        {%- endif %}
        {%- set list = namespace(calls=[]) %}
        {%- for call in message.tool_calls %}
            {%- set id = {'id': call.id} if call.id else {} %}
            {%- set one = dict({'name': call.function.name, 'arguments': call.function.arguments}, **id) %}
            {%- set list.calls = list.calls + [one] %}
        {%- endfor %}
        {%- generation %}
        {{- '[TOOL_CALLS] ' + list.calls | tojson if list.calls else ' ' + message.content }}
        {{- eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('the mistral format has only user, assistant, tool and one system message first') }}
    {%- endif %}
    {%- set last.role = message.role %}
{%- endfor %}
"""
)


class NamedTemplate(NamedTuple):
    """A template, the special tokens that its format has, and the one that ends an answer (None: the end token)."""

    template: str
    special_tokens: tuple[str, ...]
    end: str | None


NAMED_TEMPLATES = {
    "chatml": NamedTemplate(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama-3": NamedTemplate(LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "qwen3": NamedTemplate(QWEN3, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), "<|im_end|>"),
    "gemma": NamedTemplate(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": NamedTemplate(MISTRAL, ("[INST]", "[/INST]"), None),
}


def check_chat_template(choice: str) -> None:
    """Check that a template exists, without loading a library.

    Raises:
        InputError: It is neither a name nor a file.
    """
    if choice not in NAMED_TEMPLATES and not Path(choice).exists():
        near = difflib.get_close_matches(choice.lower().replace("_", "-"), NAMED_TEMPLATES, n=1, cutoff=0.5)
        names = ", ".join(NAMED_TEMPLATES)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise InputError(f"--chat-template {choice!r} is no file and no name. {hint}The names are {names}.")
