"""Whether a run trains on chats: on answers in the format of its chat template."""

from typing import TYPE_CHECKING

from bigbatch.lm.data.pair_batches import sequences_of

if TYPE_CHECKING:
    from bigbatch.lm.training.setup import TrainingSetup

_PROBE = "zq7question"  # content that no template has in it
_SAMPLES = 8  # of the data, in which an answer is looked for


def trains_on_chats(setup: "TrainingSetup") -> bool:
    """Return whether one of the first samples has an answer in the format of the chat template."""
    tokenizer = setup.tokenizer
    if not tokenizer.chat_template:
        return False
    try:
        question = [{"role": "user", "content": _PROBE}]
        text = str(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    except Exception:  # noqa: BLE001  a template is a program, and this is for a suggestion only
        return False
    header = _without_spaces(text.partition(_PROBE)[2])
    samples = [row for i in range(min(_SAMPLES, len(setup.training))) for row in sequences_of(setup.training[i])]
    return bool(header) and any(header in _without_spaces(str(tokenizer.decode(tokens))) for tokens in samples)


def _without_spaces(text: str) -> str:
    return "".join(text.split())
