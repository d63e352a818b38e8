"""vine against llama.cpp on the same GGUF file: greedy tokens and perplexity of quantized weights.

  quantized.py VINE TOYS_DIRECTORY

The files are made here: llama.cpp's own quantizer cuts the F32 toys down to each format.
"""
import ctypes
import os
import sys

import llama_cpp
import numpy as np

import toys
from oracle import run
from report import Report

PERPLEXITY_DELTA_MAX = 0.005  # of ln ppl, relative
FORMATS = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q5_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0, "Q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M, "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL, "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
}
# K-quants need rows of a multiple of 256.
WIDE = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=3, vocab_size=toys.VOCAB,
            max_position_embeddings=512, bos_token_id=toys.VOCAB - 4, eos_token_id=toys.VOCAB - 3,
            num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False, rope_parameters=toys.PLAIN_ROPE)


def main():
    vine, root = sys.argv[1:3]
    source = os.path.join(root, "wide-F32.gguf")
    if not os.path.exists(source):
        model = toys.build("Llama", WIDE, 99)
        toys.write_gguf(source, "wide", "llama", "llama-bpe", model, toys.train("llama-bpe"))
    ids = np.random.default_rng(11).integers(0, toys.VOCAB - 8, 256).tolist()
    report = Report()
    for name, ftype in FORMATS.items():
        path = os.path.join(root, f"wide-{name}.gguf")
        if not os.path.exists(path):
            quantize(source, path, ftype)
        theirs = llama_cpp.Llama(path, n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)
        theirs.eval(ids)
        expected = np.array(theirs.scores[: len(ids)], np.float64)
        report.check(f"{name}: perplexity", lambda: compare_perplexity(vine, path, root, ids, expected))
        report.check(f"{name}: next tokens", lambda: compare_argmax(vine, path, root, ids, expected))
        del theirs
    report.finish()


def logits(vine, path, root, ids):
    out = os.path.join(root, "logits.bin")
    run(vine, "debug", "logits", "--model", path, "--tokens", ",".join(map(str, ids)), "--out", out)
    return np.fromfile(out, "<f4").reshape(len(ids), -1).astype(np.float64)


def nll(rows, ids):
    rows = rows - rows.max(-1, keepdims=True)
    log_p = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    return -log_p[np.arange(len(ids) - 1), ids[1:]].mean()


def compare_perplexity(vine, path, root, ids, expected):
    ours, theirs = nll(logits(vine, path, root, ids), ids), nll(expected, ids)
    delta = abs(ours - theirs) / theirs
    assert delta <= PERPLEXITY_DELTA_MAX, f"ln ppl {ours:.4f}, llama.cpp {theirs:.4f}"
    return f"ln ppl {ours:.4f}, llama.cpp {theirs:.4f}"


def compare_argmax(vine, path, root, ids, expected):
    """The most probable token after each prefix. Where llama.cpp itself is undecided (its first two
    within a twentieth of the spread of its logits) either is right: both quantize activations."""
    ours = logits(vine, path, root, ids).argmax(-1)
    top = np.sort(expected, -1)
    decided = top[:, -1] - top[:, -2] > 0.05 * expected.std()
    wrong = (ours != expected.argmax(-1)) & decided
    assert not wrong.any(), f"{wrong.sum()} of {decided.sum()} decided positions differ"
    return f"{decided.sum()} of {len(ids)} decided positions equal"


def quantize(source, path, ftype):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = ftype, 2, True
    status = llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(params))
    assert status == 0, f"llama.cpp could not write {path}: {status}"


if __name__ == "__main__":
    main()
