//! From a spec to llguidance's parser, bounded.

use std::fmt::Write as _;

use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value, json};

use super::{
    ENUM_VALUES_MAX, GrammarError, GrammarSpec, SCHEMA_DEPTH_MAX, SPEC_BYTES_MAX, TokenizerEnv,
    ToolGrammar, first_line,
};
use crate::chat::ToolFormat;

pub(super) fn compile(
    env: &TokenizerEnv,
    spec: &GrammarSpec,
) -> Result<llguidance::Matcher, GrammarError> {
    let grammar = top_level(env, spec)?;
    let factory = env.factory();
    // llguidance descends recursively through grammars and expressions and asserts in places:
    // both end here instead of in the thread of the caller
    let compiled = std::thread::Builder::new()
        .name("grammar-compile".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let mut matcher = llguidance::Matcher::new(factory.create_parser(grammar));
            match matcher.get_error() {
                Some(error) => Err(error),
                // the first mask shows whether any token can begin the text
                None => matcher.compute_mask_or_eos().map_err(|e| e.to_string()).and_then(|mask| {
                    let dead = "no text of this vocabulary can match".to_owned();
                    if mask.is_zero() { Err(dead) } else { Ok(matcher) }
                }),
            }
        })
        .map_err(|e| GrammarError::Broken(format!("no thread for compiling: {e}")))?
        .join();
    match compiled {
        Ok(Ok(matcher)) => Ok(matcher),
        Ok(Err(reason)) => Err(GrammarError::Refused(first_line(&reason))),
        Err(_) => Err(GrammarError::Refused("it is inconsistent".to_owned())),
    }
}

fn top_level(env: &TokenizerEnv, spec: &GrammarSpec) -> Result<TopLevelGrammar, GrammarError> {
    match spec {
        GrammarSpec::JsonObject => Ok(TopLevelGrammar::from_json_schema(loose(&json!({
            "type": "object"
        })))),
        GrammarSpec::JsonSchema(schema) => {
            check_schema(schema)?;
            Ok(TopLevelGrammar::from_json_schema(loose(schema)))
        }
        GrammarSpec::Lark(text) => {
            check_text("the grammar", text)?;
            Ok(TopLevelGrammar::from_lark(text.clone()))
        }
        GrammarSpec::Regex(text) => {
            check_text("the regular expression", text)?;
            Ok(TopLevelGrammar::from_regex(text))
        }
        GrammarSpec::ToolCalls(calls) => Ok(TopLevelGrammar::from_lark(tool_calls(env, calls)?)),
    }
}

fn check_text(what: &'static str, text: &str) -> Result<(), GrammarError> {
    let size = text.len();
    if size > SPEC_BYTES_MAX {
        return Err(GrammarError::TooLarge { what, size, limit: SPEC_BYTES_MAX });
    }
    Ok(())
}

fn check_schema(schema: &Value) -> Result<(), GrammarError> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err(GrammarError::Refused("a schema is an object or a boolean".to_owned()));
    }
    let (mut depth, mut values) = (0, 0);
    measure(schema, 1, &mut depth, &mut values);
    let bounds = [
        ("nesting of the schema", depth, SCHEMA_DEPTH_MAX),
        ("number of enum values", values, ENUM_VALUES_MAX),
    ];
    for (what, size, limit) in bounds {
        if size > limit {
            return Err(GrammarError::TooLarge { what, size, limit });
        }
    }
    check_text("the schema", &schema.to_string())
}

/// Recursion stops one level above the limit.
fn measure(value: &Value, depth: usize, deepest: &mut usize, enum_values: &mut usize) {
    *deepest = depth.max(*deepest);
    if depth > SCHEMA_DEPTH_MAX {
        return;
    }
    match value {
        Value::Array(items) => {
            items.iter().for_each(|item| measure(item, depth + 1, deepest, enum_values));
        }
        Value::Object(fields) => {
            for (key, item) in fields {
                if key == "enum" {
                    *enum_values += item.as_array().map_or(0, Vec::len);
                }
                measure(item, depth + 1, deepest, enum_values);
            }
        }
        _ => {}
    }
}

/// With room for indentation as models write it, but not for one that writes spaces for ever.
fn loose(schema: &Value) -> Value {
    with_options(schema, json!({ "whitespace_pattern": WHITESPACE }))
}

