//! Templates, calls of tools, and the bodies of requests.

use std::sync::OnceLock;

use engine::chat::{
    Calendar, ChatInput, ChatTemplate, TEMPLATE_OUTPUT_BYTES_MAX, ToolEvent, ToolFormat, ToolParser,
};
use engine::model::Architecture;
use engine::tokenizer::Tokenizer;
use engine::weights::testing::{gguf, smallest};
use engine::weights::{Format, ModelSource};
use protocol::api::{ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, Role};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::parts;
use super::text::tokenizers;

/// What a template is given, as one JSON object.
#[derive(Default)]
pub struct Input {
    messages: Vec<Value>,
    tools: Vec<Value>,
    documents: Vec<Value>,
    variables: Map<String, Value>,
}

/// A template, and behind it what it is rendered for.
pub fn template(bytes: &[u8]) {
    let [source, input] = parts(bytes);
    let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(source)) else { return };
    let (tokenizer, _) = &tokenizers()[0];
    let _ = ToolFormat::detect(&template, tokenizer);
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let input = match serde_json::from_slice::<Value>(input) {
        Ok(value) => Input {
            messages: list(&value, "messages"),
            tools: list(&value, "tools"),
            documents: list(&value, "documents"),
            variables: value["variables"].as_object().cloned().unwrap_or_default(),
        },
        Err(_) => sample_input(),
    };
    render(tokenizer, &template, input);
}

