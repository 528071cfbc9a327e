"""``bigbatch merge``: write a whole model from the LoRA adapters of a run and the model that they were trained on."""

import shlex
from pathlib import Path

from bigbatch.cli.adapted_model import has_adapters, load_adapters, trained_folder
from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import MergeOptions
from bigbatch.errors import BigbatchError, InputError, os_reason
from bigbatch.lm.runs.directory import check_free
from bigbatch.lm.runs.file_names import ADAPTER, MODEL


def run(options: MergeOptions) -> int:
    """Merge adapters into their model, save it, and print where it is."""
    folder = _adapter_folder(options.run)
    check_free(options.out)
    if options.out.absolute() in (options.run.absolute() / name for name in (MODEL, ADAPTER)):
        raise InputError(f"--out {options.out} is replaced when the run is resumed: name another folder.")
    console = make_console()
    with progress_display(console) as progress:
        from bigbatch.lm.data.tokenizer import load_tokenizer
        from bigbatch.lm.model.adapters import base_of, merge_adapters, objective_of
        from bigbatch.lm.model.task_models import AUTO_CLASSES

        quiet_libraries()
        base = base_of(folder, options.model)
        tokenizer = load_tokenizer(str(folder) if any(folder.glob("tokenizer*")) else base)
        progress(f"loading {base}")
        adapted = load_adapters(folder, base=base, dtype="auto")
        progress("merging")
        objective = objective_of(folder)
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            if objective == "reward":
                adapted.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            merge_adapters(adapted, tokenizer, options.out, source=folder)
        except OSError as error:
            raise BigbatchError(f"{options.out} cannot be written: {os_reason(error)}.") from error
    console.print_unbroken(
        f"{options.out} is {base} with the adapters in {folder}, for {AUTO_CLASSES[objective]}.from_pretrained",
        *([f"next: bigbatch generate {shlex.quote(str(options.out))}"] if objective == "sft" else []),
    )
    return DONE


def _adapter_folder(run: Path) -> Path:
    folder = trained_folder(run)
    if not has_adapters(folder):
        raise InputError(f"{run} has no adapters to merge: {folder} is a whole model.")
    return folder
