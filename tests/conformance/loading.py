"""Weights that vine quantizes while it loads, against the same weights quantized by the gguf package.

A file whose matrices the gguf package has cut to Q8_0 or Q4_0 must give the logits of the F32 file with
`--quant`, to the last bit: so every block is the same. The directory of the same toy must give these bits, too,
but for the llama family: there the rows of queries and keys have another order, sums round differently, and now
and then an activation is cut to the next of its 256 steps.

  loading.py VINE TOYS_DIRECTORY
"""
import os
import sys

import gguf
import numpy as np
import transformers

import toys
from oracle import log_softmax, run
from report import Report

QUANTS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
QUANT_DELTA_MIN = 0.005  # what quantizing must change at least
LAYOUT_SHARE_MAX = 1 / 8  # of the change by quantizing: the change by another layout


def main():
    vine, root = sys.argv[1:3]
    report = Report()
    made = toys.make(root)
    ids = np.random.default_rng(7).integers(0, toys.VOCAB - 8, 48).tolist()
    for name in ["llama", "llama-mha-llama3rope", "mistral-window", "qwen2", "qwen3", "mixtral", "qwen3moe"]:
        folder, plain = made[name]
        exact = logits(vine, plain, root, ids)
        for quant in QUANTS:
            ours = logits(vine, plain, root, ids, "--quant", quant)
            theirs = logits(vine, quantized(name, folder, root, quant), root, ids)
            from_folder = logits(vine, folder, root, ids, "--quant", quant)
            report.check(f"{name} {quant}: blocks", lambda: same_bits(ours, theirs, exact))
            same = close if toys.TOYS[name][1] == "llama" else same_bits
            report.check(f"{name} {quant}: safetensors", lambda: same(from_folder, theirs, exact))
    report.finish()


def quantized(name, folder, root, quant):
    """The toy as GGUF with matrices in `quant`. The output matrix gets at least eight bits, in a tied model a copy
    of the embeddings; the embeddings, the routers and the norms stay as they are."""
    _, arch, pre, _ = toys.TOYS[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    path = os.path.join(root, f"loading-{quant}.gguf")
    floats = dict(toys.gguf_tensors(arch, model))
    floats.setdefault("output.weight", floats["token_embd.weight"])
    toys.write_gguf(path, name, arch, pre, model, toys.train(pre), [
        (tensor, *cut(tensor, array, QUANTS[quant])) for tensor, array in floats.items()])
    return path


def cut(tensor, array, kind):
    if array.ndim == 1 or tensor == "token_embd.weight" or "ffn_gate_inp" in tensor:
        return np.ascontiguousarray(array, np.float32), None
    kind = gguf.GGMLQuantizationType.Q8_0 if tensor == "output.weight" else kind
    return gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind), kind


def logits(vine, spec, root, ids, *options):
    out = os.path.join(root, "logits.bin")
    run(vine, "debug", "logits", "--model", spec, "--tokens", ",".join(map(str, ids)), "--out", out, *options)
    return np.fromfile(out, "<f4").reshape(len(ids), -1)


def same_bits(ours, theirs, exact):
    different = int((ours.view(np.uint32) != theirs.view(np.uint32)).sum())
    assert different == 0, f"{different} of {ours.size} logits differ, by up to {np.abs(ours - theirs).max():.2e}"
    moved = np.abs(log_softmax(ours) - log_softmax(exact)).max()
    assert moved >= QUANT_DELTA_MIN, f"quantizing changed log p by {moved:.1e} only"
    return f"{ours.size} logits equal; quantizing moved log p by up to {moved:.2f}"


def close(ours, theirs, exact):
    ours, theirs, exact = map(log_softmax, (ours, theirs, exact))
    delta, moved = np.abs(ours - theirs).mean(), np.abs(ours - exact).mean()
    shown = f"mean |delta log p| = {delta:.1e}; quantizing moved it by {moved:.1e}"
    assert delta <= moved * LAYOUT_SHARE_MAX, shown
    return shown


if __name__ == "__main__":
    main()
