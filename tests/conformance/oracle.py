"""vine against transformers (float32): logits, greedy tokens, tokenization, chat templates.

  oracle.py VINE TOYS_DIRECTORY
"""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers

import toys
from report import Report

LOG_PROB_DELTA_MAX = 2e-3
PROMPT_TOKENS, GREEDY_TOKENS = 96, 32

NASTY = [
    "", " ", "  ", "\n", "\n\n\n", "\t\t x", " leading", "trailing ", "a  b   c    d", "Hello, world!",
    "I'll we've they're I'M DON'T", "12345678901234567890", "3.14159 1,000,000 0x1F", "naïve café ÅÄÖ",
    "e\u0301 combining a\u0308", "你好，世界。今天天气很好", "こんにちは世界 カタカナ", "한국어 텍스트", "مرحبا بالعالم", "שלום עולם",
    "नमस्ते दुनिया", "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈", "a🙂b🙂", "\u200b\u200d\ufeffzero", "\u00a0nbsp\u2003em", "ﬁ ligature ½ ²",
    "def f(x):\n    return x ** 2  # comment\n", "if (a&&b||!c) { x += 1; }", "{\"k\": [1, 2.5e-3, null]}",
    "<|im_start|>user\nhi<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>x", "<|im_start", "<s></s><unk><pad>",
    "[INST] hi [/INST]", "a" * 300, "ab " * 200, "\r\n\r\n mixed \r line", "!!!???...---", "https://example.org/a?b=c&d=%20#e",
    "x\u0000y\u0001z", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙", "\U0001F9D1\u200D\U0001F680", "A\u030A", "ÿþ", "\u2028\u2029sep", "   \n   \n", "end.\n\n  Next",
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
     {"role": "assistant", "content": "4"}, {"role": "user", "content": "  and 3+3? \n"}],
]


def main():
    vine, root = sys.argv[1:3]
    report = Report()
    for name, (folder, gguf_file) in toys.make(root).items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()
        # The class that does what tokenizer.json says; AutoTokenizer adds rules of its own to some families.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        ids = np.random.default_rng(7).integers(0, toys.VOCAB - 8, PROMPT_TOKENS).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
            greedy = model.generate(torch.tensor([ids]), max_new_tokens=GREEDY_TOKENS, min_new_tokens=GREEDY_TOKENS,
                                    do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()
        for spec in [folder, gguf_file]:
            label = f"{name} {'gguf' if spec == gguf_file else 'safetensors'}"
            report.check(f"{label}: logits", lambda: compare_logits(vine, spec, ids, logits))
            report.check(f"{label}: greedy", lambda: compare_greedy(vine, spec, ids, greedy))
            report.check(f"{label}: tokenizer", lambda: compare_tokens(vine, spec, tokenizer))
            report.check(f"{label}: template", lambda: compare_template(vine, spec, tokenizer))
    report.finish()


def compare_logits(vine, spec, ids, expected):
    with tempfile.NamedTemporaryFile() as out:
        run(vine, "debug", "logits", "--model", spec, "--tokens", ",".join(map(str, ids)), "--out", out.name,
            "--kv-dtype", "f32")
        got = np.fromfile(out.name, "<f4").reshape(len(ids), -1)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    delta = np.abs(log_softmax(got) - log_softmax(expected)).max()
    assert delta <= LOG_PROB_DELTA_MAX, f"max |delta log p| = {delta:.5f}"
    return f"max |delta log p| = {delta:.1e}"


def compare_greedy(vine, spec, ids, expected):
    out = run(vine, "run", "--model", spec, "--tokens", "--prompt", ",".join(map(str, ids)), "-n", str(GREEDY_TOKENS),
              "--greedy", "--ignore-eos", "--json", "--kv-dtype", "f32")
    got = json.loads(out)["tokens"]
    assert got == expected, f"{got}\n  expected {expected}"
    return f"{len(got)} tokens equal"


def compare_tokens(vine, spec, tokenizer):
    # Text of a user never becomes a special token: transformers calls that split_special_tokens.
    lines = "".join(json.dumps(text) + "\n" for text in NASTY)
    out = run(vine, "debug", "tokenize", "--model", spec, "--lines", "--json", stdin=lines)
    got = [json.loads(line)["tokens"] for line in out.splitlines()]
    assert len(got) == len(NASTY), f"{len(got)} answers to {len(NASTY)} texts"
    for text, tokens in zip(NASTY, got):
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokens == expected, f"{text!r}: {tokens}, expected {expected}"
        if tokens:
            back = run(vine, "debug", "detokenize", "--model", spec, "--tokens", ",".join(map(str, tokens)))
            expected = tokenizer.decode(tokens)
            assert back == expected, f"{text!r} came back as {back!r}, expected {expected!r}"
    return f"{len(NASTY)} texts equal"


def compare_template(vine, spec, tokenizer):
    for messages in CONVERSATIONS:
        out = run(vine, "debug", "template", "--model", spec, stdin=json.dumps(messages))
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert out == expected, f"{out!r}, expected {expected!r}"
    return f"{len(CONVERSATIONS)} conversations equal"


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def run(vine, *arguments, stdin=None):
    done = subprocess.run([vine, *arguments], input=stdin and stdin.encode(), capture_output=True, timeout=300,
                          env={**os.environ, "VINE_LOG": "error"})
    assert done.returncode == 0, f"vine {' '.join(arguments)[:200]}\n{done.stderr.decode()[-2000:]}"
    return done.stdout.decode()


if __name__ == "__main__":
    main()
