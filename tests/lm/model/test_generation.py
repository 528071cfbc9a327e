"""What follows a prompt: the word after a space brings the space with it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bigbatch.lm.model.generation import generate_text
from support.language_models import save_model_folder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", ["def ", "für ", "def return ", "def  ", "def", "日本語 "])
def test_text_starts_with_prompt_without_last_space(tmp_path: Path, prompt: str, temperature: float) -> None:
    folder = save_model_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    seen: list[list[int]] = []

    class Streamer:
        def put(self, tokens: torch.Tensor) -> None:
            seen.append(tokens.flatten().tolist())

        def end(self) -> None:
            pass

    text = generate_text(
        model, tokenizer, prompt, max_new_tokens=5, temperature=temperature, top_k=0, streamer=Streamer()
    )
    assert text.startswith(prompt)
    taken = tokenizer.decode(seen[0], skip_special_tokens=True)
    if prompt.endswith(" ") and not prompt.endswith("  "):
        assert taken == prompt[:-1]
        assert tokenizer.convert_ids_to_tokens(seen[1])[0].startswith("Ġ")
    else:
        assert taken == prompt