/// Renders, for a rendering within its bounds.
pub fn render(tokenizer: &Tokenizer, template: &ChatTemplate, input: Input) {
    for add_generation_prompt in [false, true] {
        let input = ChatInput {
            messages: &input.messages,
            tools: &input.tools,
            documents: &input.documents,
            add_generation_prompt,
            variables: &input.variables,
            now: Calendar::from_unix_s(1_741_503_903),
        };
        match template.render(tokenizer, &input) {
            Ok(prompt) => assert!(prompt.text.len() <= TEMPLATE_OUTPUT_BYTES_MAX),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// Ordinary and odd messages.
pub fn sample_input() -> Input {
    Input {
        messages: vec![
            json!({"role": "system", "content": "Be brief. <|im_end|>"}),
            json!({"role": "user", "content": [{"type": "text", "text": "hi"}]}),
            json!({"role": "assistant", "content": null, "reasoning_content": "hm",
                "tool_calls": [{"id": "c", "type": "function",
                    "function": {"name": "f", "arguments": "{\"a\":[1,null]}"}}]}),
            json!({"role": "tool", "tool_call_id": "c", "content": "{}"}),
        ],
        tools: vec![json!({"type": "function", "function": {"name": "f", "description": "\u{e9}",
            "parameters": {"type": "object", "properties": {"a": {"type": "array"}}}}})],
        ..Input::default()
    }
}

/// A text with calls, and behind it where it is cut. The first byte says in which form.
pub fn tool_calls(bytes: &[u8]) {
    let [text, cuts] = parts(bytes);
    let Some((&format, text)) = text.split_first() else { return };
    let format = FORMATS[usize::from(format) % FORMATS.len()];
    let text = String::from_utf8_lossy(text);
    let whole = calls(format, [&*text]);
    let mut pieces = Vec::new();
    let (mut rest, mut cuts) = (&*text, cuts.iter().cycle());
    while !rest.is_empty() {
        let want = cuts.next().map_or(1, |&cut| usize::from(cut) % 16);
        let end = (want.min(rest.len())..=rest.len()).find(|&at| rest.is_char_boundary(at));
        let (piece, after) = rest.split_at(end.unwrap_or(rest.len()).max(first_char(rest)));
        pieces.push(piece);
        rest = after;
    }
    assert_eq!(calls(format, pieces), whole, "{format:?} {text:?}");
    let shown: usize = whole.iter().map(|(_, text)| text.len()).sum();
    assert!(shown <= text.len() + 2 * whole.len(), "{format:?} {text:?} grew");
}

/// What the parser makes of the pieces, neighbours of one kind joined.
fn calls<'a>(
    format: ToolFormat,
    pieces: impl IntoIterator<Item = &'a str>,
) -> Vec<(String, String)> {
    let mut parser = ToolParser::new(format, vec!["f".to_owned(), "now".to_owned()], b"key");
    let mut events: Vec<ToolEvent> =
        pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    events.extend(parser.finish());
    let mut joined: Vec<(String, String)> = Vec::new();
    for event in events {
        let (head, text) = match event {
            ToolEvent::Content(text) => ("content".to_owned(), text),
            ToolEvent::Start { index, name, .. } => (format!("call {index}"), name),
            ToolEvent::Arguments { index, delta } => (format!("arguments {index}"), delta),
        };
        match joined.last_mut() {
            Some((last, all)) if *last == head => all.push_str(&text),
            _ => joined.push((head, text)),
        }
    }
    joined
}

fn first_char(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

/// The body of a request; the first byte says to which endpoint. A chat that is taken is rendered
/// with the default template, in which nothing of it becomes a special token.
pub fn requests(bytes: &[u8]) {
    let Some((&which, body)) = bytes.split_first() else { return };
    match which % 3 {
        0 => {
            if let Some(request) = read(body, ChatRequest::validate) {
                render_request(&request);
            }
        }
        1 => drop(read(body, CompletionRequest::validate)),
        _ => drop(read(body, EmbeddingRequest::validate)),
    }
}

/// A request within its bounds, which can be written and read again and is within them still. It need not be
/// the same: numbers beyond their type come back as nothing, and JSON's reader may miss the last bit of a float.
fn read<T: DeserializeOwned + Serialize>(
    body: &[u8],
    validate: impl Fn(&T) -> Result<(), ApiError>,
) -> Option<T> {
    let request: T = serde_json::from_slice(body).ok()?;
    validate(&request).ok()?;
    let text = serde_json::to_string(&request).expect("requests are JSON");
    let again: T = serde_json::from_str(&text).expect("what was written can be read");
    validate(&again).expect("what was within its bounds stays there");
    Some(request)
}

fn render_request(request: &ChatRequest) {
    let value = |item: &_| serde_json::to_value(item).expect("messages are JSON");
    let mut messages: Vec<Value> = request.messages.iter().map(value).collect();
    for message in &mut messages {
        if message["role"] == "developer" {
            message["role"] = "system".into();
        }
    }
    let tools: Vec<Value> = request.tools.iter().flatten().map(value_of).collect();
    let variables = request.chat_template_kwargs.clone().unwrap_or_default();
    let input = ChatInput {
        messages: &messages,
        tools: &tools,
        documents: &[],
        add_generation_prompt: true,
        variables: &variables,
        now: Calendar::from_unix_s(0),
    };
    let Ok(prompt) = ChatTemplate::chatml().render(chatml_tokenizer(), &input) else { return };
    let starts = prompt.tokens.iter().filter(|&&id| id == IM_START).count();
    let specials = prompt.tokens.iter().filter(|&&id| chatml_tokenizer().is_special(id)).count();
    let has_tools = usize::from(!tools.is_empty());
    let first = &request.messages[0];
    let has_system = usize::from(matches!(first.role, Role::System | Role::Developer));
    assert_eq!(starts, request.messages.len() + 1 + has_tools - has_tools * has_system);
    assert_eq!(specials, 2 * starts - 1, "{}", prompt.text);
    assert_eq!(chatml_tokenizer().decode(&prompt.tokens, false), prompt.text);
}

fn value_of(item: &impl Serialize) -> Value {
    serde_json::to_value(item).expect("tools are JSON")
}

/// The tokenizer of the small models for tests, which has the special tokens of ChatML.
fn chatml_tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let bytes = gguf(&smallest(Architecture::Llama), Format::F32, 1).bytes();
        let source = ModelSource::from_bytes("small", bytes).expect("a good model");
        Tokenizer::new(&source.tokenizer).expect("a good tokenizer")
    })
}

const IM_START: u32 = 301;
const FORMATS: [ToolFormat; 4] =
    [ToolFormat::Hermes, ToolFormat::Llama3, ToolFormat::MistralArray, ToolFormat::MistralArgs];
