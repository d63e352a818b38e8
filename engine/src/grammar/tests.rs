use serde_json::{Value, json};

use super::*;
use crate::chat::ToolFormat;
use crate::tokenizer::sample;

fn env() -> TokenizerEnv {
    TokenizerEnv::new(&sample::tokenizer()).expect("has an end")
}

fn allows(mask: &[u32], token: TokenId) -> bool {
    mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// Whether `text` is a whole text of the grammar, token by token through the masks.
fn matches(env: &TokenizerEnv, grammar: &Grammar, text: &str) -> bool {
    let guard = crate::tokenizer::Guard::new(env.tokenizer(), []).expect("free marks");
    let tokens = env.tokenizer().encode_template(text, &guard).expect("encodes");
    let mut matcher = grammar.matcher();
    for &token in &tokens {
        if matcher.is_finished() || !allows(matcher.mask().expect("a mask"), token) {
            return false;
        }
        matcher.accept(token).expect("the mask has it");
    }
    let end = env.tokenizer().end_of_generation()[0];
    let may_end = allows(matcher.mask().expect("a mask"), end);
    assert_eq!(may_end, matcher.is_complete(), "{text}");
    may_end
}

#[track_caller]
fn check(spec: GrammarSpec, good: &[&str], bad: &[&str]) {
    let env = env();
    let grammar = Grammar::compile(&env, &spec).expect("compiles");
    for text in good {
        assert!(matches(&env, &grammar, text), "should match: {text}");
    }
    for text in bad {
        assert!(!matches(&env, &grammar, text), "should not match: {text}");
    }
}

#[test]
fn json_object() {
    let good = [
        "{}",
        "{\"a\": [1, {\"b\": null}]}",
        "{\"a\":[1,{\"b\":null}]}",
        "{ \"a\": [ 1 ] }",
        "{\n  \"hello\": \"w\u{e9}\"\n}",
        "{\r\n\t\"a\": [\r\n\t\t1\r\n\t]\r\n}",
        "{\n    \"a\": {\n        \"b\": [\n            1,\n            2\n        ]\n    }\n}",
    ];
    let endless = ["  ", "\n\n", "\t", " \n", "\r", &format!("\n{}", " ".repeat(65))]
        .map(|space| format!("{{{space}}}"));
    let bad = ["[]", "1", "{\"a\"", "", "{\"a\":1}x", "{\"a\":  1}", "{\"a\" \n: 1}"];
    let bad: Vec<&str> = bad.into_iter().chain(endless.iter().map(String::as_str)).collect();
    check(GrammarSpec::JsonObject, &good, &bad);
}

#[test]
fn json_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "age": {"type": "integer", "minimum": 0},
            "next": {"$ref": "#"}
        },
        "required": ["kind"],
        "additionalProperties": false
    });
    check(
        GrammarSpec::JsonSchema(schema),
        &[r#"{"kind": "cat"}"#, r#"{"kind":"dog","age":3,"next":{"kind":"cat"}}"#],
        &["{}", r#"{"kind": "cow"}"#, r#"{"kind": "cat", "age": -1}"#, r#"{"kind":"cat","x":1}"#],
    );
    check(GrammarSpec::JsonSchema(json!({})), &["1", "[true]", "\"x\""], &["x"]);
}

#[test]
fn regex_and_lark() {
    check(GrammarSpec::Regex("[a-c]+x?".to_owned()), &["abc", "ax"], &["", "x", "axx"]);
    let lark = "start: \"hello\" (\" \" NAME)+\nNAME: /[a-z]+/";
    check(GrammarSpec::Lark(lark.to_owned()), &["hello w", "hello a b"], &["hello", "hellow"]);
}

#[test]
fn calls_in_every_form() {
    let schema = json!({
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/c"}},
        "required": ["city"],
        "additionalProperties": false,
        "$defs": {"c": {"type": "string"}}
    });
    let tools = vec![("weather".to_owned(), schema), ("now".to_owned(), Value::Null)];
    let w = r#"{"name": "weather", "arguments": {"city": "Rome"}}"#;
    let n = r#"{"name": "now", "arguments": {}}"#;
    let (lw, ln) = (w.replace("arguments", "parameters"), n.replace("arguments", "parameters"));
    let tables: [(ToolFormat, Vec<String>, Vec<String>); 4] = [
        (
            ToolFormat::Hermes,
            vec![
                format!("<tool_call>\n{w}\n</tool_call>"),
                format!("<tool_call>\n{n}\n</tool_call>\n<tool_call>\n{w}\n</tool_call>"),
            ],
            vec![w.to_owned(), format!("<tool_call>\n{}\n</tool_call>", w.replace("Rome\"", "1"))],
        ),
        (ToolFormat::Llama3, vec![lw.clone(), format!("{ln}; {lw}")], vec![w.to_owned()]),
        (
            ToolFormat::MistralArray,
            vec![format!("[TOOL_CALLS][{w}]"), format!("[TOOL_CALLS][{w}, {n}]")],
            vec![format!("[{w}]"), "[TOOL_CALLS][]".to_owned()],
        ),
        (
            ToolFormat::MistralArgs,
            vec![r#"[TOOL_CALLS]weather[ARGS]{"city": "x"}[TOOL_CALLS]now[ARGS]{}"#.to_owned()],
            vec![r#"[TOOL_CALLS]now[ARGS]{"city": "x"}"#.to_owned()],
        ),
    ];
    for (format, good, bad) in tables {
        let calls = ToolGrammar { format, tools: tools.clone(), parallel: true };
        let good: Vec<&str> = good.iter().map(String::as_str).collect();
        let bad: Vec<&str> = bad.iter().map(String::as_str).collect();
        check(GrammarSpec::ToolCalls(calls), &good, &bad);
    }
}

#[test]
fn one_call_when_not_parallel_and_then_the_end() {
    let env = env();
    let tools = vec![("now".to_owned(), Value::Null)];
    let calls = ToolGrammar { format: ToolFormat::Hermes, tools, parallel: false };
    let grammar = Grammar::compile(&env, &GrammarSpec::ToolCalls(calls)).expect("compiles");
    let text = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let tokens = env.tokenizer().encode(text, false).expect("encodes");
    let matcher = grammar.matcher_at(&tokens).expect("fits");
    assert!(matcher.is_finished());
}

#[test]
fn a_state_is_its_tokens() {
    let env = env();
    let grammar = Grammar::compile(&env, &GrammarSpec::JsonObject).expect("compiles");
    let tokens = env.tokenizer().encode("{\"hello\": [1, 2, {\"a\":", false).expect("encodes");
    let mut here = grammar.matcher();
    for (i, &token) in tokens.iter().enumerate() {
        let mut there = grammar.matcher_at(&tokens[..i]).expect("fits");
        let mut branch = here.clone();
        assert_eq!(here.mask(), there.mask());
        here.accept(token).expect("fits");
        branch.accept(token).expect("fits");
        assert_eq!(here.mask(), branch.mask());
    }
    let token = env.tokenizer().encode("]", false).expect("encodes")[0];
    assert_eq!(here.accept(token), Err(GrammarError::Rejected { token }));
}

#[test]
fn special_tokens_are_no_text() {
    let env = env();
    let grammar = Grammar::compile(&env, &GrammarSpec::Regex("(.|\n)*".to_owned())).expect("ok");
    let mut matcher = grammar.matcher();
    let mask = matcher.mask().expect("a mask");
    for id in 300..312 {
        let ends = env.tokenizer().is_end_of_generation(id);
        assert_eq!(allows(mask, id), ends, "{id}");
    }
}

#[test]
fn hostile_specs_are_refused() {
    let env = env();
    let deep = (0..200).fold(json!({}), |inner, _| json!({"items": inner, "type": "array"}));
    let numbers: Vec<u32> = (0..100_000).collect();
    let specs = [
        GrammarSpec::JsonSchema(deep),
        GrammarSpec::JsonSchema(json!({ "enum": numbers })),
        GrammarSpec::JsonSchema(json!(false)),
        GrammarSpec::JsonSchema(json!([])),
        GrammarSpec::JsonSchema(json!({"type": "nonsense"})),
        GrammarSpec::JsonSchema(json!({"$ref": "#/nowhere"})),
        GrammarSpec::JsonSchema(json!({"$ref": "http://example.com/schema"})),
        GrammarSpec::JsonSchema(json!({"type": "string", "pattern": "(((((a{1000}){1000}){1000}"})),
        GrammarSpec::JsonSchema(json!({"if": {}})),
        GrammarSpec::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 1})),
        GrammarSpec::Regex("(".repeat(10_000)),
        GrammarSpec::Regex("(?=a)b".to_owned()),
        GrammarSpec::Regex("x".repeat(SPEC_BYTES_MAX + 1)),
        GrammarSpec::Lark(String::new()),
        GrammarSpec::Lark("start: missing".to_owned()),
        GrammarSpec::Lark("start: start".to_owned()),
        GrammarSpec::Lark(format!("start: {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000))),
        GrammarSpec::Lark("start: \u{0}".to_owned()),
    ];
    for spec in specs {
        let shown: String = format!("{spec:?}").chars().take(80).collect();
        match Grammar::compile(&env, &spec) {
            Err(GrammarError::Refused(_) | GrammarError::TooLarge { .. }) => {}
            other => panic!("{shown}: {other:?}"),
        }
    }
}

#[test]
fn a_refusal_names_the_keyword() {
    let schema = json!({"type": "object", "properties": {"a": {"not": {"type": "string"}}}});
    let error = Grammar::compile(&env(), &GrammarSpec::JsonSchema(schema)).expect_err("refused");
    assert!(error.to_string().contains("not"), "{error}");
}

#[test]
fn what_is_compiled_lazily_stays_bounded() {
    let env = env();
    let list =
        json!({"type": "array", "items": {"type": "string", "maxLength": 5000}, "maxItems": 900});
    let specs = [
        GrammarSpec::Regex("((a{1000}){1000}){1000}".to_owned()),
        GrammarSpec::Regex("(a|aa|aaa|[a-b]+)*a{2000}".to_owned()),
        GrammarSpec::Lark("start: x\nx: \"a\" x | \"a\" x \"a\" | \"a\" | x x".to_owned()),
        GrammarSpec::JsonSchema(list),
    ];
    for spec in specs {
        let Ok(grammar) = Grammar::compile(&env, &spec) else { continue };
        let mut matcher = grammar.matcher();
        for _ in 0..64 {
            let Ok(mask) = matcher.mask() else { break };
            let Some(token) = (97..300).chain(0..97).find(|&t| allows(mask, t)) else { break };
            matcher.accept(token).expect("the mask has it");
        }
    }
}
