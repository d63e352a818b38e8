//! The HTTP server over the real engine with a small random model: its text means nothing, so what
//! is tested are promises that hold for any weights.

use crate::common::*;
use crate::tiny_model::load;
use engine::model::Architecture;
use node::{Loaded, ModelOptions, Node, NodeOptions};
use serde_json::{Value, json};

async fn tiny_node() -> Node {
    let loader = Box::new(|_: &dyn Fn(f32, &'static str)| {
        let (replica, template, hidden) = load(Architecture::Llama);
        Ok(Loaded::new(replica, template, hidden, "fp_tiny".to_owned()))
    });
    let model = ModelOptions { id: "m".to_owned(), loader };
    start(NodeOptions::new(loopback(), vec![model])).await
}

fn content(body: &Value) -> String {
    body["choices"][0]["message"]["content"].as_str().expect("a content").to_owned()
}

/// A chat that says something different for each number.
fn ask(number: usize, extra: Value) -> Value {
    let text = format!("Tell me about number {number}, please.");
    let messages = json!([{"role": "user", "content": text}]);
    let base = json!({"messages": messages, "temperature": 0, "max_tokens": 24});
    merged(chat(base), extra)
}

#[tokio::test]
async fn an_answer_depends_on_nothing_but_its_request() {
    let node = tiny_node().await;
    let mut alone = Vec::new();
    for i in 0..6 {
        let answer = post(&node, "/v1/chat/completions", &ask(i, json!({}))).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        alone.push(content(&answer.json()));
    }
    assert!(alone.iter().any(|text| *text != alone[0]), "the model says one thing to everything");
    let bodies: Vec<Value> = (0..6).map(|i| ask(i, json!({}))).collect();
    let together = bodies.iter().map(|body| post(&node, "/v1/chat/completions", body));
    let together = futures_util::future::join_all(together).await;
    for (i, answer) in together.iter().enumerate() {
        assert_eq!(content(&answer.json()), alone[i], "request {i} in a batch");
    }
    let streamed = post(&node, "/v1/chat/completions", &ask(2, json!({"stream": true}))).await;
    let mut text = String::new();
    for (_, _, data) in streamed.events().iter().filter(|(_, _, data)| data != "[DONE]") {
        let chunk: Value = serde_json::from_str(data).unwrap();
        text += chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
    }
    assert_eq!(text, alone[2]);
    let seeded = ask(1, json!({"temperature": 1.2, "seed": 5, "n": 3}));
    let first = post(&node, "/v1/chat/completions", &seeded).await.json();
    let again = post(&node, "/v1/chat/completions", &seeded).await.json();
    assert_eq!(first["choices"], again["choices"]);
    assert_ne!(first["choices"][0]["message"], first["choices"][1]["message"]);
}

