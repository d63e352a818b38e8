//! A stream that goes on elsewhere is the stream that would have been, byte for byte, wherever it was cut.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use engine::model::Architecture;
use http_body_util::BodyExt;
use protocol::forward::Endpoint;
use protocol::journal::{self, Entry};
use protocol::{RequestId, TenantId};
use serde_json::{Value, json};

use super::{Caller, Journal, RequestLog};
use crate::{Loaded, ModelOptions, Node, NodeOptions};

#[path = "../../tests/api/tiny_model.rs"]
mod tiny_model;

async fn node() -> Node {
    let loader = |_: &dyn Fn(f32, &'static str)| {
        let (replica, template, hidden) = tiny_model::load(Architecture::Llama);
        Ok(Loaded::new(replica, template, hidden, "fp_tiny".to_owned()))
    };
    let model = ModelOptions { id: "m".to_owned(), loader: Box::new(loader) };
    let node = crate::serve(NodeOptions::new(([127, 0, 0, 1], 0).into(), vec![model])).await;
    let node = node.expect("the node starts");
    node.ready().await.expect("its model loads");
    node
}

/// A streamed answer: its events from `first_event` on, and what it writes down after `before`.
async fn answer(
    node: &Node,
    endpoint: Endpoint,
    body: &Value,
    before: &[Entry],
    first_event: u64,
) -> (Vec<String>, Vec<Entry>) {
    // As it travels.
    let before = match before {
        [] => Vec::new(),
        before => journal::from_bytes(&journal::to_bytes(before)).expect("a journal"),
    };
    let journal = Arc::new(Journal::new(before, first_event));
    let caller = caller(node, journal.clone());
    let bytes = body.to_string().into();
    let response = super::answer_here(node.app.clone(), endpoint, bytes, caller).await;
    let is_well = response.status().is_success();
    let mut body: Body = response.into_body();
    let (mut text, mut entries) = (String::new(), Vec::new());
    while let Some(frame) = body.frame().await {
        let data = frame.expect("bodies do not fail").into_data().expect("data");
        assert!(is_well, "{}", String::from_utf8_lossy(&data));
        let part = journal.part(data);
        text += std::str::from_utf8(&part.text).expect("text");
        entries.extend(part.entries);
    }
    let mut events = Vec::new();
    for (event, number) in text.split_terminator("\n\n").zip(first_event..) {
        let (id, data) = event.split_once("\ndata: ").expect("an id and data");
        assert_eq!(id, format!("id: {REQUEST}:{number}"), "events are counted through");
        events.push(data.to_owned());
    }
    (events, entries)
}

fn caller(node: &Node, journal: Arc<Journal>) -> Caller {
    Caller {
        tenant: TenantId::local(),
        log: RequestLog::new(REQUEST, "POST", "/", None, &node.app),
        deadline: Instant::now() + Duration::from_secs(60),
        created: 1_700_000_000,
        journal: Some(journal),
    }
}

const REQUEST: RequestId = RequestId(0xabc000);

/// The events of each choice in their order, and those of none: which choice comes first in a step is
/// not promised.
fn by_choice(events: &[String]) -> BTreeMap<Option<u64>, Vec<&str>> {
    let mut choices: BTreeMap<_, Vec<&str>> = BTreeMap::new();
    for event in events {
        let json: Value = serde_json::from_str(event).unwrap_or_default();
        choices.entry(json["choices"][0]["index"].as_u64()).or_default().push(event);
    }
    choices
}

