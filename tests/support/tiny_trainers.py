"""Trainers of tiny random models, and their samples, for the tests of the integration with transformers."""

import random
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 40
IGNORED = -100


def gpt2(dropout: float = 0.0, **settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=1, **settings,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def llama_classifier() -> LlamaForSequenceClassification:
    config = llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).double()


def qwen2_moe(aux_loss: bool = True) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_experts=4, num_experts_per_tok=2, output_router_logits=aux_loss, router_aux_loss_coef=0.001,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config)  # its grouped matrix product does not support float64


def _bert_config(dropout: float, **settings: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **settings,
    )  # fmt: skip


def bert_classifier(dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(_bert_config(dropout, num_labels=3)).double()


def bert_masked_lm(dropout: float = 0.0) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(_bert_config(dropout)).double()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).double()


class Regression(nn.Module):
    """A plain module whose loss is the mean squared error."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)).double()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        prediction = self.layers(x).squeeze(-1)
        return {"loss": nn.functional.mse_loss(prediction, labels), "logits": prediction}


def regression_samples(count: int = 22) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(5, generator=generator, dtype=torch.float64), "labels": float(index) / 7}
        for index in range(count)
    ]


def collate_regression(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "x": torch.stack([sample["x"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples], dtype=torch.float64),
    }


def token_samples(
    count: int = 22, *, prompt: int = 0, low: int = 3, high: int = 14, seed: int = 0
) -> list[dict[str, Any]]:
    """Samples of different lengths; the labels of the first `prompt` tokens are ignored."""
    numbers = random.Random(seed)
    samples = []
    for _ in range(count):
        ids = [numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(low, high) + prompt)]
        samples.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return samples


def classification_samples(count: int = 22, seed: int = 0) -> list[dict[str, Any]]:
    numbers = random.Random(seed)
    return [
        {"input_ids": [numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(3, 14))], "labels": index % 3}
        for index in range(count)
    ]


def translation_samples(count: int = 22, seed: int = 0) -> list[dict[str, Any]]:
    numbers = random.Random(seed)

    def ids() -> list[int]:
        return [numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(3, 12))]

    return [{"input_ids": ids(), "labels": ids()} for _ in range(count)]


def collate_tokens(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad tokens and labels on the right."""

    def pad(key: str, value: int) -> torch.Tensor:
        rows = [torch.tensor(sample[key]) for sample in samples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    batch = {"input_ids": pad("input_ids", 0)}
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    if "labels" in samples[0]:
        scalar = isinstance(samples[0]["labels"], int)
        batch["labels"] = torch.tensor([s["labels"] for s in samples]) if scalar else pad("labels", IGNORED)
    return batch


def arguments(**settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.0, "remove_unused_columns": False, "dataloader_pin_memory": False, "seed": 7,
    }  # fmt: skip
    return TrainingArguments(**(defaults | settings))


class TokenMeanTrainer(Trainer):
    """Overrides `compute_loss` by the mean over shifted labels, without a look at num_items_in_batch."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return (loss, outputs) if return_outputs else loss


def trainer_of(
    model: nn.Module, samples: list[Any], collate: Any = collate_tokens, cls: type[Trainer] = Trainer, **settings: Any
) -> Trainer:
    extra = {key: settings.pop(key) for key in ("compute_loss_func",) if key in settings}
    return cls(model=model, args=arguments(**settings), train_dataset=samples, data_collator=collate, **extra)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[MASK]": 3} | {f"w{i}": i + 4 for i in range(VOCABULARY - 4)}
    backend = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", mask_token="[MASK]"
    )