#[tokio::test]
async fn a_prefix_is_computed_once() {
    let node = tiny_node().await;
    let prompt = "a vine and a wall ".repeat(8);
    let body = json!({"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 4});
    let cold = post(&node, "/v1/completions", &body).await.json();
    let warm = post(&node, "/v1/completions", &body).await.json();
    let cached = |body: &Value| body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached(&cold), Some(0));
    let prompt_tokens = warm["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached(&warm), Some((prompt_tokens - 1) / 16 * 16));
    assert_eq!(cold["choices"], warm["choices"]);
}

#[tokio::test]
async fn log_probabilities_of_answer_and_echo_agree() {
    let node = tiny_node().await;
    let body = json!({"model": "m", "prompt": [10, 20, 30, 40], "temperature": 0, "max_tokens": 8,
                      "logprobs": 2, "echo": true, "ignore_eos": true});
    let columns =
        post(&node, "/v1/completions", &body).await.json()["choices"][0]["logprobs"].clone();
    let logprobs = columns["token_logprobs"].as_array().unwrap();
    assert_eq!((logprobs.len(), &logprobs[0]), (12, &Value::Null));
    for (i, row) in columns["top_logprobs"].as_array().unwrap().iter().enumerate().skip(4) {
        let best = row.as_object().unwrap().values().filter_map(Value::as_f64);
        let best = best.fold(f64::MIN, f64::max);
        assert_eq!(logprobs[i].as_f64(), Some(best), "greedy takes the best token at {i}");
    }
}

#[tokio::test]
async fn clients_that_leave_give_all_blocks_back() {
    let node = tiny_node().await;
    let used = ["grapevine_kv_blocks", "state=\"used\""];
    for round in 0..4 {
        let mut calls = Vec::new();
        for i in 0..8 {
            let body = ask(8 * round + i, json!({"stream": true, "max_tokens": 400})).to_string();
            let path = "/v1/chat/completions";
            let mut call = send(node.address(), "POST", path, "", body.as_bytes()).await;
            if i % 2 == 0 {
                call.read_until("data: ").await;
            }
            calls.push(call);
        }
        drop(calls);
        metric_becomes(&node, &used, 0.0).await;
    }
    metric_becomes(&node, &["grapevine_sequences", "state=\"running\""], 0.0).await;
    metric_becomes(&node, &["grapevine_sequences", "state=\"waiting\""], 0.0).await;
    let answer = post(&node, "/v1/chat/completions", &ask(0, json!({}))).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn what_is_past_its_deadline_gives_all_blocks_back() {
    let node = tiny_node().await;
    let headers = "x-request-timeout-ms: 1\r\n";
    for (path, body) in [
        ("/v1/chat/completions", ask(1, json!({"max_tokens": 400}))),
        ("/v1/chat/completions", ask(2, json!({"max_tokens": 400, "n": 4}))),
        ("/v1/completions", json!({"model": "m", "prompt": ["a", "b"], "max_tokens": 400})),
        ("/v1/embeddings", json!({"model": "m", "input": vec!["a vine"; 200]})),
    ] {
        let body = body.to_string();
        let call = send(node.address(), "POST", path, headers, body.as_bytes()).await;
        let answer = call.finish().await;
        assert_eq!(answer.status, 504, "{path}: {}", answer.body);
        assert_eq!(answer.error().0, "deadline_exceeded");
    }
    metric_becomes(&node, &["grapevine_kv_blocks", "state=\"used\""], 0.0).await;
    metric_becomes(&node, &["grapevine_sequences", "state=\"waiting\""], 0.0).await;
}

#[tokio::test]
async fn embeddings_are_normalised_and_stable() {
    let node = tiny_node().await;
    let body = json!({"model": "m", "input": ["a vine", "a wall", "a vine"]});
    let answer = post(&node, "/v1/embeddings", &body).await.json();
    let vector = |i: usize| -> Vec<f64> {
        let values = answer["data"][i]["embedding"].as_array().unwrap();
        values.iter().filter_map(Value::as_f64).collect()
    };
    assert_eq!(vector(0).len(), 256);
    assert_eq!(vector(0), vector(2));
    assert_ne!(vector(0), vector(1));
    for i in 0..3 {
        let length: f64 = vector(i).iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-4, "{length}");
    }
}

#[tokio::test]
async fn answers_keep_to_their_grammar() {
    let node = tiny_node().await;
    let schema = json!({"type": "object", "required": ["colour", "ok"], "properties": {
        "colour": {"enum": ["red", "blue"]}, "ok": {"type": "boolean"}},
        "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    for temperature in [0.0, 1.5] {
        let extra =
            json!({"response_format": format, "temperature": temperature, "max_tokens": 440});
        let body = post(&node, "/v1/chat/completions", &ask(1, extra)).await.json();
        assert_eq!(body["choices"][0]["finish_reason"], "stop", "{body}");
        let value: Value = serde_json::from_str(&content(&body)).unwrap();
        assert!(value["ok"].is_boolean() && value["colour"].is_string(), "{value}");
    }
    let extra = json!({"grammar": {"type": "regex", "value": "[ab]{3}-[0-9]{2}"}});
    let text = content(&post(&node, "/v1/chat/completions", &ask(1, extra)).await.json());
    assert!(text.len() == 6 && text[..3].bytes().all(|b| matches!(b, b'a' | b'b')), "{text}");
}

#[tokio::test]
async fn a_demanded_call_is_made() {
    let node = tiny_node().await;
    let parameters = json!({"type": "object", "required": ["unit"], "properties": {
        "unit": {"enum": ["c", "f"]}}, "additionalProperties": false});
    let tools = json!([
        {"type": "function", "function": {"name": "heat", "parameters": parameters}},
        {"type": "function", "function": {"name": "stop"}},
    ]);
    let named = json!({"type": "function", "function": {"name": "heat"}});
    for choice in [json!("required"), named.clone()] {
        let extra = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": false,
                           "max_tokens": 300, "temperature": 1});
        let body = post(&node, "/v1/chat/completions", &ask(1, extra)).await.json();
        assert_eq!(body["choices"][0]["finish_reason"], "tool_calls", "{body}");
        let call = &body["choices"][0]["message"]["tool_calls"][0];
        let arguments: Value =
            serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        match call["function"]["name"].as_str() {
            Some("heat") => assert!(arguments["unit"].is_string(), "{call}"),
            Some("stop") if choice != named => assert_eq!(arguments, json!({})),
            other => panic!("{other:?}"),
        }
    }
}
