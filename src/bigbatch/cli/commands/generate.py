"""``bigbatch generate``: generate text with the model of a run."""

from pathlib import Path
from typing import Any

from bigbatch.cli.console import quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import GenerateOptions
from bigbatch.cli.output import visible
from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import BigbatchError, InputError, first_line
from bigbatch.lm.runs.file_names import MODEL


def run(options: GenerateOptions) -> int:
    """Print the prompt and the generated text, streamed."""
    folder = _model_folder(options.run)

    import torch

    from bigbatch.lm.data.tokenizer import load_tokenizer
    from bigbatch.lm.device import resolve_device
    from bigbatch.lm.model.generation import generate_text
    from bigbatch.lm.model.pretrained import load_model

    quiet_libraries()
    device_spec = resolve_device(options.device, "float32")
    tokenizer = load_tokenizer(str(folder))
    model = load_model(str(folder), dtype=device_spec.weights_dtype).to(device_spec.device).eval()
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


def _model_folder(run: Path) -> Path:
    """Return the model directory of a run; ``run`` may also be a model directory itself."""
    for folder in (run / MODEL, run):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            _check_files(folder)
            return folder
    check_run(run)
    raise InputError(f"{run} contains no trained model: a run saves it in {run / MODEL} when it ends.")


def _check_files(folder: Path) -> None:
    """Raise if opening a file of a model would block."""
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is not a regular file: remove it.")
