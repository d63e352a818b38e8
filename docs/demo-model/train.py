"""Trains the built-in model from nothing and writes it as GGUF: `python train.py`.

Owns the tokenizer, the training loop and the file. One run takes under an hour on two cores. It can be
stopped at any time; `--resume` goes on from the last checkpoint with the same data in the same order.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import sys
import time

# Threads that wait must not spin: on a machine that does other work too, spinning doubles the cost.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import corpus
from model import Decoder, Shape

SEED = 8420
NAME = "Grapevine demo"
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
            "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")


# ---------------------------------------------------------------- text to tokens
def train_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE as Llama 3 cuts text; the special tokens follow the plain ones."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    text = (t for i in range(8_000) for pair in corpus.conversation(-1 - i, SEED)[1] for t in (*pair, "system user assistant"))
    tok.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL), show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    assert tok.get_vocab_size() == vocab, tok.get_vocab_size()
    return tok


class Encoder:
    """Conversations as token ids, with the weight of each token that the model must learn to say (0: none)."""

    def __init__(self, tok: Tokenizer):
        self.tok = tok
        self.bos, self.eos, self.head, self.head_end, self.eot = (tok.token_to_id(s) for s in SPECIAL)
        self.role = {r: [self.head, *self.plain(r), self.head_end, *self.plain("\n\n")] for r in ("system", "user", "assistant")}

    def plain(self, text: str):
        return self.tok.encode(text, add_special_tokens=False).ids

    def prompt(self, messages):
        """Messages [(role, text)] as the ids that come before the answer."""
        ids = [self.bos]
        for role, text in messages:
            ids += self.role[role] + self.plain(text.strip()) + [self.eot]
        return ids + self.role["assistant"]

    def conversation(self, system, turns, limit: int):
        """The first words of an answer decide which one it is, and weigh more than what follows from them."""
        ids, weight = [self.bos], [0.0]
        def add(role, text, said):
            body = self.plain(text.strip()) + [self.eot]
            ids.extend(self.role[role] + body)
            weight.extend([0.0] * len(self.role[role]))
            weight.extend((1.0 if i < OPENING_TOKENS else LATER) if said else 0.0 for i in range(len(body)))
        if system:
            add("system", system, False)
        for user, assistant in turns:
            add("user", user, False)
            add("assistant", assistant, True)
        return ids[:limit], weight[:limit]


def batches(enc: Encoder, shape: Shape, tokens: int, first: int):
    """Endless micro-batches (ids, targets, weights), alike in length within one.

    Each chunk mixes `WHOLE` conversations with `OPENINGS` questions of which only the first words of the answer
    are learned. Both are taken in order of their numbers, from micro-batch number `first` on.
    """
    number = 0
    for chunk in itertools.count():
        rows = [enc.conversation(*corpus.conversation(chunk * WHOLE + i, SEED), shape.context) for i in range(WHOLE)]
        rows += [cut_opening(*enc.conversation(*corpus.opening(chunk * OPENINGS + i, SEED), shape.context)) for i in range(OPENINGS)]
        rows.sort(key=lambda r: len(r[0]))
        cut, group = [], []
        for row in rows:
            if group and len(row[0]) * (len(group) + 1) > tokens:
                cut.append(group)
                group = []
            group.append(row)
        cut.append(group)
        random.Random(SEED + chunk).shuffle(cut)
        for group in cut:
            number += 1
            if number <= first:
                continue
            yield padded(group, enc.eos)


def padded(group, fill):
    width = max(len(ids) for ids, _ in group)
    x, y = torch.full((len(group), width), fill), torch.full((len(group), width), fill)
    weights = torch.zeros(len(group), width)
    for r, (ids, weight) in enumerate(group):
        x[r, : len(ids)] = torch.tensor(ids)
        y[r, : len(ids) - 1] = torch.tensor(ids[1:])
        weights[r, : len(ids) - 1] = torch.tensor(weight[1:])
    return x, y, weights


def cut_opening(ids, weight):
    """Of the last answer the first tokens; what was said before it is not learned again."""
    begin = len(weight) - weight[::-1].index(0.0)
    end = begin + OPENING_TOKENS
    return ids[:end], [0.0] * begin + weight[begin:end]


WHOLE, OPENINGS = 240, 1760
OPENING_TOKENS, LATER = 8, 0.3


# ---------------------------------------------------------------- training
class Muon:
    """Momentum orthogonalised by Newton-Schulz (Jordan et al., 2024) for the matrices of the layers.

    Matrices of one shape are stacked and treated at once.
    """

    def __init__(self, params, momentum=0.95, decay=0.05):
        self.groups, self.momentum, self.decay = {}, momentum, decay
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.state = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr):
        for shape, group in self.groups.items():
            grad, m = torch.stack([p.grad for p in group]), self.state[shape]
            m.lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp(m, self.momentum)) * max(1, shape[0] / shape[1]) ** 0.5
            for p, u in zip(group, update):
                p.mul_(1 - lr * self.decay).add_(u, alpha=-lr)


def orthogonal(g):
    flip = g.shape[1] > g.shape[2]
    x = g.mT if flip else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if flip else x


def rate(step: int, done: float) -> float:
    """Share of the full learning rate: a short rise, a plateau, then a straight line to nothing."""
    return min(1, (step + 1) / 40, (1 - done) / 0.6)


class Trainer:
    """Network, optimizers and the number of the next step; all of it is in a checkpoint."""

    def __init__(self, a, shape: Shape):
        torch.manual_seed(SEED)
        self.a, self.net, self.step = a, Decoder(shape), 0
        self.muon = Muon([p for n, p in self.net.named_parameters() if p.ndim == 2 and "embed" not in n])
        others = [self.net.embed.weight, *(p for p in self.net.parameters() if p.ndim == 1)]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)

    def learn(self, parts) -> float:
        """One step over the micro-batches; gives the weighted mean of the loss."""
        total, loss_sum = sum(weights.sum() for _, _, weights in parts), 0.0
        for x, y, weights in parts:
            learn = weights.view(-1) > 0
            logits = F.linear(self.net.hidden(x).flatten(0, 1)[learn], self.net.embed.weight)
            loss = F.cross_entropy(logits, y.view(-1)[learn], reduction="none") @ weights.view(-1)[learn] / total
            loss.backward()
            loss_sum += loss.item()
        now = self.a.lr * rate(self.step, self.step / self.a.steps)
        self.adam.param_groups[0]["lr"] = now / 5
        self.adam.step()
        self.muon.step(now)
        self.net.zero_grad(set_to_none=True)
        self.step += 1
        return loss_sum

    def save(self, path: str):
        state = dict(net=self.net.state_dict(), adam=self.adam.state_dict(), muon=self.muon.state, step=self.step)
        torch.save(state, path + ".new")
        os.replace(path + ".new", path)

    def resume(self, path: str):
        c = torch.load(path)
        self.net.load_state_dict(c["net"])
        self.adam.load_state_dict(c["adam"])
        self.muon.state, self.step = c["muon"], c["step"]


def train(a, enc: Encoder, shape: Shape):
    t, checkpoint = Trainer(a, shape), os.path.join(a.out, "checkpoint.pt")
    if a.resume and os.path.exists(checkpoint):
        t.resume(checkpoint)
    print(f"{sum(p.numel() for p in t.net.parameters()):,} parameters, from step {t.step}", flush=True)
    source = batches(enc, shape, a.tokens // PARTS, t.step * PARTS)
    t.net.train()
    began, seen, said = time.time(), 0, []
    while t.step < a.steps:
        parts = [next(source) for _ in range(PARTS)]
        seen += sum(part[0].numel() for part in parts)
        said.append(t.learn(parts))
        if t.step % 20 == 0:
            spent = time.time() - began
            print(f"step {t.step}/{a.steps} loss {sum(said) / len(said):.4f} {seen / spent:.0f} tokens/s {spent:.0f} s, "
                  f"processor {time.process_time():.0f} s", flush=True)
            said = []
        if t.step % a.save == 0 or t.step == a.steps:
            t.save(checkpoint)
            write_gguf(os.path.join(a.out, "demo.gguf"), t.net, enc.tok)
    print(f"{seen:,} tokens in {time.time() - began:.0f} s, {t.step} steps", flush=True)


PARTS = 2  # micro-batches of one step: each holds texts of one length, so one alone would be one-sided


# ---------------------------------------------------------------- the file
GGUF_NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


def gguf_tensors(net: Decoder):
    """(name, array) as GGUF names them; rows of q and k in the order of interleaved rotary pairs."""
    s = net.s
    yield "token_embd.weight", net.embed.weight
    yield "output_norm.weight", net.norm
    for i, layer in enumerate(net.layers):
        yield f"blk.{i}.attn_norm.weight", layer.attn_norm
        yield f"blk.{i}.ffn_norm.weight", layer.ffn_norm
        for ours, theirs in GGUF_NAMES.items():
            w = getattr(layer, ours).weight
            if ours in "qk":
                heads = s.heads if ours == "q" else s.kv_heads
                w = w.view(heads, 2, s.head_dim // 2, s.hidden).transpose(1, 2).reshape(w.shape)
            yield f"blk.{i}.{theirs}.weight", w


def write_gguf(path: str, net: Decoder, tok: Tokenizer):
    """Writes matrices as Q8_0 and norms as F32, with the tokenizer and the chat template."""
    import gguf
    s, w = net.s, gguf.GGUFWriter(path, "llama")
    w.add_name(NAME)
    w.add_license("apache-2.0")
    w.add_description("A very small chat model that knows Grapevine and short stories; trained by docs/demo-model/train.py.")
    w.add_block_count(s.layers); w.add_context_length(s.context); w.add_embedding_length(s.hidden)
    w.add_feed_forward_length(s.inter); w.add_head_count(s.heads); w.add_head_count_kv(s.kv_heads)
    w.add_layer_norm_rms_eps(s.eps); w.add_rope_freq_base(s.rope_theta); w.add_rope_dimension_count(s.head_dim)
    w.add_key_length(s.head_dim); w.add_value_length(s.head_dim); w.add_vocab_size(s.vocab)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0); w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    merges = json.loads(tok.to_str())["model"]["merges"]
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("llama-bpe")
    w.add_token_list([tok.id_to_token(i) for i in range(s.vocab)])
    w.add_token_types([gguf.TokenType.CONTROL if tok.id_to_token(i) in SPECIAL else gguf.TokenType.NORMAL for i in range(s.vocab)])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    ids = {n: tok.token_to_id(n) for n in SPECIAL}
    w.add_bos_token_id(ids["<|begin_of_text|>"]); w.add_eos_token_id(ids["<|eot_id|>"]); w.add_eot_token_id(ids["<|eot_id|>"])
    w.add_pad_token_id(ids["<|end_of_text|>"]); w.add_add_bos_token(True); w.add_chat_template(TEMPLATE)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, value in gguf_tensors(net):
        value = np.ascontiguousarray(value.detach().float().numpy())
        if value.ndim == 1:
            w.add_tensor(name, value)
        else:
            w.add_tensor(name, gguf.quants.quantize(value, q8), raw_dtype=q8)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="build", help="folder for checkpoint, tokenizer.json and demo.gguf")
    p.add_argument("--steps", type=int, default=1400)
    p.add_argument("--tokens", type=int, default=4096, help="tokens of one step, padding included")
    p.add_argument("--lr", type=float, default=0.02, help="rate of the matrices; embeddings and norms take a fifth")
    p.add_argument("--save", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with the same data in the same order")
    a = p.parse_args()
    os.makedirs(a.out, exist_ok=True)
    keep_memory()
    torch.set_num_threads(a.threads)
    shape, path = Shape(), os.path.join(a.out, "tokenizer.json")
    if a.resume and os.path.exists(path):
        tok = Tokenizer.from_file(path)
    else:
        tok = train_tokenizer(shape.vocab)
        tok.save(path)
    train(a, Encoder(tok), shape)


def keep_memory():
    """Lets glibc keep what a step frees: to ask the kernel for it anew in each step costs a tenth of the time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    main()
