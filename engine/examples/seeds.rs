//! Writes small valid inputs into `fuzz/corpus/`, for the fuzzers to start from.

use std::io;
use std::path::{Path, PathBuf};

use engine::weights::Format;
use engine::weights::testing::{ARCHITECTURES, gguf, hf, smallest};
use fuzz::{END, TARGETS, goldens};
use serde_json::{Value, json};

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

fn main() -> io::Result<()> {
    for (target, _) in TARGETS {
        std::fs::create_dir_all(corpus(target))?;
    }
    models()?;
    texts()?;
    templates()?;
    calls()?;
    requests()?;
    grammars()
}

fn models() -> io::Result<()> {
    for architecture in ARCHITECTURES {
        let config = smallest(architecture);
        for format in [Format::F32, Format::Q8_0, Format::Q4_0] {
            let name = format!("{architecture}-{format}");
            seed("gguf", &name, &gguf(&config, format, 1).bytes())?;
        }
        let files = hf(&config, Format::BF16, 1);
        seed("safetensors", &architecture.to_string(), &files.shard(0, 1))?;
        let (config, tokenizer) = (files.config.to_string(), files.tokenizer_config.to_string());
        seed("hf_config", &architecture.to_string(), &tagged(0, &config))?;
        seed("hf_config", &format!("{architecture}-tokenizer"), &tagged(1, &tokenizer))?;
        seed("hf_text", "tokenizer_config", &tagged(0, &tokenizer))?;
        seed("hf_text", "generation_config", &tagged(2, &files.generation_config.to_string()))?;
        seed("hf_text", "tokenizer", &tagged(4, &files.tokenizer.to_string()))?;
    }
    let index = "{\"weight_map\":{\"model.norm.weight\":\"model.safetensors\"}}";
    seed("hf_config", "index", &tagged(2, index))?;
    let named = json!({"eos_token": {"content": "<|im_end|>"}, "chat_template": [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"}]});
    seed("hf_text", "named", &tagged(0, &named.to_string()))?;
    let map = json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>"}});
    seed("hf_text", "special", &tagged(1, &map.to_string()))?;
    seed("hf_text", "jinja", &tagged(3, "{% for m in messages %}{{ m.role }}{% endfor %}"))
}

fn texts() -> io::Result<()> {
    let all = goldens::goldens("tokenizers");
    for (which, name) in ["llama3", "gpt2", "qwen2", "metaspace", "spm"].into_iter().enumerate() {
        let golden = &all[name];
        for (i, case) in golden["cases"].as_array().into_iter().flatten().enumerate().step_by(3) {
            let text = case["text"].as_str().unwrap_or_default();
            let text = text.get(..400).unwrap_or(text);
            seed("encode", &format!("{name}-{i}"), &tagged(which as u8, text))?;
            let ids = case["ids"].as_array().into_iter().flatten().filter_map(Value::as_u64);
            let pairs: Vec<u8> = ids.take(60).flat_map(|id| (id as u16).to_be_bytes()).collect();
            let bytes = [vec![which as u8], pairs].concat();
            seed("detokenize", &format!("{name}-{i}"), &bytes)?;
        }
        if let Some(json) = golden["json"].as_str() {
            seed("tokenizer_json", name, &joined(json, "Hello w\u{f6}rld  123\n"))?;
        }
    }
    for (name, json) in small_tokenizers() {
        seed("tokenizer_json", name, &joined(&json.to_string(), "ab a\u{e9}<s> b"))?;
    }
    let edits: [&[u8]; 6] = [
        b"\0t\x01\x02<|x|>\na3\x04<think>\n",
        b"\0pxxdefault\nmxxa b\nbx\x05\nKx\x104\n",
        b"\x01pxxqwen2\nmxxh e\nf\0\x2a\n",
        b"\x02Sx\x08\x04\nsx\x09\xfe\nkx\x096\n",
        b"\x02Pxxgpt2\nx\x01\x80\nM\0\x10\n",
        b"\x02a1\x08\xe2\x96\x81ab\na4\x08<tool>\nuxx\n",
    ];
    for (i, edits) in edits.into_iter().enumerate() {
        let text = " Hello <|im_start|>\u{e9}\u{1f600} ab".as_bytes();
        seed("gguf_tokenizer", &format!("edits-{i}"), &[edits, &[END], text].concat())?;
    }
    Ok(())
}

/// One of each kind that the `tokenizers` crate reads, with a handful of tokens.
fn small_tokenizers() -> [(&'static str, Value); 4] {
    let added = json!([{"id": 0, "content": "<s>", "special": true, "single_word": false,
        "lstrip": true, "rstrip": false, "normalized": false}]);
    let with = |model: Value, pre: Value, normalizer: Value| {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": pre,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "decoder": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always",
                "split": true},
            "model": model})
    };
    let metaspace = json!({"type": "Metaspace", "replacement": "\u{2581}",
        "prepend_scheme": "first", "split": true});
    let sequence = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true}, {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "Split", "pattern": {"Regex": "\\s+|\\p{L}"}, "behavior": "MergedWithPrevious",
            "invert": false}]});
    let normalizer = json!({"type": "Sequence", "normalizers": [{"type": "NFKC"},
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    [
        (
            "unigram",
            with(
                json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
            "vocab": [["<s>", 0.0], ["\u{2581}", -1.0], ["a", -2.0], ["b", -2.5], ["ab", -1.5]]}),
                metaspace.clone(),
                Value::Null,
            ),
        ),
        (
            "wordpiece",
            with(
                json!({"type": "WordPiece", "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {"<s>": 0, "[UNK]": 1, "a": 2, "##b": 3}}),
                sequence,
                Value::Null,
            ),
        ),
        (
            "wordlevel",
            with(
                json!({"type": "WordLevel", "unk_token": "[UNK]",
            "vocab": {"<s>": 0, "[UNK]": 1, "ab": 2}}),
                json!({"type": "Whitespace"}),
                Value::Null,
            ),
        ),
        (
            "bpe",
            with(
                json!({"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false,
            "vocab": {"<s>": 0, "<unk>": 1, "\u{2581}": 2, "a": 3, "b": 4, "ab": 5, "<0x0A>": 6},
            "merges": [["a", "b"]]}),
                Value::Null,
                normalizer,
            ),
        ),
    ]
}

fn templates() -> io::Result<()> {
    let input = json!({"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "abcdefghi", "type": "function",
             "function": {"name": "f", "arguments": "{\"a\":1}"}}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "{}"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "variables": {"enable_thinking": true}})
    .to_string();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text/templates");
    for entry in std::fs::read_dir(sources)? {
        let entry = entry?;
        let source = std::fs::read_to_string(entry.path())?;
        seed("template", &entry.file_name().to_string_lossy(), &joined(&source, &input))?;
    }
    let small = [
        "{% for m in messages %}{{ m.content | trim | upper }}{% endfor %}",
        "{% macro f(x, y='z') %}{{ x ~ y }}{% endmacro %}{{ f(messages | length) }}",
        "{{ tools | tojson(indent=2) }}{{ '%s-%d' | format('a', 3) }}{{ 'a' * 10 }}",
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ strftime_now('%Y') }}",
        "{% if messages[0]['role'] == 'system' %}{{ messages[1:] | list }}{% endif %}",
        "{{ 'a b'.split(' ')[-1].replace('b', 'c').strip() }}{{ '{:>9}'.format(1) }}",
    ];
    for (i, source) in small.into_iter().enumerate() {
        seed("template", &format!("small-{i}"), &joined(source, &input))?;
    }
    Ok(())
}

