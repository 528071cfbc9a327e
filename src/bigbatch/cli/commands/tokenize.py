"""``bigbatch tokenize``: tokenize data ahead of training, whole or one part of it."""

import shlex

from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import TokenizeOptions
from bigbatch.cli.run_lookup import check_paths
from bigbatch.lm.config.train_config import TrainConfig


def run(config: TrainConfig, options: TokenizeOptions) -> int:
    """Write the tokens, and print their counts and the next command."""
    check_paths(config)
    console = make_console()
    with progress_display(console) as progress:
        from bigbatch.lm.training.tokenize import tokenize

        quiet_libraries()
        result = tokenize(config, options.out, part=options.shard, progress=progress)
    for note in result.notes:
        console.print(note)
    if result.missing:
        number, of = result.missing[0], options.shard[1]
        others = "the other" if len(result.missing) == 1 else f"the other {len(result.missing):,}"
        console.print(f"{others} of {of:,} parts: the same command with --shard {number}/{of}, and so on")
    else:
        flags = ["--model", config.model] if config.model_config_path is None else ["--model-config", config.model]
        flags += [] if config.tokenizer is None else ["--tokenizer", config.tokenizer]
        flags += [] if config.max_length is None else ["--max-length", str(config.max_length)]
        flags += [] if config.chat_template is None else ["--chat-template", config.chat_template]
        console.print(f"next: bigbatch train --data {shlex.quote(str(options.out))} {shlex.join(flags)}")
    return DONE
