"""Asks the GGUF file itself: greedy answers from its dequantized tensors, held against a table.

`python check.py FILE TABLE.json` prints what failed and the share that passed; `python check.py FILE -p "hi"
[-p "next turn"]` shows one conversation. A table is a list of {"prompt": text or [texts of a conversation],
"contains": [substrings, any one of them], "min_words": n}.
"""

import argparse
import json

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
def answer(net, enc, prompts, limit=300, temperature=0.0, generator=None):
    """Texts for prompts (lists of ids), and whether each ended by itself. Prompts run as one batch."""
    width = max(map(len, prompts)) + limit
    ids = torch.full((len(prompts), width), enc.eos)
    length = torch.tensor([len(p) for p in prompts])
    for row, p in enumerate(prompts):
        ids[row, : len(p)] = torch.tensor(p)
    live = torch.arange(len(prompts))
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(limit):
        h = net.hidden(ids[live, : int(length[live].max())])
        logits = h[torch.arange(len(live)), length[live] - 1] @ net.embed.weight.T
        if temperature:
            new = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
        else:
            new = logits.argmax(-1)
        ids[live, length[live]] = new
        length[live] += 1
        ended[live[new == enc.eot]] = True
        live = live[new != enc.eot]
        if not len(live):
            break
    texts = [enc.tok.decode(ids[r, len(p) : length[r]].tolist(), skip_special_tokens=True) for r, p in enumerate(prompts)]
    return texts, ended.tolist()


def talk(net, enc, conversations, **how):
    """Answers to the last turn of each conversation (lists of user texts), the earlier ones played out."""
    played = [[] for _ in conversations]
    texts, ended = [""] * len(conversations), [False] * len(conversations)
    for turn in range(max(map(len, conversations))):
        rows = [i for i, c in enumerate(conversations) if turn < len(c)]
        for i in rows:
            played[i].append(("user", conversations[i][turn]))
        for at in range(0, len(rows), 64):
            some = rows[at : at + 64]
            out, end = answer(net, enc, [enc.prompt(played[i]) for i in some], **how)
            for i, text, e in zip(some, out, end):
                played[i].append(("assistant", text))
                texts[i], ended[i] = text, e
    return texts, ended


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("table", nargs="?")
    p.add_argument("-p", "--prompt", action="append")
    p.add_argument("-t", "--temperature", type=float, default=0.0)
    p.add_argument("-v", "--verbose", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(2)
    net, enc = load(a.file)
    if a.prompt:
        for n in range(len(a.prompt)):
            texts, _ = talk(net, enc, [a.prompt[: n + 1]], temperature=a.temperature)
            print(">", a.prompt[n], "\n" + texts[0])
        return
    table = json.load(open(a.table))
    rows = sorted(table, key=lambda r: r.get("min_words", 0))
    texts, ended = talk(net, enc, [[r["prompt"]] if isinstance(r["prompt"], str) else r["prompt"] for r in rows])
    passed = 0
    for row, text, end in zip(rows, texts, ended):
        good = end and (not row["contains"] or any(s in text for s in row["contains"])) and len(text.split()) >= row.get("min_words", 0)
        passed += good
        if not good or a.verbose:
            print("pass" if good else "FAIL", row["prompt"], "->", text, "" if end else "(did not end)")
    print(f"{passed} of {len(table)} passed")
    raise SystemExit(0 if passed == len(table) else 1)


if __name__ == "__main__":
    main()
