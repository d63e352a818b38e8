"""Small random models of every architecture, written by transformers, and the same as F32 GGUF.

Each toy is a Hugging Face directory and a .gguf file with equal weights. The weights come from a
fixed seed; the tokenizer is trained on the sources of Python's standard library.
"""
import glob
import json
import os
import sysconfig

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 2048
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

COMMON = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3, vocab_size=VOCAB,
              max_position_embeddings=512, bos_token_id=VOCAB - 4, eos_token_id=VOCAB - 3)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64, rope_theta=5e5)
LINEAR_ROPE = dict(rope_type="linear", factor=4.0, rope_theta=1e4)
YARN_ROPE = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
PLAIN_ROPE = dict(rope_type="default", rope_theta=1e4)
MOE = dict(num_experts_per_tok=2, intermediate_size=160)

# name: (class prefix, GGUF architecture, pre-tokenizer, configuration)
TOYS = {
    "llama": ("Llama", "llama", "llama-bpe", dict(num_attention_heads=8, num_key_value_heads=4,
              tie_word_embeddings=False, rope_parameters=PLAIN_ROPE)),
    "llama-mha-llama3rope": ("Llama", "llama", "llama-bpe", dict(num_attention_heads=4, num_key_value_heads=4,
              tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)),
    "llama-linear": ("Llama", "llama", "llama-bpe", dict(num_attention_heads=8, num_key_value_heads=1,
              tie_word_embeddings=True, rope_parameters=LINEAR_ROPE)),
    "llama-yarn": ("Llama", "llama", "llama-bpe", dict(num_attention_heads=8, num_key_value_heads=2,
              tie_word_embeddings=False, rope_parameters=YARN_ROPE)),
    "mistral-window": ("Mistral", "llama", "llama-bpe", dict(num_attention_heads=8, num_key_value_heads=2,
              tie_word_embeddings=False, sliding_window=16, rope_parameters=PLAIN_ROPE, head_dim=16)),
    "qwen2-window": ("Qwen2", "qwen2", "qwen2", dict(num_attention_heads=8, num_key_value_heads=2, sliding_window=16,
              tie_word_embeddings=True, use_sliding_window=True, max_window_layers=2, rope_parameters=PLAIN_ROPE)),
    "qwen2": ("Qwen2", "qwen2", "qwen2", dict(num_attention_heads=8, num_key_value_heads=2,
              tie_word_embeddings=True, use_sliding_window=False, rope_parameters=dict(PLAIN_ROPE, rope_theta=1e6))),
    "qwen3": ("Qwen3", "qwen3", "qwen2", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=48,
              tie_word_embeddings=True, use_sliding_window=False, rope_parameters=dict(PLAIN_ROPE, rope_theta=1e6))),
    "mixtral": ("Mixtral", "llama", "llama-bpe", dict(MOE, num_attention_heads=8, num_key_value_heads=2,
              num_local_experts=4, tie_word_embeddings=False, sliding_window=None, rope_parameters=PLAIN_ROPE)),
    "qwen3moe": ("Qwen3Moe", "qwen3moe", "qwen2", dict(MOE, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
              num_experts=4, moe_intermediate_size=96, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
              tie_word_embeddings=False, use_sliding_window=False, rope_parameters=PLAIN_ROPE)),
}


def make(root):
    """Writes every toy below `root`; gives {name: (directory, gguf file)}."""
    out = {}
    for seed, (name, (prefix, arch, pre, options)) in enumerate(TOYS.items()):
        folder = os.path.join(root, name)
        path = os.path.join(root, f"{name}-F32.gguf")
        out[name] = (folder, path)
        if os.path.exists(os.path.join(folder, "done")):
            continue
        vocabulary = train(pre)
        model = build(prefix, {**COMMON, **options}, seed)
        model.save_pretrained(folder, safe_serialization=True)
        write_tokenizer(folder, vocabulary, pre)
        write_gguf(path, name, arch, pre, model, vocabulary)
        open(os.path.join(folder, "done"), "w").close()
    return out


def build(prefix, options, seed):
    config = getattr(transformers, f"{prefix}Config")(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.1 * noise)
            elif "embed_tokens" in name:
                p.copy_(0.1 * noise)
            else:
                p.copy_(1.2 * noise / p.shape[-1] ** 0.5)
    return model


