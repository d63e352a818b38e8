"""Asks the GGUF file itself: greedy answers from its dequantized tensors, held against a table.

`python check.py FILE TABLE.json` prints what failed and the share that passed; `python check.py FILE -p "hi"
[-p "next turn"]` shows one conversation. A table is a list of {"prompt": text or [texts of a conversation],
"contains": [substrings, any one of them], "min_words": n}.
"""

import argparse
import json
from collections import Counter

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from model import Decoder, Shape
from train import GGUF_NAMES, LLAMA3_SPLIT, SPECIAL, Encoder


def load(path: str):
    """(network in float32, encoder) from nothing but the GGUF file."""
    r = gguf.GGUFReader(path)
    one = lambda key: r.fields[key].contents()
    shape = Shape(vocab=one("llama.vocab_size"), hidden=one("llama.embedding_length"), layers=one("llama.block_count"),
                  heads=one("llama.attention.head_count"), kv_heads=one("llama.attention.head_count_kv"), inter=one("llama.feed_forward_length"),
                  context=one("llama.context_length"), rope_theta=one("llama.rope.freq_base"), eps=one("llama.attention.layer_norm_rms_epsilon"))
    tensors = {t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))) for t in r.tensors}
    net = Decoder(shape)
    with torch.no_grad():
        net.embed.weight.copy_(tensors["token_embd.weight"])
        net.norm.copy_(tensors["output_norm.weight"])
        for i, layer in enumerate(net.layers):
            layer.attn_norm.copy_(tensors[f"blk.{i}.attn_norm.weight"])
            layer.ffn_norm.copy_(tensors[f"blk.{i}.ffn_norm.weight"])
            for ours, theirs in GGUF_NAMES.items():
                w = tensors[f"blk.{i}.{theirs}.weight"]
                if ours in "qk":
                    heads = shape.heads if ours == "q" else shape.kv_heads
                    w = w.view(heads, shape.head_dim // 2, 2, shape.hidden).transpose(1, 2).reshape(w.shape)
                getattr(layer, ours).weight.copy_(w)
    words = one("tokenizer.ggml.tokens")
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(words) if t not in SPECIAL}, ignore_merges=True,
                               merges=[tuple(m.split(" ")) for m in one("tokenizer.ggml.merges")]))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return net.eval(), Encoder(tok)


@torch.no_grad()
def answer(net, enc, prompt, limit=400, temperature=0.0):
    """The answer to a prompt (ids), and whether it ended by itself."""
    past = [[] for _ in net.layers]
    ids, out = prompt, []
    while len(out) < limit and len(prompt) + len(out) < net.s.context:
        logits = net.embed.weight @ net.hidden(torch.tensor([ids]), past)[0, -1]
        new = int(torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax())
        if new == enc.eot:
            return enc.tok.decode(out), True
        out.append(new)
        ids = [new]
    return enc.tok.decode(out), False


def talk(net, enc, texts, temperature=0.0):
    """The answers to the turns of one conversation, and whether the last one ended by itself."""
    played, answers, ended = [], [], True
    for text in texts:
        played.append(("user", text))
        said, ended = answer(net, enc, enc.prompt(played), temperature=temperature)
        played.append(("assistant", said))
        answers.append(said)
    return answers, ended


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("table", nargs="?")
    p.add_argument("-p", "--prompt", action="append")
    p.add_argument("-t", "--temperature", type=float, default=0.0)
    p.add_argument("-v", "--verbose", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(1)  # one row at a time is too little work for two
    net, enc = load(a.file)
    if a.prompt:
        for text, said in zip(a.prompt, talk(net, enc, a.prompt, a.temperature)[0]):
            print(">", text, "\n" + said)
        return
    raise SystemExit(0 if hold(net, enc, json.load(open(a.table)), a.verbose) else 1)


def hold(net, enc, table, verbose: bool) -> bool:
    """Asks each row, prints what failed and the counts by kind; whether all passed."""
    passed, asked = Counter(), Counter()
    for row in table:
        turns = [row["prompt"]] if isinstance(row["prompt"], str) else row["prompt"]
        answers, ended = talk(net, enc, turns)
        good = ended and is_right(row, answers[-1])
        passed[kind(row)] += good
        asked[kind(row)] += 1
        if not good or verbose:
            print("pass" if good else "FAIL", row["prompt"], "->", answers[-1], "" if ended else "(did not end)", flush=True)
    for k in sorted(asked):
        print(f"{k}: {passed[k]} of {asked[k]}")
    print(f"all: {passed.total()} of {asked.total()}")
    return passed == asked


def is_right(row, text: str) -> bool:
    wanted = row["contains"]
    return (not wanted or any(s in text for s in wanted)) and len(text.split()) >= row.get("min_words", 0)


def kind(row) -> str:
    if "min_words" in row:
        return "stories"
    return "outside its range" if row["contains"] == ["very small model"] else "about Grapevine and itself"


if __name__ == "__main__":
    main()
