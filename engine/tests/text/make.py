#!/usr/bin/env python3
"""Makes the goldens of this directory with tokenizers, sentencepiece and transformers.

  pip install tokenizers sentencepiece transformers jinja2
  python make.py

Small vocabularies are trained on the strings below, so the files stay small and every string has
merges in it. What is written: tokenizers.json (vocabularies, as tokenizer.json and as GGUF-style
metadata, with the ids of every string) and chats.json (what transformers renders from templates/).
"""
import datetime, io, json, os

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils import chat_template_utils

HERE = os.path.dirname(os.path.abspath(__file__))
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

STRINGS = [
    "", " ", "  ", "   a", "a   ", "\t", "\n", "\n\n\n", "\r\n", " \n ", "a\n\n b\n  c", "\t\t\tx\t y",
    "Hello world", " Hello  world ", "hello HELLO Hello", "I'm you're WE'LL they'd it's IT'S 'tis don''t",
    "'s 'S '\u017f", "123", "1234567890", "3.14159 1,000,000 0x1F 1e-5", "a1b2c3 v1.2.3-rc4",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u2167 \u00bd", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f1e9\U0001f1ea flags \U0001f44d\U0001f3fd skin", "caf\u00e9 cafe\u0301 \u00c5 A\u030a \u212b", "z\u0351\u036b\u0343\u0342a\u030d\u033el\u0334g\u0321o",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01 \u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c \u30ab\u30bf\u30ab\u30ca", "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "def f(x):\n    return x ** 2  # square\n", "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; }", "<div class=\"a\">&amp;</div>", "SELECT * FROM t WHERE a='b';",
    "https://example.com/path?q=1&r=%20#frag", "user@example.com", "C:\\Users\\x\\file.txt", "```rust\nfn main() {}\n```",
    "<|im_start|>system\nYou are evil<|im_end|>", "<|begin_of_text|><|eot_id|>", "<|im_start", "|im_start|>", "<s>[INST] hi [/INST]</s>", "<unk><0x41>", "<tool_call></tool_call>",
    "a\u00a0b\u2003c\u3000d\u200be", "\u2581under\u2581score", "\ufeffbom", "\u0000\u0001\u001f", "\u0085\u2028\u2029", "\ufffd\ufffe", "\U0010ffff\U000f0000\ue000",
    "!!!???...---___***", "$100 \u20ac50 \u00a3\u00a5 \u2030", "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2026", "x" * 300, " " * 100, "ab" * 200, "\n" * 50, "1" * 100, "\u4f60" * 60,
    "The quick brown fox jumps over the lazy dog. " * 8, "\u1e9b\u0323 \ufb01 \u2460 \uff21\uff22\uff23", "\u0130stanbul \u0131\u015f\u0131k \u1e9e \u01c5", "a\u0300\u0301\u0302\u0303b", "I\u2019m don\u2019t",
]
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]


def byte_level(pattern, nfc, whole_words, bos):
    t = Tokenizer(models.BPE(ignore_merges=whole_words))
    if nfc:
        t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(STRINGS * 3, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    t.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("    ", normalized=False)])
    if bos:
        b = SPECIALS[0]
        t.post_processor = processors.TemplateProcessing(
            single=f"{b} $A", pair=f"{b} $A {b} $B", special_tokens=[(b, t.token_to_id(b))])
    return t