# ---------------------------------------------------------------- tokenizer
def split(pre):
    pattern = Regex(QWEN_SPLIT if pre == "qwen2" else LLAMA3_SPLIT)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(pre):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split(pre)
    sources = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))[:60]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(sources, trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIALS), show_progress=False,
                                                 initial_alphabet=alphabet))
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda kv: kv[1])]
    assert len(tokens) == VOCAB - len(SPECIALS)
    return tokens, [tuple(m) for m in model["merges"]]


def write_tokenizer(folder, vocabulary, pre):
    tokens, merges = vocabulary
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges,
                                     ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = split(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as Qwen's own files
    tokenizer.add_special_tokens(SPECIALS)
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIALS[0]} $A", pair=f"{SPECIALS[0]} $A {SPECIALS[0]} $B",
            special_tokens=[(SPECIALS[0], VOCAB - 4)])
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=SPECIALS[0], eos_token=SPECIALS[1],
                       chat_template=CHATML, model_max_length=512, clean_up_tokenization_spaces=False), f)


# ---------------------------------------------------------------- GGUF
LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
         "block_sparse_moe.gate": "ffn_gate_inp", "mlp.experts.down_proj": "ffn_down_exps"}


def gguf_tensors(arch, model):
    """(GGUF name, f32 array) of every weight."""
    config = model.config
    tied = config.tie_word_embeddings
    for name, p in model.state_dict().items():
        a = p.numpy()
        if name == "model.embed_tokens.weight":
            yield "token_embd.weight", a
        elif name == "model.norm.weight":
            yield "output_norm.weight", a
        elif name == "lm_head.weight":
            if not tied:
                yield "output.weight", a
        else:
            _, _, layer, rest = name.split(".", 3)
            if rest.endswith("experts.gate_up_proj"):  # [experts, 2 * inner, hidden]: gate above up
                gate, up = np.split(a, 2, axis=1)
                yield f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(gate)
                yield f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(up)
                continue
            if rest.endswith("experts.down_proj"):
                yield f"blk.{layer}.ffn_down_exps.weight", a
                continue
            base, kind = rest.rsplit(".", 1)
            if arch == "llama" and base in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
                a = interleave(a, heads)
            yield f"blk.{layer}.{LAYER[base]}.{kind}", a


def interleave(a, heads):
    """Rows of half-split rotary pairs to interleaved ones, as GGUF's llama has them."""
    return np.ascontiguousarray(a.reshape(heads, 2, -1, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape))


def write_gguf(path, name, arch, pre, model, vocabulary, tensors=None):
    """`tensors`: (GGUF name, array, type of its bytes or None for f32) instead of the model's own."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters
    w = gguf.GGUFWriter(path, arch)
    w.add_name(name)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(head_dim)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_vocab_size(VOCAB)
    w.add_file_type(0)
    experts = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        if arch == "qwen3moe":
            w.add_expert_feed_forward_length(c.moe_intermediate_size)
    windowed = [kind == "sliding_attention" for kind in getattr(c, "layer_types", None) or []]
    if getattr(c, "sliding_window", None):
        w.add_sliding_window(c.sliding_window)
        if not all(windowed):
            w.add_sliding_window_pattern(windowed)
    if rope["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    tokens, merges = vocabulary
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens + SPECIALS)
    w.add_token_types([1] * len(tokens) + [3] * len(SPECIALS))
    w.add_token_merges([" ".join(m) for m in merges])
    w.add_bos_token_id(VOCAB - 4)
    w.add_eos_token_id(VOCAB - 3)
    w.add_add_bos_token(pre == "llama-bpe")
    w.add_chat_template(CHATML)
    if rope["rope_type"] == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    for tensor, array, kind in tensors or ((*pair, None) for pair in gguf_tensors(arch, model)):
        w.add_tensor(tensor, np.ascontiguousarray(array, None if kind else np.float32), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama3_factors(rope, head_dim):
    """What each inverse frequency is divided by (Llama 3.1's scaling by wavelength)."""
    inv = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * np.pi / inv
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