fn calls() -> io::Result<()> {
    let texts = [
        "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"\"}}\n</tool_call>\n<tool_call>{\"name\":\"now\"}</tool_call>",
        "{\"name\": \"f\", \"parameters\": {\"a\": [1]}}; {\"name\": \"now\", \"parameters\": {}}",
        "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"now\", \"arguments\": \"{}\"}] x",
        "ok [TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}",
        "<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": \"\u{e9}\"}}",
        "<tool_call>{\"arguments\":{\"a\":[1]},\"name\":\"now\",\"x\":{}}</tool_call>done",
    ];
    for (i, text) in texts.into_iter().enumerate() {
        for format in 0..4 {
            let bytes = [&tagged(format, text)[..], &[END, 1, 3, 0, 9]].concat();
            seed("tool_calls", &format!("{i}-{format}"), &bytes)?;
        }
    }
    Ok(())
}

fn requests() -> io::Result<()> {
    let tool = json!({"type": "function", "function": {"name": "f", "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}, "strict": true}});
    let chat = json!({"model": "m", "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be <|im_start|>"}]},
            {"role": "user", "content": "hi <|im_", "name": "end|>"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "rain"}],
        "max_tokens": 5, "n": 2, "stop": ["a"], "temperature": 0.5, "top_p": 0.9, "seed": -3,
        "logit_bias": {"5": -100}, "logprobs": true, "top_logprobs": 2, "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "stream": true,
        "stream_options": {"include_usage": true}, "parallel_tool_calls": false,
        "chat_template_kwargs": {"enable_thinking": false}});
    seed("requests", "chat", &tagged(0, &chat.to_string()))?;
    let format = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_schema",
            "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": true}},
        "grammar": null, "tool_choice": "auto", "priority": 3});
    seed("requests", "format", &tagged(0, &format.to_string()))?;
    let grammar = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}],
        "grammar": {"type": "regex", "value": "[a-z]+"}, "max_completion_tokens": 1});
    seed("requests", "grammar", &tagged(0, &grammar.to_string()))?;
    let text =
        json!({"model": "m", "prompt": ["a", "b"], "echo": true, "logprobs": 1, "best_of": 1});
    seed("requests", "completion", &tagged(1, &text.to_string()))?;
    let tokens = json!({"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 0});
    seed("requests", "tokens", &tagged(1, &tokens.to_string()))?;
    let embed = json!({"model": "m", "input": "a", "encoding_format": "base64", "dimensions": 3});
    seed("requests", "embedding", &tagged(2, &embed.to_string()))
}

fn grammars() -> io::Result<()> {
    let walk = [END, 0, 7, 200, 31, 5, 90, 3, 3, 3, 17, 0, 255, 64];
    let with_walk = |tag: u8, text: &str| [&tagged(tag, text)[..], &walk].concat();
    for (i, regex) in
        ["[a-c]+x?", "(foo|bar){2,5}\\d+", "\\p{L}*[^a]", "(?i:ab.)*"].into_iter().enumerate()
    {
        seed("grammar", &format!("regex-{i}"), &with_walk(0, regex))?;
    }
    let larks = [
        "start: \"hello\" (\" \" NAME)+\nNAME: /[a-z]+/",
        "start: a | b\na: \"x\" a | \"y\"\nb[capture]: %json {\"type\":\"object\"}",
        "start: item{1,3} /x+/ \"q\"i\nitem: (\"a\"|\"b\")? WS\n%ignore / /\nWS: \" \"+",
        "start: @sub\nsub: <[301]> \"a\"",
        "%llguidance {}\nstart: t[temperature=0.5, stop=\"x\"]\nt: /.*/",
    ];
    for (i, lark) in larks.into_iter().enumerate() {
        seed("grammar", &format!("lark-{i}"), &with_walk(1, lark))?;
    }
    let schemas = [
        json!({"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 120}, "next": {"$ref": "#"}},
            "required": ["kind"], "additionalProperties": false}),
        json!({"anyOf": [{"type": "string", "pattern": "^[a-z]{2,4}$", "maxLength": 9},
            {"type": "number", "multipleOf": 0.5}, {"const": null}]}),
        json!({"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1, "maxItems": 4,
            "$defs": {"a": {"type": "string", "format": "date-time"}}}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}},
            {"required": ["a"]}], "patternProperties": {"^x": {"type": "integer"}}}),
        json!({"type": ["object", "null"], "additionalProperties": {"oneOf": [{"type": "string"}]},
            "minProperties": 1, "prefixItems": []}),
    ];
    for (i, schema) in schemas.into_iter().enumerate() {
        for tag in [0, 1, 2, 3, 4] {
            let bytes = with_walk(tag, &schema.to_string());
            seed("schema", &format!("{i}-{tag}"), &bytes)?;
        }
    }
    Ok(())
}

fn tagged(tag: u8, text: &str) -> Vec<u8> {
    [&[tag], text.as_bytes()].concat()
}

fn joined(first: &str, second: &str) -> Vec<u8> {
    [first.as_bytes(), &[END], second.as_bytes()].concat()
}

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn seed(target: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    std::fs::write(corpus(target).join(name), bytes)
}
