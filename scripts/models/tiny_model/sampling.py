"""Sample text from a model in training, so that the log shows what it can say."""

import torch
from tokenizers import Tokenizer

from scripts.models.tiny_model.chat_pairs import IM_END, IM_START
from scripts.models.tiny_model.network import TinyMoe
from scripts.models.tiny_model.tokenizer import END_OF_TEXT, token_id

PROMPTS = (
    "import os\nimport sys\n\ndef main():\n",
    "The for statement is used to",
    *(
        f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"
        for question in (
            "Hello",
            "What does textwrap.dedent do?",
            "Explain the if statement in Python.",
            "What is the module json?",
            "Write the function textwrap.indent.",
        )
    ),
)


def continue_text(
    model: TinyMoe, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float = 0.0
) -> str:
    """Continue `prompt` by up to `num_tokens`; greedy at temperature 0. Recomputes each step."""
    stop = {token_id(tokenizer, IM_END), token_id(tokenizer, END_OF_TEXT)}
    device = model.embedding.weight.device
    ids = list(tokenizer.encode(prompt).ids)
    first = len(ids)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        while len(ids) - first < num_tokens:
            window = ids[-model.shape.max_position_embeddings :]
            logits = model(torch.tensor([window], device=device))[0][0, -1].float()
            if temperature > 0:
                chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1).item())
            else:
                chosen = int(logits.argmax().item())
            if chosen in stop:
                break
            ids.append(chosen)
    model.train(was_training)
    return str(tokenizer.decode(ids[first:], skip_special_tokens=False))


def print_samples(model: TinyMoe, tokenizer: Tokenizer, num_tokens: int) -> None:
    """Print one continuation for each of the fixed prompts."""
    for prompt in PROMPTS:
        print(f"--- {prompt!r}\n{continue_text(model, tokenizer, prompt, num_tokens)}\n")