def metaspace():
    """The pipeline of Llama 2's tokenizer.json."""
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.train_from_iterator([s for s in STRINGS if len(s) < 80] * 3, trainers.BpeTrainer(
        vocab_size=900, limit_alphabet=120, show_progress=False, max_token_length=12,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]))
    j = json.loads(t.to_str())
    j["added_tokens"] = [a for a in j["added_tokens"] if not a["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(j))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return t


def cases(t):
    out = []
    for s in STRINGS:
        t.encode_special_tokens = True
        plain, around = t.encode(s, add_special_tokens=False).ids, t.encode(s).ids
        t.encode_special_tokens = False
        special = t.encode(s, add_special_tokens=False).ids
        row = dict(text=s, ids=plain, around=around, special=special)
        # a decoder that replaces whole runs of byte tokens says less than the bytes do
        row["decoded"] = t.decode(plain, skip_special_tokens=False)
        out.append(row)
    return out


def gguf_bpe(t, pre, bos):
    j = json.loads(t.to_str())
    voc = {**j["model"]["vocab"], **{a["content"]: a["id"] for a in j["added_tokens"]}}
    tokens = [k for k, _ in sorted(voc.items(), key=lambda kv: kv[1])]
    assert sorted(voc.values()) == list(range(len(voc)))
    kind = {a["content"]: 3 if a["special"] else 4 for a in j["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in j["model"]["merges"]]
    return dict(model="gpt2", pre=pre, tokens=tokens, token_types=[kind.get(x, 1) for x in tokens], scores=[], merges=merges,
                bos=t.token_to_id(SPECIALS[0]), eos=t.token_to_id(SPECIALS[1]), add_bos=bos)


def spm():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([s for s in STRINGS if s.strip() and "\0" not in s and len(s) < 200] * 3), model_writer=model, vocab_size=700,
        model_type="bpe", byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool_call>"], minloglevel=2)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = sp.get_piece_size()
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 5 if sp.is_unused(i) else 4 if sp.id_to_piece(i) == "<tool_call>" else 1
    gguf = dict(model="llama", pre="default", tokens=[sp.id_to_piece(i) for i in range(n)], scores=[sp.get_score(i) for i in range(n)],
                token_types=[kind(i) for i in range(n)], merges=[], bos=sp.bos_id(), eos=sp.eos_id(), unk=sp.unk_id(), add_bos=True, add_space_prefix=True)
    rows = []
    for s in STRINGS:
        if "\0" in s:
            continue  # sentencepiece ends a text there
        ids = sp.encode(s)
        rows.append(dict(text=s, ids=ids, around=[sp.bos_id()] + ids, decoded=sp.decode(ids)))
    return dict(gguf=gguf, cases=rows)


def tokenizer_goldens():
    out = {}
    for name, args, pre in [("llama3", (LLAMA3, False, True, True), "llama-bpe"), ("qwen2", (QWEN2, True, False, False), "qwen2")]:
        t = byte_level(*args)
        config = dict(bos_token=SPECIALS[0], eos_token=dict(content=SPECIALS[1]))
        rows = cases(t)
        out[name] = dict(json=t.to_str(), config=config, gguf=gguf_bpe(t, pre, args[3]), cases=rows)
    g = Tokenizer(models.BPE())
    g.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    g.decoder = decoders.ByteLevel()
    g.train_from_iterator(STRINGS * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    g.add_special_tokens(SPECIALS)
    out["gpt2"] = dict(json=g.to_str(), config={}, gguf=gguf_bpe(g, "gpt-2", False), cases=cases(g))
    m = metaspace()
    out["metaspace"] = dict(json=m.to_str(), config=dict(bos_token="<s>", eos_token="</s>"), cases=cases(m))
    out["spm"] = spm()
    return out


WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather \"now\" <\u00e9>", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "A city"}, "days": {"type": "integer", "default": 1.0, "enum": [1, 2]}}, "required": ["city"]}}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}}
HI = {"role": "user", "content": "  Hi <there> & 'you'\n"}
SYS = {"role": "system", "content": "Be brief.\n"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "S\u00e3o \"P\"", "days": 2, "x": [1.5, None, True]}}}]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "{\"temp\": 21}"}
CHATS = [
    dict(messages=[HI]),
    dict(messages=[SYS, HI]),
    dict(messages=[SYS, HI, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]),
    dict(messages=[HI, {"role": "assistant", "content": "Hello."}], add_generation_prompt=False),
    dict(messages=[SYS, HI], tools=[WEATHER, NOW]),
    dict(messages=[SYS, HI, CALL, RESULT], tools=[WEATHER]),
    dict(messages=[HI, CALL, RESULT, {"role": "assistant", "content": "21 degrees."}, {"role": "user", "content": "And now?"}], tools=[NOW, WEATHER]),
    dict(messages=[HI, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, {"role": "user", "content": "Sure?"}]),
    dict(messages=[HI], kwargs=dict(enable_thinking=False)),
    dict(messages=[HI, HI]),
]


def chat_goldens():
    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2025, 3, 9, 7, 5, 3)
    chat_template_utils.datetime = Fixed
    chat_template_utils._cached_compile_jinja_template.cache_clear() if hasattr(chat_template_utils._cached_compile_jinja_template, "cache_clear") else None
    out = []
    for file in sorted(os.listdir(os.path.join(HERE, "templates"))):
        source = open(os.path.join(HERE, "templates", file)).read()
        for number, chat in enumerate(CHATS):
            row = dict(template=file, number=number, messages=chat["messages"], tools=chat.get("tools", []),
                       add_generation_prompt=chat.get("add_generation_prompt", True), kwargs=chat.get("kwargs", {}))
            try:
                rendered, _ = chat_template_utils.render_jinja_template(
                    [json.loads(json.dumps(chat["messages"]))], tools=chat.get("tools"), chat_template=source,
                    add_generation_prompt=row["add_generation_prompt"], bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", **row["kwargs"])
                row["text"] = rendered[0]
            except Exception as e:
                row["error"] = str(e)
            out.append(row)
    return out


if __name__ == "__main__":
    for name, value in [("tokenizers.json", tokenizer_goldens()), ("chats.json", chat_goldens())]:
        with open(os.path.join(HERE, name), "w") as f:
            json.dump(value, f, ensure_ascii=True, indent=None, separators=(",", ":"))
            f.write("\n")
