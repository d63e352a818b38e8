"""vine against llama.cpp on the same GGUF file: perplexity and next tokens of quantized weights.

Both quantize activations too, each in its own way, so their logits differ by noise. What is asked:
equal perplexity, and next tokens that are as near as llama.cpp's to those of the exact model, which
is the same weights dequantized by the gguf package and computed in float32.

  quantized.py VINE TOYS_DIRECTORY

The files are made here: llama.cpp's own quantizer cuts the F32 toys down to each format.
"""
import ctypes
import os
import sys

import gguf
import llama_cpp
import numpy as np

import toys
from oracle import log_softmax, run
from report import Report

PERPLEXITY_DELTA_MAX = 0.005  # of ln ppl, relative
ERROR_RATIO_MAX = 1.1  # our mean error over llama.cpp's
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
    model, vocabulary = toys.build("Llama", WIDE, 99), toys.train("llama-bpe")
    if not os.path.exists(source):
        toys.write_gguf(source, "wide", "llama", "llama-bpe", model, vocabulary)
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
        exact = os.path.join(root, "exact.gguf")
        toys.write_gguf(exact, "wide", "llama", "llama-bpe", model, vocabulary, dequantized(path))
        report.check(f"{name}: next tokens", lambda: compare_next(vine, path, exact, root, ids, expected))
        del theirs
    report.finish()


def logits(vine, path, root, ids, *options):
    out = os.path.join(root, "logits.bin")
    run(vine, "debug", "logits", "--model", path, "--tokens", ",".join(map(str, ids)), "--out", out, *options)
    return np.fromfile(out, "<f4").reshape(len(ids), -1).astype(np.float64)


def nll(rows, ids):
    log_p = log_softmax(rows)
    return -log_p[np.arange(len(ids) - 1), ids[1:]].mean()


def compare_perplexity(vine, path, root, ids, expected):
    ours, theirs = nll(logits(vine, path, root, ids), ids), nll(expected, ids)
    delta = abs(ours - theirs) / theirs
    assert delta <= PERPLEXITY_DELTA_MAX, f"ln ppl {ours:.4f}, llama.cpp {theirs:.4f}"
    return f"ln ppl {ours:.4f}, llama.cpp {theirs:.4f}"


def compare_next(vine, path, exact, root, ids, theirs):
    """Mean error of the log-probabilities, and how often the most probable token is the exact one."""
    reference = log_softmax(logits(vine, exact, root, ids, "--kv-dtype", "f32"))
    ours, theirs = log_softmax(logits(vine, path, root, ids)), log_softmax(theirs)
    error = [np.abs(rows - reference).mean() for rows in (ours, theirs)]
    agree = [int((rows.argmax(-1) == reference.argmax(-1)).sum()) for rows in (ours, theirs)]
    shown = f"mean error {error[0]:.4f}, llama.cpp {error[1]:.4f}; {agree[0]} and {agree[1]} of {len(ids)} tokens exact"
    assert error[0] <= ERROR_RATIO_MAX * error[1] + 1e-4, shown
    return shown


def dequantized(path):
    """(name, f32 array, None) of every tensor, by the gguf package."""
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, array.reshape([int(n) for n in reversed(tensor.shape)]), None


def quantize(source, path, ftype):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = ftype, 2, True
    status = llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(params))
    assert status == 0, f"llama.cpp could not write {path}: {status}"


if __name__ == "__main__":
    main()
