"""The text that a run shows in the middle and at its end: what the model makes of the setting ``sample_prompt``.

texts: the prompt and its continuation        chats: the message, and the answer in the format of the chat template
"""

from typing import Any

from bigbatch.engine.engine import Engine
from bigbatch.lm.model.chat import ChatModel
from bigbatch.lm.model.generation import generate_text, prompt_tokens
from bigbatch.lm.training.chat_detection import trains_on_chats
from bigbatch.lm.training.evaluation import evaluating, seeded
from bigbatch.lm.training.setup import TrainingSetup

SAMPLE_TOKENS = 64


class TextSample:
    """Generates the text samples of a run.

    Args:
        setup: Of the run.

    Attributes:
        prompt: The start of a text, or the message.

    Raises:
        InputError: The prompt uses every position of the model.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self._setup, self._is_chat = setup, trains_on_chats(setup)
        self.prompt = setup.config.prompt(is_chat=self._is_chat)
        if self._is_chat:
            self._chat_model(setup.model).prompt_tokens(self._messages)
        else:
            prompt_tokens(setup.tokenizer, self.prompt, model=setup.model, name="--sample-prompt")

    @property
    def _messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}]

    def _chat_model(self, model: Any) -> ChatModel:
        return ChatModel(model, self._setup.tokenizer, name=self._setup.config.model)

    def generate(self, engine: Engine) -> str:
        """Return the prompt and what follows; the random state of training is not changed."""
        setup = self._setup
        with evaluating(setup, engine) as model, seeded(setup), setup.device_spec.autocast():
            if not self._is_chat:
                return generate_text(model, setup.tokenizer, self.prompt, max_new_tokens=SAMPLE_TOKENS)
            answer = self._chat_model(model).answer(self._messages, max_new_tokens=SAMPLE_TOKENS)
            return f"{self.prompt}\n{answer.text}"
