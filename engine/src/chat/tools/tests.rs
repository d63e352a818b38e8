use proptest::prelude::*;

use super::*;

/// The events with neighbouring texts joined, one line each.
fn shown(format: ToolFormat, pieces: &[&str]) -> String {
    let names = vec!["weather".to_owned(), "now".to_owned()];
    let mut parser = ToolParser::new(format, names, b"key");
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut events: Vec<ToolEvent> = pieces.iter().flat_map(|p| parser.push(p)).collect();
    events.extend(parser.finish());
    for event in events {
        let (head, text) = match event {
            ToolEvent::Content(text) => ("text".to_owned(), text),
            ToolEvent::Start { index, name, id } => {
                assert!(id.len() == 9 || id.starts_with("call_"));
                (format!("call {index}"), name)
            }
            ToolEvent::Arguments { index, delta } => (format!("args {index}"), delta),
        };
        match lines.last_mut() {
            Some((last, all)) if *last == head => all.push_str(&text),
            _ => lines.push((head, text)),
        }
    }
    let lines: Vec<String> = lines.into_iter().map(|(h, t)| format!("{h}: {t:?}")).collect();
    lines.join("\n")
}

/// The same whole, byte by byte as far as characters allow, and in odd pieces.
#[track_caller]
fn check(format: ToolFormat, text: &str, expect: &[&str]) {
    let chars: Vec<String> = text.chars().map(String::from).collect();
    let single: Vec<&str> = chars.iter().map(String::as_str).collect();
    let sevens: Vec<String> = chars.chunks(7).map(|c| c.concat()).collect();
    let sevens: Vec<&str> = sevens.iter().map(String::as_str).collect();
    let expect = expect.join("\n");
    assert_eq!(shown(format, &[text]), expect);
    assert_eq!(shown(format, &single), expect, "one character at a time");
    assert_eq!(shown(format, &sevens), expect, "seven at a time");
}

#[test]
fn hermes() {
    let hermes = ToolFormat::Hermes;
    check(hermes, "just text < 3 \n", &[r#"text: "just text < 3 \n""#]);
    check(
        hermes,
        "I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"R}\\\"o\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        &[
            r#"text: "I look.""#,
            r#"call 0: "weather""#,
            r#"args 0: "{\"city\": \"R}\\\"o\"}""#,
            r#"call 1: "now""#,
            r#"args 1: "{}""#,
        ],
    );
    check(
        hermes,
        "<tool_call>{\"arguments\":{\"a\":[1]},\"name\":\"now\",\"x\":{}}</tool_call>done",
        &[r#"call 0: "now""#, r#"args 0: "{\"a\":[1]}""#, r#"text: "done""#],
    );
    check(
        hermes,
        "<tool_call>{\"name\":\"now\",\"arguments\":\"{\\\"a\\\": 1}\"}</tool_call>",
        &[r#"call 0: "now""#, r#"args 0: "{\"a\": 1}""#],
    );
    check(hermes, "<tool_call>{\"name\":\"now\"}", &[r#"call 0: "now""#, r#"args 0: "{}""#]);
    check(hermes, "<tool_call> no é json", &[r#"text: "<tool_call> no é json""#]);
    check(hermes, "a <tool_c", &[r#"text: "a <tool_c""#]);
    check(
        hermes,
        "<tool_call>{\"name\":\"now\",\"arguments\":{\"a\": \"cut",
        &[r#"call 0: "now""#, r#"args 0: "{\"a\": \"cut""#],
    );
}

#[test]
fn llama() {
    let llama = ToolFormat::Llama3;
    check(llama, "Hello {x}", &[r#"text: "Hello {x}""#]);
    check(
        llama,
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\"}}",
        &[r#"call 0: "weather""#, r#"args 0: "{\"city\": \"Rome\"}""#],
    );
    check(
        llama,
        "<|python_tag|>{\"type\": \"function\", \"name\": \"now\", \"parameters\": {}}; {\"name\": \"now\", \"parameters\": {\"b\": 2}}",
        &[r#"call 0: "now""#, r#"args 0: "{}""#, r#"call 1: "now""#, r#"args 1: "{\"b\": 2}""#],
    );
    for text in ["{\"answer\": 42}", "{\"name\": \"unknown\", \"parameters\": {}}", "{", "\n {é"] {
        check(llama, text, &[&format!("text: {text:?}")]);
    }
}

#[test]
fn mistral() {
    check(
        ToolFormat::MistralArray,
        "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"é\"}}, {\"name\": \"now\", \"arguments\": {}}]",
        &[
            r#"call 0: "weather""#,
            r#"args 0: "{\"city\": \"é\"}""#,
            r#"call 1: "now""#,
            r#"args 1: "{}""#,
        ],
    );
    check(
        ToolFormat::MistralArgs,
        "ok [TOOL_CALLS]weather[ARGS]{\"city\": \"x\"}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}",
        &[
            r#"text: "ok""#,
            r#"call 0: "weather""#,
            r#"args 0: "{\"city\": \"x\"}""#,
            r#"call 1: "now""#,
            r#"args 1: "{}""#,
        ],
    );
    check(
        ToolFormat::MistralArgs,
        "[TOOL_CALLS] what is é this?",
        &[r#"text: "[TOOL_CALLS] what is é this?""#],
    );
}

#[test]
fn ids_repeat_with_their_key_only() {
    let call = "<tool_call>{\"name\":\"now\"}</tool_call>";
    let id =
        |key: &[u8]| match ToolParser::new(ToolFormat::Hermes, vec![], key).push(call).remove(0) {
            ToolEvent::Start { id, .. } => id,
            other => panic!("{other:?}"),
        };
    assert_eq!(id(b"a"), id(b"a"));
    assert_ne!(id(b"a"), id(b"b"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn pieces_do_not_matter(
        parts in prop::collection::vec(
            prop::sample::select(vec![
                "<tool_call>", "</tool_call>", "{", "}", "\"name\"", ":", "\"now\"", ",", "[",
                "\"arguments\"", "\"parameters\"", "[TOOL_CALLS]", "[ARGS]", "now", "]", ";", "é",
                " ", "\n", "\\", "\"", "<|python_tag|>", "<", "1", "{\"name\":\"now\",\"arguments\":",
            ]),
            0..24,
        )
    ) {
        let text = parts.concat();
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let single: Vec<&str> = chars.iter().map(String::as_str).collect();
        for format in [
            ToolFormat::Hermes, ToolFormat::Llama3, ToolFormat::MistralArray, ToolFormat::MistralArgs,
        ] {
            prop_assert_eq!(shown(format, &[&text]), shown(format, &single));
        }
    }
}
