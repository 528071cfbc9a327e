"""``bigbatch generate``: generate text with the model of a run, or chat with it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.cli.adapted_model import check_generates, has_adapters, load_adapters, trained_folder
from bigbatch.cli.console import quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import GenerateOptions
from bigbatch.cli.output import print_error, visible
from bigbatch.errors import BigbatchError, InputError, first_line

if TYPE_CHECKING:
    from bigbatch.lm.model.chat import ChatModel

MAX_NEW_TOKENS, MAX_NEW_TOKENS_CHAT = 120, 512


def run(options: GenerateOptions) -> int:
    """Print the prompt and the generated text, or the answer to a message, streamed."""
    folder = trained_folder(options.run)
    if options.model is not None and not has_adapters(folder):
        raise InputError(f"--model does nothing here: {folder} is a whole model. Leave it out.")
    if options.chat == "" and not sys.stdin.isatty():
        raise InputError('--chat needs a message, such as --chat "Hello"; a conversation needs a terminal.')

    check_generates(folder)

    import torch

    from bigbatch.lm.model.generation import generate_text

    model, tokenizer = _load(folder, options)
    torch.manual_seed(options.seed)
    if options.chat is not None:
        from bigbatch.lm.model.chat import ChatModel

        _chat(ChatModel(model, tokenizer, name=str(folder)), folder, options)
        return DONE
    with _generation_errors(folder):
        generate_text(
            model,
            tokenizer,
            options.prompt,
            max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
            temperature=options.temperature,
            top_k=options.top_k,
            streamer=_streamer(tokenizer),
        )
    return DONE


def _load(folder: Path, options: GenerateOptions) -> tuple[Any, Any]:
    """Load a model, with its adapters if it has any, and its tokenizer."""
    from bigbatch.lm.data.tokenizer import load_tokenizer
    from bigbatch.lm.device import resolve_device
    from bigbatch.lm.model.adapters import base_of
    from bigbatch.lm.model.pretrained import load_model

    quiet_libraries()
    device_spec = resolve_device(options.device, "float32")
    if has_adapters(folder):
        base = base_of(folder, options.model)
        tokenizer = load_tokenizer(str(folder) if any(folder.glob("tokenizer*")) else base)
        model = load_adapters(folder, base=base, dtype=device_spec.weights_dtype)
    else:
        tokenizer = load_tokenizer(str(folder))
        model = load_model(str(folder), dtype=device_spec.weights_dtype)
    return model.to(device_spec.device).eval(), tokenizer


def _chat(chat_model: "ChatModel", folder: Path, options: GenerateOptions) -> None:
    """Print the answer to the message, or to each line of a terminal."""
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    for message in [options.chat] if options.chat else _lines():
        messages.append({"role": "user", "content": message})
        max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS_CHAT
        with _generation_errors(folder):
            answer = chat_model.answer(
                messages,
                max_new_tokens=max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                on_text=lambda text: print(visible(text, keep="\n\t"), end="", flush=True),
            )
        print(flush=True)
        if not answer.is_complete:
            limit = f"--max-new-tokens {max_new_tokens}" if answer.num_tokens == max_new_tokens else "the last position"
            print_error("bigbatch generate", f"the answer is cut: it reached {limit}.")
        messages.append({"role": "assistant", "content": answer.text})


def _lines() -> Iterator[str]:
    """Yield the lines that are typed on a terminal, without empty ones, until Ctrl-D."""
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print(flush=True)
            return
        if line.strip():
            yield line.strip()


@contextmanager
def _generation_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except BigbatchError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # weights that are not finite, other settings
        raise BigbatchError(f"the model in {folder} cannot generate text: {first_line(error)}.") from error


def _streamer(tokenizer: Any) -> Any:
    """Return a streamer that prints text as it is generated, without control characters but newlines and tabs."""
    from transformers import TextStreamer

    class VisibleStreamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(visible(text, keep="\n\t"), flush=True, end="\n" if stream_end else "")

    return VisibleStreamer(tokenizer, skip_special_tokens=True)
