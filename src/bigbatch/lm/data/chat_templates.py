"""The chat template of a run: that of the model, one by name, or one from a file.

--chat-template NAME | FILE → the template of the tokenizer, which is saved with the model
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bigbatch.errors import InputError, first_line, os_reason
from bigbatch.lm.data.conversations import has_marks
from bigbatch.lm.data.named_templates import NAMED_TEMPLATES, check_chat_template
from bigbatch.lm.data.tokenizer import AnyTokenizer


def set_chat_template(tokenizer: AnyTokenizer, choice: str | None) -> tuple[str, ...]:
    """Give a tokenizer the template of ``--chat-template``; return what the user must know about the two.

    Args:
        tokenizer: Of the model; unchanged if ``choice`` is None.
        choice: A name of `NAMED_TEMPLATES`, or the path of a file with a Jinja template; None for the model's own.

    Raises:
        InputError: ``choice`` is neither, the file is no template, or the tokenizer cannot encode its special tokens.
    """
    if choice is None:
        return ()
    named = NAMED_TEMPLATES.get(choice)
    if named is None:
        tokenizer.chat_template = _read_template(choice)
        return ()
    tokenizer.chat_template = named.template
    split = []
    for token in named.special_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            raise InputError(f"--chat-template {choice}: the tokenizer cannot encode {token}. Choose another template.")
        if len(ids) > 1:
            split.append(f"{token} ({len(ids)} tokens)")
    notes = []
    if split:
        notes.append(
            f"--chat-template {choice}: the tokenizer splits {', '.join(split)}, which a model of that format has as "
            "single tokens; train enough for the model to learn them"
        )
    if named.end is not None and named.end != tokenizer.eos_token:
        notes.append(
            f"--chat-template {choice} ends an answer with {named.end}, and generation stops at {tokenizer.eos_token}: "
            f'bigbatch generate --chat stops there, other programs need stop_strings=["{named.end}"]'
        )
    return tuple(notes)


def template_digest(tokenizer: AnyTokenizer) -> str | None:
    """Return the SHA-256, in hex, of the chat template of a tokenizer, or of its several ones; None without one."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_template(tokenizer: AnyTokenizer, choice: str | None) -> str:
    """Return in a few words which template is used, and how it shows what is trained on."""
    template = tokenizer.chat_template
    if not template:
        return "none"
    origin = "the model's own" if choice is None else choice
    texts = [template] if isinstance(template, str) else list(template.values())
    marks = "with" if all(map(has_marks, texts)) else "without"
    return f"{origin}, {marks} {{% generation %}} marks"


def _read_template(choice: str) -> str:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    check_chat_template(choice)
    path = Path(choice)
    if not path.is_file():
        raise InputError(f"--chat-template {choice} is not a regular file. Pass the file of a Jinja template.")
    try:
        template = path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"--chat-template {choice} cannot be read: {os_reason(error)}.") from None
    except UnicodeDecodeError:
        raise InputError(f"--chat-template {choice} is not UTF-8. Convert it to UTF-8.") from None
    if "messages" not in template:
        raise InputError(
            f"--chat-template {choice} does not use the variable messages. Pass the file of a Jinja template, such as "
            "chat_template.jinja of a model."
        )
    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise InputError(
            f"--chat-template {choice} is no Jinja template: {first_line(error)} in line {error.lineno}."
        ) from None
    except Exception:  # noqa: BLE001  of this conversation; those of the data are reported with their records
        return template
    return template
