"""``bigbatch generate``: generate text with the model of a run."""

from typing import Any

from bigbatch.cli.adapted_model import has_adapters, load_adapters, trained_folder
from bigbatch.cli.console import quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import GenerateOptions
from bigbatch.cli.output import visible
from bigbatch.errors import BigbatchError, InputError, first_line


def run(options: GenerateOptions) -> int:
    """Print the prompt and the generated text, streamed."""
    folder = trained_folder(options.run)
    if options.model is not None and not has_adapters(folder):
        raise InputError(f"--model does nothing here: {folder} is a whole model. Leave it out.")

    import torch

    from bigbatch.lm.data.tokenizer import load_tokenizer
    from bigbatch.lm.device import resolve_device
    from bigbatch.lm.model.adapters import base_of
    from bigbatch.lm.model.generation import generate_text
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
    model = model.to(device_spec.device).eval()
    torch.manual_seed(options.seed)
    try:
        generate_text(
            model,
            tokenizer,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            streamer=_streamer(tokenizer),
        )
    except InputError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # weights that are not finite, other settings
        raise BigbatchError(f"the model in {folder} cannot generate text: {first_line(error)}.") from error
    return DONE


def _streamer(tokenizer: Any) -> Any:
    """Return a streamer that prints text as it is generated, without control characters but newlines and tabs."""
    from transformers import TextStreamer

    class VisibleStreamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(visible(text, keep="\n\t"), flush=True, end="\n" if stream_end else "")

    return VisibleStreamer(tokenizer, skip_special_tokens=True)