/// Cuts the stream after each entry of its journal.
async fn survives(what: &str, endpoint: Endpoint, body: Value) {
    // A replica of its own, so that nothing comes from the other's cache.
    let (first, second) = (node().await, node().await);
    let body = merged(
        json!({"model": "m", "stream": true, "max_tokens": 24,
                             "stream_options": {"include_usage": true}}),
        body,
    );
    let (events, entries) = answer(&first, endpoint, &body, &[], 0).await;
    assert!(entries.len() > 4, "{what}: {events:?}");
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{what}");
    let choices = by_choice(&events).keys().flatten().count();
    for cut in 0..=entries.len() {
        let (before, after) = entries.split_at(cut);
        let (again, written) = answer(&second, endpoint, &body, before, 0).await;
        assert_eq!(by_choice(&again), by_choice(&events), "{what}, cut after entry {cut}");
        // What is written down goes on, too, for the next that may be needed.
        assert_eq!(written.len(), after.len(), "{what}, journal after entry {cut}");
        // Before anything is written down it is this replica's cache that the usage tells of.
        if choices == 1 && cut > 0 {
            assert_eq!(written, after, "{what}, journal after entry {cut}");
            // Whatever the client has seen, less or more than is written down.
            let seen = (cut * 7) % (events.len() + 1);
            let (rest, _) = answer(&second, endpoint, &body, before, seen as u64).await;
            assert_eq!(rest, events[seen..], "{what}, cut after entry {cut}, {seen} events seen");
        }
    }
}

fn merged(mut body: Value, extra: Value) -> Value {
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

fn chat(extra: Value) -> Value {
    merged(json!({"messages": [{"role": "user", "content": "Tell me about number 7."}]}), extra)
}

#[tokio::test]
async fn greedy_and_sampled() {
    let ask = |extra| merged(json!({"prompt": [10, 20, 30, 40], "ignore_eos": true}), extra);
    survives("greedy", Endpoint::Completions, ask(json!({"temperature": 0}))).await;
    // Keyed by the request's id, which is the same wherever it runs.
    survives("drawn", Endpoint::Completions, ask(json!({"temperature": 1.3}))).await;
    let extra = json!({"temperature": 1.1, "seed": 5, "n": 3, "logprobs": true, "top_logprobs": 2,
                       "frequency_penalty": 0.7, "presence_penalty": 0.3});
    survives("three choices", Endpoint::Chat, chat(extra)).await;
}

#[tokio::test]
async fn structured_output_and_tools() {
    let schema = json!({"type": "object", "required": ["ok", "colour"],
        "properties": {"ok": {"type": "boolean"}, "colour": {"enum": ["red", "green"]}},
        "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    let extra = json!({"response_format": format, "temperature": 1.0, "max_tokens": 200});
    survives("json schema", Endpoint::Chat, chat(extra)).await;
    let parameters = json!({"type": "object", "required": ["unit"], "properties": {
        "unit": {"enum": ["c", "f"]}}, "additionalProperties": false});
    let tools = json!([{"type": "function",
                        "function": {"name": "heat", "parameters": parameters}}]);
    let extra = json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false,
                       "temperature": 1, "max_tokens": 200});
    survives("tools", Endpoint::Chat, chat(extra)).await;
}

#[tokio::test]
async fn completions() {
    let body = json!({"prompt": [[10, 20, 30], [40, 50, 60, 70]], "n": 2, "temperature": 0.9,
                      "seed": 1, "echo": true, "logprobs": 1, "max_tokens": 9});
    survives("two prompts", Endpoint::Completions, body).await;
    let ask =
        |extra| merged(json!({"prompt": [10, 20, 30, 40], "temperature": 1.3, "seed": 2}), extra);
    let node = node().await;
    let plain = merged(ask(json!({})), json!({"model": "m", "stream": true, "max_tokens": 24}));
    let (plain, _) = answer(&node, Endpoint::Completions, &plain, &[], 0).await;
    // A stop string out of the answer's middle, over the border of two tokens.
    let said: String = plain
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    let chars: Vec<char> = said.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 4].iter().collect();
    survives("stop string", Endpoint::Completions, ask(json!({"stop": [stop]}))).await;
}

#[tokio::test]
async fn a_journal_of_another_request_is_refused() {
    let node = node().await;
    let body =
        chat(json!({"model": "m", "stream": true, "max_tokens": 5, "n": 3, "temperature": 0}));
    let (_, three) = answer(&node, Endpoint::Chat, &body, &[], 0).await;
    let caller = caller(&node, Arc::new(Journal::new(three, 1)));
    let bytes = merged(body, json!({"n": 1})).to_string().into();
    let answer = super::answer_here(node.app.clone(), Endpoint::Chat, bytes, caller).await;
    assert_eq!(answer.status(), 500);
}
