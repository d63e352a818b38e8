"""The built-in model's network: a small Llama decoder in plain torch, trained from nothing.

Shapes follow the Llama convention (RMSNorm, rotary positions in the half-split layout, grouped-query
attention, SwiGLU, tied embeddings), so that the weights can be written to GGUF and to a Hugging Face
directory without any change but the row order that GGUF's `llama` architecture expects.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    vocab: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    inter: int = 512
    context: int = 1024
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        kv = s.kv_heads * s.head_dim
        self.attn_norm = nn.Parameter(torch.ones(s.hidden))
        self.ffn_norm = nn.Parameter(torch.ones(s.hidden))
        self.q = nn.Linear(s.hidden, s.hidden, bias=False)
        self.k = nn.Linear(s.hidden, kv, bias=False)
        self.v = nn.Linear(s.hidden, kv, bias=False)
        self.o = nn.Linear(s.hidden, s.hidden, bias=False)
        self.gate = nn.Linear(s.hidden, s.inter, bias=False)
        self.up = nn.Linear(s.hidden, s.inter, bias=False)
        self.down = nn.Linear(s.inter, s.hidden, bias=False)

    def forward(self, x, cos, sin, mask, past=None):
        s, (b, t, _) = self.s, x.shape
        h = F.rms_norm(x, (s.hidden,), self.attn_norm, s.eps)
        q = rotate(self.q(h).view(b, t, s.heads, s.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k(h).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        if past is not None:
            k, v = past[:] = [torch.cat(both, 2) for both in zip(past, (k, v))] if past else (k, v)
        q = q.reshape(b, s.kv_heads, -1, s.head_dim)  # heads that share keys, one below the other
        w = (q @ k.transpose(2, 3)).float() * s.head_dim**-0.5 + mask
        a = (w.softmax(-1).to(v.dtype) @ v).view(b, s.heads, t, s.head_dim)
        a = self.o(a.transpose(1, 2).reshape(b, t, s.hidden))
        x = x + a
        h = F.rms_norm(x, (s.hidden,), self.ffn_norm, s.eps)
        m = self.down(F.silu(self.gate(h)) * self.up(h))
        return x + m


class Decoder(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.Parameter(torch.ones(s.hidden))
        nn.init.normal_(self.embed.weight, std=0.02)
        for name, p in self.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                last = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * ((2 * s.layers) ** -0.5 if last else 1))
        freq = s.rope_theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)
        angle = torch.outer(torch.arange(s.context).float(), freq)
        angle = torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def hidden(self, ids, past=None):
        """ids [batch, tokens] to normalised hidden states [batch, tokens, hidden].

        `past` holds one list for each layer, empty at first, in which keys and values are kept from call to call.
        """
        begin = past[0][0].shape[2] if past and past[0] else 0
        t, end = ids.shape[1], begin + ids.shape[1]
        x = self.embed(ids)
        mask = torch.full((t, end), float("-inf")).triu(1 + begin).repeat(self.s.heads // self.s.kv_heads, 1)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.cos[begin:end], self.sin[begin:end], mask, past[i] if past else None)
        return F.rms_norm(x, (self.s.hidden,), self.norm, self.s.eps)

    def forward(self, ids):
        """ids [batch, tokens] to logits [batch, tokens, vocab]."""
        return F.linear(self.hidden(ids), self.embed.weight)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)
