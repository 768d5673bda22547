"""Write a tiny Llama, pretrained for a moment on the standard library's sources, and instructions about its functions.

    python examples/llm/make_tiny_model.py DIR

DIR/model is a model and tokenizer as ``from_pretrained`` loads them; DIR/train.jsonl and DIR/test.jsonl hold questions
about functions that are in none of the other files. No download.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from recipe_tools.arguments import Parser, output_folder, whole  # noqa: E402
from recipe_tools.quiet import quiet  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

VOCABULARY = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MODULES = "argparse ast calendar configparser datetime difflib doctest inspect ipaddress mailbox optparse".split()
MODULES += "pathlib pdb pydoc shutil smtplib statistics string subprocess tarfile threading typing uuid zipfile".split()
LONGEST = 60
MOST_PARAMETERS = 5
LENGTH, ROWS, RATE = 64, 16, 3e-3


def signatures() -> list[tuple[str, int, bool, bool]]:
    """Functions of the standard library: ``name(parameters)``, how many, whether a method, whether with a default."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in (stdlib / f"{module}.py" for module in MODULES):
        for node in ast.walk(ast.parse(path.read_bytes())) if path.is_file() else ():
            if not isinstance(node, ast.FunctionDef):
                continue
            names = [argument.arg for argument in node.args.args]
            text = f"{node.name}({ast.unparse(node.args)})"
            simple = not (node.args.vararg or node.args.kwarg or node.args.kwonlyargs or node.args.posonlyargs)
            if simple and len(names) <= MOST_PARAMETERS and len(text) <= LONGEST:
                found[text] = (text, len(names), names[:1] == ["self"], bool(node.args.defaults))
    return sorted(found.values())


def questions(functions: list[tuple[str, int, bool, bool]]) -> Iterator[dict[str, str]]:
    """Three instructions for each function, with the answers that its signature gives."""
    for text, count, method, default in functions:
        for instruction, output in (
            ("How many parameters does this have?", str(count)),
            ("Is this a method or a function?", "method" if method else "function"),
            ("Does a parameter have a default?", "yes" if default else "no"),
        ):
            yield {"instruction": instruction, "input": text, "output": output}


def make_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs with single digits, learned from `text`; every byte has a token, so that any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [BOS, EOS, PAD]
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pretrain(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> float:
    """Train all weights to continue random pieces of `ids` (one long text); returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 1), pct_start=0.1)
    loss = torch.tensor(float("nan"))
    model.train()
    for _ in tqdm(range(steps), desc="pretrain", unit="step"):
        starts = torch.randint(len(ids) - LENGTH, (ROWS,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="created if missing")
    parser.add_argument("--steps", type=whole(0, 10**6), default=400, help="of pretraining (default %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    options = parser.parse_args(arguments)
    output_folder(parser, options.folder, "DIR")

    quiet()
    draw = random.Random(options.seed)
    functions = signatures()
    draw.shuffle(functions)
    held_out, tuned, read = functions[:60], functions[60:360], functions[360:]
    if len(read) < len(tuned):
        parser.error(f"{len(functions)} functions found: are the standard library's source files installed?")
    for name, part in (("train", tuned), ("test", held_out)):
        lines = [json.dumps(record) for record in questions(part)]
        draw.shuffle(lines)
        (options.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    torch.manual_seed(options.seed)
    # What instructions look like is left to fine-tuning: pretraining sees definitions only.
    text = "".join(f"def {signature}: {count}{EOS}" for signature, count, *_ in read)
    tokenizer = make_tokenizer([text, *(record["instruction"] for record in questions(tuned[:1]))])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    loss = pretrain(model, ids, options.steps)
    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")
    print(
        f"{options.folder}: model ({model.num_parameters():,} parameters, loss {loss:.2f} on {len(ids):,} tokens), "
        f"train.jsonl ({3 * len(tuned)} instructions), test.jsonl ({3 * len(held_out)})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