/// As Python's `json.dumps` writes it, which is what models saw in their templates.
fn tight(schema: &Value) -> Value {
    let options = json!({
        "item_separator": ", ",
        "key_separator": ": ",
        "whitespace_flexible": false,
    });
    with_options(schema, options)
}

fn with_options(schema: &Value, options: Value) -> Value {
    let mut fields = match schema {
        Value::Object(fields) => fields.clone(),
        Value::Bool(false) => Map::from_iter([("not".to_owned(), json!({}))]),
        _ => Map::new(),
    };
    // a caller's own options would undo the bounds
    fields.insert("x-guidance".to_owned(), options);
    Value::Object(fields)
}

/// The Lark text of one or more calls.
fn tool_calls(env: &TokenizerEnv, calls: &ToolGrammar) -> Result<String, GrammarError> {
    if calls.tools.is_empty() {
        return Err(GrammarError::Refused("there is no tool to call".to_owned()));
    }
    let marker = |text: &str| match env.tokenizer().special_id(text) {
        Some(id) => format!("<[{id}]>"),
        None => Value::from(text).to_string(),
    };
    let text = |text: &str| Value::from(text).to_string();
    let (start, one) = match calls.format {
        ToolFormat::Hermes => {
            let (open, close) = (marker("<tool_call>"), marker("</tool_call>"));
            let wrapped = format!("{open} \"\\n\" call \"\\n\" {close}");
            let many = format!("wrapped (\"\\n\" wrapped){{0,{}}}", CALLS_MAX - 1);
            let start = if calls.parallel { many } else { "wrapped".to_owned() };
            (format!("start: {start}\nwrapped: {wrapped}\n"), ("name", "arguments"))
        }
        ToolFormat::Llama3 => {
            let many = format!("call (\"; \" call){{0,{}}}", CALLS_MAX - 1);
            let start = if calls.parallel { many } else { "call".to_owned() };
            (format!("start: {start}\n"), ("name", "parameters"))
        }
        ToolFormat::MistralArray => {
            let open = marker("[TOOL_CALLS]");
            let more = if calls.parallel { CALLS_MAX - 1 } else { 0 };
            let list = format!("call (\", \" call){{0,{more}}}");
            (format!("start: {open} \"[\" {list} \"]\"\n"), ("name", "arguments"))
        }
        ToolFormat::MistralArgs => {
            let more = if calls.parallel { CALLS_MAX } else { 1 };
            (format!("start: call{{1,{more}}}\n"), ("", ""))
        }
    };
    let mut lark = start;
    let choices: Vec<String> = (0..calls.tools.len()).map(|i| format!("call_{i}")).collect();
    let _ = writeln!(lark, "call: {}", choices.join(" | "));
    for (i, (name, schema)) in calls.tools.iter().enumerate() {
        let schema = arguments_schema(schema);
        check_schema(&schema)?;
        let (before, after) = if calls.format == ToolFormat::MistralArgs {
            let (open, middle) = (marker("[TOOL_CALLS]"), marker("[ARGS]"));
            (format!("{open} {} {middle}", text(name)), String::new())
        } else {
            let head = format!("{{\"{}\": {}, \"{}\": ", one.0, text(name), one.1);
            (text(&head), text("}"))
        };
        let arguments = tight(&schema);
        let _ = writeln!(lark, "call_{i}: {before} args_{i} {after}\nargs_{i}: %json {arguments}");
    }
    Ok(lark)
}

/// A call has an object of arguments, also when the tool does not say so.
fn arguments_schema(schema: &Value) -> Value {
    let mut schema = schema.clone();
    match schema.as_object_mut() {
        Some(fields) if !fields.is_empty() => {
            let composed =
                ["type", "$ref", "anyOf", "allOf", "oneOf"].iter().any(|k| fields.contains_key(*k));
            if !composed {
                fields.insert("type".to_owned(), "object".into());
            }
            schema
        }
        _ => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
    }
}

/// Enough for the deepest text within [`SPEC_BYTES_MAX`]; only what is used takes memory.
const STACK_BYTES: usize = 256 << 20;
/// Between two tokens of JSON: one space, or one line break with an indentation of spaces or tabs.
/// Everything that models write when they are free fits: compact, `json.dumps`, pretty-printed.
const WHITESPACE: &str = r"\x20|\r?\n(\x20{0,64}|\t{0,32})";
/// Calls in one answer.
const CALLS_MAX: usize = 32;
