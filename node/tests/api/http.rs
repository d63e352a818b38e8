//! The HTTP server over a scripted replica: requests good and bad, streams, keys, draining.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::*;
use node::{ApiKeys, HttpLimits, ModelOptions, Node, NodeOptions, ServeError};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

#[tokio::test]
async fn chat_answers_in_openai_shape() {
    let node = start(options(&Arc::default())).await;
    let answer = post(&node, "/v1/chat/completions", &chat(json!({"n": 2}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "m");
    assert_eq!(body["system_fingerprint"], "fp_test");
    for index in 0..2 {
        let choice = &body["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(
            choice["message"],
            json!({"role": "assistant", "content": "one two",
                                             "refusal": null})
        );
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(choice["logprobs"], Value::Null);
    }
    let usage = &body["usage"];
    assert_eq!(usage["completion_tokens"], 14);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 1);
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"].as_u64().unwrap(), prompt + 14);
    let id = &answer.headers["x-request-id"];
    assert!(id.starts_with("req-") && id.len() == 36, "{id}");
    assert_eq!(body["id"], format!("chatcmpl-{}", &id[4..]));
}

#[tokio::test]
async fn good_requests() {
    let node = start(options(&Arc::default())).await;
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
    let bodies = [
        chat(json!({"unknown": {"field": 1}, "temperature": null})),
        chat(json!({"temperature": 2, "top_p": 0.1, "top_k": 3, "min_p": 0.5, "seed": -4})),
        chat(json!({"repetition_penalty": 1.2, "presence_penalty": -2, "frequency_penalty": 2})),
        chat(json!({"logit_bias": {"5": -100}, "user": "u", "priority": 3})),
        chat(json!({"stop": "x", "max_completion_tokens": 2})),
        chat(json!({"tools": [tool], "tool_choice": "none"})),
        chat(
            json!({"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]},
                                 {"role": "user", "content": "b", "name": "n"}]}),
        ),
        chat(json!({"response_format": {"type": "text"}, "chat_template_kwargs": {"x": true}})),
    ];
    for body in bodies {
        let answer = post(&node, "/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 200, "{body}: {}", answer.body);
    }
    let limit = chat(json!({"max_tokens": 5, "max_completion_tokens": 2}));
    let answer = post(&node, "/v1/chat/completions", &limit).await;
    assert_eq!(answer.json()["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let node = start(options(&Arc::default())).await;
    let long = "x".repeat(CONTEXT + 1);
    for (path, body, status, code, param) in [
        ("chat/completions", chat(json!({"temperature": -1})), 400, "invalid_value", "temperature"),
        (
            "chat/completions",
            chat(json!({"temperature": "hot"})),
            400,
            "invalid_type",
            "temperature",
        ),
        ("chat/completions", chat(json!({"top_p": 0})), 400, "invalid_value", "top_p"),
        ("chat/completions", chat(json!({"n": 0})), 400, "invalid_value", "n"),
        ("chat/completions", chat(json!({"n": -1})), 400, "invalid_value", "n"),
        ("chat/completions", chat(json!({"n": 2.5})), 400, "invalid_type", "n"),
        ("chat/completions", chat(json!({"max_tokens": 0})), 400, "invalid_value", "max_tokens"),
        (
            "chat/completions",
            chat(json!({"top_logprobs": 2})),
            400,
            "invalid_value",
            "top_logprobs",
        ),
        ("chat/completions", chat(json!({"messages": []})), 400, "invalid_value", "messages"),
        (
            "chat/completions",
            chat(json!({"logit_bias": {"259": 1}})),
            400,
            "invalid_value",
            "logit_bias",
        ),
        ("chat/completions", chat(json!({"model": "nope"})), 404, "model_not_found", "model"),
        (
            "chat/completions",
            chat(json!({"grammar": {"type": "regex", "value": "(["}})),
            400,
            "invalid_grammar",
            "grammar",
        ),
        (
            "chat/completions",
            chat(json!({"tools": [{"type": "function", "function": {"name": "f"}}],
         "tool_choice": "required", "response_format": {"type": "json_object"}})),
            400,
            "invalid_value",
            "tool_choice",
        ),
        ("chat/completions", json!({"model": "m"}), 400, "missing_required_parameter", "messages"),
        (
            "chat/completions",
            chat(json!({"messages": [{"role": "user", "content": long}]})),
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            "completions",
            json!({"model": "m", "prompt": "a", "suffix": "b"}),
            400,
            "unsupported_parameter",
            "suffix",
        ),
        (
            "completions",
            json!({"model": "m", "prompt": "a", "best_of": 2}),
            400,
            "unsupported_parameter",
            "best_of",
        ),
        ("completions", json!({"model": "m", "prompt": [1, "a"]}), 400, "invalid_value", "prompt"),
        ("completions", json!({"model": "m", "prompt": ""}), 400, "invalid_value", "prompt"),
        ("embeddings", json!({"model": "m", "input": []}), 400, "invalid_value", "input"),
        (
            "embeddings",
            json!({"model": "m", "input": "a", "dimensions": 3}),
            400,
            "invalid_value",
            "dimensions",
        ),
        (
            "embeddings",
            json!({"model": "m", "input": "a", "encoding_format": "hex"}),
            400,
            "invalid_value",
            "encoding_format",
        ),
    ] {
        let answer = post(&node, &format!("/v1/{path}"), &body).await;
        let error = answer.error();
        let short: String = body.to_string().chars().take(200).collect();
        assert_eq!(answer.status, status, "{short}: {}", answer.body);
        assert_eq!(error, (code.to_owned(), Some(param.to_owned())), "{short}");
        assert!(answer.headers.contains_key("x-request-id"));
        assert_eq!(answer.headers["content-type"], "application/json");
    }
    let answer = post(&node, "/v1/chat/completions", &chat(json!({"model": "nope"}))).await;
    assert!(answer.body.contains("there is: m"), "{}", answer.body);
}

#[tokio::test]
async fn bad_http_has_the_same_shape() {
    let limits = HttpLimits {
        body_bytes_max: 100,
        body_timeout: Duration::from_millis(20),
        ..HttpLimits::default()
    };
    let node = start(NodeOptions { http: limits, ..options(&Arc::default()) }).await;
    let path = "/v1/chat/completions";
    let large = vec![b' '; 200];
    for (method, path, headers, body, status, code) in [
        ("GET", "/nothing", "", &b""[..], 404, "not_found"),
        ("GET", path, "", b"", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", "", b"", 405, "method_not_allowed"),
        ("GET", "/v1/models/x/y", "", b"", 404, "model_not_found"),
        ("POST", path, "", b"{\"model\":\n oops", 400, "invalid_json"),
        ("POST", path, "", b"[]", 400, "invalid_type"),
        ("POST", path, "content-type: text/plain\r\n", b"{}", 415, "unsupported_media_type"),
        ("POST", path, "", &large, 413, "request_too_large"),
        ("POST", path, "content-length: 50\r\n", b"{", 408, "request_timeout"),
        ("POST", path, "host: evil.example\r\n", b"{}", 403, "origin_not_allowed"),
        ("POST", path, "origin: http://evil.example\r\n", b"{}", 403, "origin_not_allowed"),
        (
            "POST",
            path,
            "origin: http://localhost:3000\r\n",
            b"{}",
            400,
            "missing_required_parameter",
        ),
    ] {
        let answer = send(node.address(), method, path, headers, body).await.finish().await;
        let error = answer.error();
        assert_eq!((answer.status, error.0.as_str()), (status, code), "{method} {path} {headers}");
        assert!(answer.headers.contains_key("x-request-id"), "{method} {path}");
    }
    let answer = send(node.address(), "POST", path, "", b"{\"model\":\n oops").await.finish().await;
    assert!(answer.body.contains("line 2 column"), "{}", answer.body);
}

#[tokio::test]
async fn a_stream_is_framed_as_openai_does() {
    let node = start(options(&Arc::default())).await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let answer = post(&node, "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].starts_with("text/event-stream"));
    let request = &answer.headers["x-request-id"];
    let events = answer.events();
    let ids: Vec<&str> = events.iter().map(|(_, id, _)| id.as_str()).collect();
    let numbered: Vec<String> = (0..11).map(|i| format!("{request}:{i}")).collect();
    assert_eq!(ids, numbered);
    assert_eq!(events.last().unwrap().2, "[DONE]");
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|(_, _, data)| serde_json::from_str(data).unwrap())
        .collect();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "one two");
    assert_eq!(chunks[8]["choices"][0]["finish_reason"], "length");
    assert_eq!(chunks[8]["choices"][0]["delta"], json!({}));
    assert!(chunks[..9].iter().all(|c| c.get("usage").is_none_or(Value::is_null)));
    assert_eq!(chunks[9]["choices"], json!([]));
    assert_eq!(chunks[9]["usage"]["completion_tokens"], 7);
}

#[tokio::test]
async fn logprobs_travel_with_their_text() {
    let node = start(options(&Arc::default())).await;
    let extra = json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 3});
    let body = post(&node, "/v1/chat/completions", &chat(extra)).await.json();
    let content = &body["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 3);
    assert_eq!(
        content[0],
        json!({"token": "o", "logprob": -0.5, "bytes": [111], "top_logprobs": [
            {"token": "o", "logprob": -0.5, "bytes": [111]},
            {"token": "p", "logprob": -1.5, "bytes": [112]}]})
    );
    let body = json!({"model": "m", "prompt": "ab", "echo": true, "logprobs": 1, "max_tokens": 2});
    let choice = post(&node, "/v1/completions", &body).await.json()["choices"][0].clone();
    assert_eq!(choice["text"], "abon");
    let columns = &choice["logprobs"];
    // the begin-of-sequence token comes first
    assert_eq!(columns["tokens"], json!(["<s>", "a", "b", "o", "n"]));
    assert_eq!(columns["token_logprobs"], json!([null, -0.5, -0.5, -0.5, -0.5]));
    assert_eq!(columns["top_logprobs"][0], Value::Null);
    assert_eq!(columns["text_offset"].as_array().unwrap().len(), 5);
}

#[tokio::test]
async fn calls_are_read_from_the_text() {
    let control = Arc::<Control>::default();
    let two = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
               <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
    *control.once.lock().unwrap() = Some(two);
    let node = start(options(&control)).await;
    let tool = |name| json!({"type": "function", "function": {"name": name}});
    let extra = json!({"tools": [tool("f"), tool("g")], "max_tokens": 500});
    let calls = |body: &Value| -> Vec<(String, String)> {
        let calls = body["choices"][0]["message"]["tool_calls"].as_array().unwrap();
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let call = |c: &Value| (text(&c["function"]["name"]), text(&c["function"]["arguments"]));
        calls.iter().map(call).collect()
    };
    let body = post(&node, "/v1/chat/completions", &chat(extra.clone())).await.json();
    assert_eq!(body["choices"][0]["finish_reason"], "tool_calls", "{body}");
    assert_eq!(body["choices"][0]["message"]["content"], "Let me see.");
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(calls(&body), [pair("f", "{\"x\": 1}"), pair("g", "{}")]);

    let one = merged(extra.clone(), json!({"parallel_tool_calls": false}));
    let body = post(&node, "/v1/chat/completions", &chat(one)).await.json();
    assert_eq!(calls(&body), [pair("f", "{\"x\": 1}")]);

    // a stream says the same in pieces
    let streamed = merged(extra.clone(), json!({"stream": true}));
    let answer = post(&node, "/v1/chat/completions", &chat(streamed)).await;
    let (mut names, mut arguments) = (Vec::new(), vec![String::new(), String::new()]);
    for (_, _, data) in answer.events().iter().filter(|(_, _, data)| data != "[DONE]") {
        let chunk: Value = serde_json::from_str(data).unwrap();
        let deltas = chunk["choices"][0]["delta"]["tool_calls"].as_array();
        for delta in deltas.into_iter().flatten() {
            if let Some(name) = delta["function"]["name"].as_str() {
                assert!(delta["id"].is_string() && delta["type"] == "function", "{delta}");
                names.push(name.to_owned());
            }
            let index = delta["index"].as_u64().unwrap() as usize;
            arguments[index] += delta["function"]["arguments"].as_str().unwrap_or_default();
        }
    }
    assert_eq!(
        (names, arguments),
        (vec!["f".into(), "g".into()], vec!["{\"x\": 1}".into(), "{}".into()])
    );

    // without tools on offer it is text
    let none = merged(extra, json!({"tool_choice": "none"}));
    let body = post(&node, "/v1/chat/completions", &chat(none)).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], two);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn completions_take_every_kind_of_prompt() {
    let node = start(options(&Arc::default())).await;
    for (prompt, n, choices, prompt_tokens) in [
        (json!("ab"), 1, 1, 3),
        (json!(["ab", "c"]), 2, 4, 5),
        (json!([5, 6, 7]), 1, 1, 3),
        (json!([[5], [6, 7]]), 1, 2, 3),
    ] {
        let body = json!({"model": "m", "prompt": prompt, "n": n, "best_of": n, "max_tokens": 3});
        let answer = post(&node, "/v1/completions", &body).await.json();
        let got = answer["choices"].as_array().unwrap();
        assert_eq!(got.len(), choices, "{prompt}");
        for (i, choice) in got.iter().enumerate() {
            assert_eq!((&choice["index"], &choice["text"]), (&json!(i), &json!("one")), "{prompt}");
        }
        assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens, "{prompt}");
        assert_eq!(answer["usage"]["completion_tokens"], 3 * choices, "{prompt}");
    }
    let body = json!({"model": "m", "prompt": "a"});
    let answer = post(&node, "/v1/completions", &body).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 16, "OpenAI's default");
    let body = json!({"model": "m", "prompt": "ab", "max_tokens": 0, "echo": true});
    let answer = post(&node, "/v1/completions", &body).await.json();
    assert_eq!(answer["choices"][0]["text"], "ab");
}

#[tokio::test]
async fn embeddings_in_both_formats() {
    let node = start(options(&Arc::default())).await;
    let body = json!({"model": "m", "input": ["a", "b"], "dimensions": 2});
    let answer = post(&node, "/v1/embeddings", &body).await.json();
    assert_eq!(answer["object"], "list");
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    for i in 0..2 {
        assert_eq!(answer["data"][i]["index"], i);
        assert_eq!(answer["data"][i]["embedding"].as_array().unwrap().len(), 2);
    }
    let body = json!({"model": "m", "input": [1], "encoding_format": "base64"});
    let answer = post(&node, "/v1/embeddings", &body).await.json();
    assert_eq!(answer["data"][0]["embedding"].as_str().unwrap().len(), 12);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_blocks() {
    let control = Arc::<Control>::default();
    control.hold.store(true, Ordering::SeqCst);
    let node = start(options(&control)).await;
    let used = ["grapevine_kv_blocks", "state=\"used\""];
    for stream in [true, false] {
        let body = chat(json!({"stream": stream, "max_tokens": 1000})).to_string();
        let mut call =
            send(node.address(), "POST", "/v1/chat/completions", "", body.as_bytes()).await;
        if stream {
            call.read_until("\"content\":\"n\"").await;
        }
        metric_becomes(&node, &used, 1.0).await;
        drop(call);
        metric_becomes(&node, &used, 0.0).await;
    }
    let code = ["grapevine_http_requests_total", "code=\"cancelled\""];
    metric_becomes(&node, &[code[0], code[1], "status=\"200\""], 1.0).await;
    metric_becomes(&node, &[code[0], code[1], "status=\"499\""], 1.0).await;
}

#[tokio::test]
async fn what_fails_before_its_first_token_has_a_status() {
    let node = start(options(&Arc::default())).await;
    for stream in [true, false] {
        let messages = json!([{"role": "user", "content": BROKEN}]);
        let chat = chat(json!({"messages": messages, "stream": stream}));
        let text = json!({"model": "m", "prompt": BROKEN, "stream": stream});
        for (path, body) in [("/v1/chat/completions", chat), ("/v1/completions", text)] {
            let answer = post(&node, path, &body).await;
            assert_eq!(answer.status, 400, "{path}: {}", answer.body);
            assert_eq!(answer.error().0, "invalid_grammar");
        }
    }
}

#[tokio::test]
async fn a_request_ends_at_its_deadline() {
    let control = Arc::<Control>::default();
    control.hold.store(true, Ordering::SeqCst);
    let path = "/v1/chat/completions";
    let ask = async |node: &Node, headers: &str, stream: bool| {
        let body = chat(json!({"stream": stream, "max_tokens": 1000})).to_string();
        send(node.address(), "POST", path, headers, body.as_bytes()).await.finish().await
    };
    let node = start(options(&control)).await;
    let short = "x-request-timeout-ms: 60\r\n";
    let answer = ask(&node, short, false).await;
    assert_eq!((answer.status, answer.error().0.as_str()), (504, "deadline_exceeded"));
    let answer = ask(&node, short, true).await;
    assert_eq!(answer.status, 200, "it had begun: {}", answer.body);
    assert!(answer.body.contains("\"content\":\"n\""), "{}", answer.body);
    let (event, _, data) = answer.events().pop().expect("events");
    assert_eq!(event.as_deref(), Some("error"));
    assert!(data.contains("deadline_exceeded"), "{data}");
    metric_becomes(&node, &["grapevine_kv_blocks", "state=\"used\""], 0.0).await;
    for bad in ["0", "soon", "-5"] {
        let answer = ask(&node, &format!("x-request-timeout-ms: {bad}\r\n"), true).await;
        let param = Some("x-request-timeout-ms".to_owned());
        assert_eq!((answer.status, answer.error()), (400, ("invalid_value".to_owned(), param)));
    }
    let http = HttpLimits { request_timeout: Duration::from_millis(60), ..HttpLimits::default() };
    let node = start(NodeOptions { http, ..options(&control) }).await;
    for headers in ["", "x-request-timeout-ms: 3600000\r\n"] {
        assert_eq!(ask(&node, headers, false).await.status, 504, "the node's own limit");
    }
}

#[tokio::test]
async fn a_client_that_never_reads_loses_its_connection() {
    let http = HttpLimits { write_timeout: Duration::from_millis(100), ..HttpLimits::default() };
    let node = start(NodeOptions { http, ..options(&Arc::default()) }).await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let mut stream = socket.connect(node.address()).await.expect("the node accepts");
    // more than the sockets of both sides hold
    let body = chat(json!({"stream": true, "n": 16, "logprobs": true, "top_logprobs": 2,
                           "max_tokens": 100_000}))
    .to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        node.address(),
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("the request is sent");
    metric_becomes(&node, &["grapevine_http_write_timeouts_total"], 1.0).await;
    metric_becomes(&node, &["grapevine_kv_blocks", "state=\"used\""], 0.0).await;
}

#[tokio::test]
async fn silence_is_broken_by_comments() {
    let control = Arc::<Control>::default();
    control.hold.store(true, Ordering::SeqCst);
    let http = HttpLimits { keep_alive: Duration::from_millis(5), ..HttpLimits::default() };
    let node = start(NodeOptions { http, ..options(&control) }).await;
    let body = chat(json!({"stream": true})).to_string();
    let mut call = send(node.address(), "POST", "/v1/chat/completions", "", body.as_bytes()).await;
    call.read_until(": keep-alive\n\n").await;
    control.hold.store(false, Ordering::SeqCst);
    assert!(call.finish().await.body.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let node = start(options(&Arc::default())).await;
    let body = chat(json!({"messages": [{"role": "user", "content": FULL}], "stream": true}));
    let answer = post(&node, "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 429);
    assert_eq!(answer.headers["retry-after"], "7");
    assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
}

#[tokio::test]
async fn a_node_without_a_mesh_lists_itself() {
    let node = start(options(&Arc::default())).await;
    let list = get(&node, "/v1/endpoints").await.json();
    let urls = json!([format!("http://{}/v1", node.address())]);
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "{list}");
    assert_eq!((&list["object"], &list["data"][0]["urls"]), (&json!("list"), &urls));
    assert!(list["data"][0].get("node").is_none(), "{list}");
}

#[tokio::test]
async fn keys_and_tenants() {
    let keys = ApiKeys::parse("ann:sk-0123456789:acme").unwrap();
    let node = start(NodeOptions { keys, ..options(&Arc::default()) }).await;
    for (path, header, status) in [
        ("/healthz", "", 200),
        ("/readyz", "", 200),
        ("/openapi.json", "", 200),
        ("/v1/models", "", 401),
        ("/v1/endpoints", "", 401),
        ("/metrics", "", 401),
        ("/nothing", "", 401),
        ("/v1/models", "authorization: Bearer sk-0123456789\r\n", 200),
        ("/v1/models", "authorization: bearer sk-0123456789\r\n", 200),
        ("/metrics", "authorization: Bearer sk-0123456789\r\n", 200),
        ("/v1/models", "authorization: Bearer sk-012345678\r\n", 401),
        ("/v1/models", "authorization: Bearer \r\n", 401),
        ("/v1/models", "authorization: Basic sk-0123456789\r\n", 401),
        ("/v1/models", "authorization: sk-0123456789\r\n", 401),
        // with keys, the host does not matter
        ("/v1/models", "host: vine.example\r\nauthorization: Bearer sk-0123456789\r\n", 200),
    ] {
        let answer = send(node.address(), "GET", path, header, b"").await.finish().await;
        assert_eq!(answer.status, status, "{path} {header}");
        if status == 401 {
            assert_eq!(answer.error().0, "invalid_api_key");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
        }
    }
}

#[tokio::test]
async fn what_does_not_start() {
    let control = Arc::default();
    let open = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    let started = node::serve(NodeOptions { listen: open, ..options(&control) }).await;
    assert!(matches!(started, Err(ServeError::Unprotected { .. })));
    let insecure = NodeOptions { listen: open, insecure: true, ..options(&control) };
    assert!(node::serve(insecure).await.is_ok());
    let keys = ApiKeys::parse("a:sk-0123456789").unwrap();
    assert!(node::serve(NodeOptions { listen: open, keys, ..options(&control) }).await.is_ok());
    let none = NodeOptions::new(loopback(), Vec::new());
    assert!(matches!(node::serve(none).await, Err(ServeError::NoModel)));
    let twice = vec![scripted_model("m", &control), scripted_model("m", &control)];
    let twice = node::serve(NodeOptions::new(loopback(), twice)).await;
    assert!(matches!(twice, Err(ServeError::DuplicateModel(_))));
    let first = start(options(&control)).await;
    let same = node::serve(NodeOptions { listen: first.address(), ..options(&control) }).await;
    assert!(matches!(same, Err(ServeError::Listen { .. })));
}

#[tokio::test]
async fn loading_is_seen_and_failure_too() {
    let gate = Arc::<Gate>::default();
    let control = Arc::default();
    let waiting = {
        let gate = gate.clone();
        ModelOptions {
            id: "slow".to_owned(),
            loader: Box::new(move |progress| {
                progress(0.5, "reading tensors");
                gate.pass();
                Err("file x, tensor y: truncated".to_owned())
            }),
        }
    };
    let models = vec![scripted_model("m", &control), waiting];
    let node = node::serve(NodeOptions::new(loopback(), models)).await.unwrap();
    let ready = loop {
        let ready = get(&node, "/readyz").await;
        if ready.body.contains("reading tensors") {
            break ready;
        }
    };
    assert_eq!(ready.status, 503);
    assert!(ready.headers.contains_key("retry-after"));
    let models = &ready.json()["models"];
    assert_eq!(models[0]["state"], "ready");
    assert_eq!(models[1]["state"], "loading");
    assert!((0.4..0.6).contains(&models[1]["progress"].as_f64().unwrap()));
    let answer = post(&node, "/v1/chat/completions", &chat(json!({"model": "slow"}))).await;
    assert_eq!((answer.status, answer.error().0.as_str()), (503, "model_loading"));
    assert!(answer.headers.contains_key("retry-after"));
    let list = get(&node, "/v1/models").await.json();
    assert_eq!(list["data"][0]["context_tokens_max"], CONTEXT);
    assert_eq!(list["data"][1]["id"], "slow");

    gate.open();
    let failed = node.ready().await.unwrap_err();
    assert_eq!(failed.to_string(), "model slow: file x, tensor y: truncated");
    let answer = post(&node, "/v1/chat/completions", &chat(json!({"model": "slow"}))).await;
    assert_eq!((answer.status, answer.error().0.as_str()), (503, "model_unavailable"));
    assert_eq!(get(&node, "/readyz").await.json()["status"], "failed");
    let answer = post(&node, "/v1/chat/completions", &chat(json!({}))).await;
    assert_eq!(answer.status, 200, "the other model serves");
}

#[tokio::test]
async fn a_replica_that_panics_takes_nothing_else_down() {
    let control = Arc::default();
    let models = vec![scripted_model("m", &control), scripted_model("other", &control)];
    let node = start(NodeOptions::new(loopback(), models)).await;
    let body = chat(json!({"messages": [{"role": "user", "content": PANIC}]}));
    let answer = post(&node, "/v1/chat/completions", &body).await;
    assert_eq!((answer.status, answer.error().0.as_str()), (500, "internal_error"));
    let again = loop {
        let again = post(&node, "/v1/chat/completions", &chat(json!({}))).await;
        if again.status != 500 {
            break again;
        }
    };
    assert_eq!((again.status, again.error().0.as_str()), (503, "model_unavailable"));
    assert_eq!(get(&node, "/readyz").await.status, 503);
    let other = post(&node, "/v1/chat/completions", &chat(json!({"model": "other"}))).await;
    assert_eq!(other.status, 200);
}

#[tokio::test]
async fn draining_finishes_what_runs() {
    let control = Arc::<Control>::default();
    control.hold.store(true, Ordering::SeqCst);
    let node = start(options(&control)).await;
    let address = node.address();
    let body = chat(json!({"stream": true})).to_string();
    let mut call = send(address, "POST", "/v1/chat/completions", "", body.as_bytes()).await;
    call.read_until("\"content\":\"n\"").await;
    let shutdown = tokio::spawn(node.shutdown());
    let ready = loop {
        let ready = send(address, "GET", "/readyz", "", b"").await.finish().await;
        if ready.status == 503 {
            break ready;
        }
    };
    assert_eq!(ready.json()["status"], "draining");
    let refused = send(address, "POST", "/v1/chat/completions", "", body.as_bytes()).await;
    let refused = refused.finish().await;
    assert_eq!((refused.status, refused.error().0.as_str()), (503, "shutting_down"));
    assert!(refused.headers.contains_key("retry-after"));
    control.hold.store(false, Ordering::SeqCst);
    let answer = call.finish().await;
    assert!(answer.body.ends_with("data: [DONE]\n\n"), "{}", answer.body);
    shutdown.await.unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn draining_breaks_off_after_its_limit() {
    let control = Arc::<Control>::default();
    control.hold.store(true, Ordering::SeqCst);
    let node = start(NodeOptions { drain_limit: Duration::ZERO, ..options(&control) }).await;
    let body = chat(json!({"stream": true})).to_string();
    let mut call = send(node.address(), "POST", "/v1/chat/completions", "", body.as_bytes()).await;
    call.read_until("\"content\":\"n\"").await;
    node.shutdown().await;
    let events = call.finish().await.events();
    let (event, _, data) = events.last().unwrap();
    assert_eq!(event.as_deref(), Some("error"));
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["error"]["code"], "shutting_down");
}

#[tokio::test]
async fn metrics_name_what_happened() {
    let node = start(options(&Arc::default())).await;
    post(&node, "/v1/chat/completions", &chat(json!({}))).await;
    post(&node, "/v1/chat/completions", &chat(json!({"n": 0}))).await;
    let text = get(&node, "/metrics").await.body;
    for part in [
        "gen_ai_server_time_to_first_token_seconds_count{gen_ai_request_model=\"m\"} 1",
        "gen_ai_server_time_per_output_token_seconds_count{gen_ai_request_model=\"m\"} 1",
        "grapevine_inter_token_latency_seconds_count{gen_ai_request_model=\"m\"} 6",
        "grapevine_queue_time_seconds_count{gen_ai_request_model=\"m\"} 1",
        "gen_ai_client_token_usage_sum{gen_ai_request_model=\"m\",gen_ai_token_type=\"output\"} 7",
        "grapevine_prefix_cache_hit_tokens_total{gen_ai_request_model=\"m\"} 1",
        "grapevine_kv_blocks{gen_ai_request_model=\"m\",state=\"free\"} 100",
        "grapevine_kv_blocks{gen_ai_request_model=\"m\",state=\"cached\"} 0",
        "grapevine_sequences{gen_ai_request_model=\"m\",state=\"waiting\"} 0",
        "status=\"400\",code=\"invalid_value\"} 1",
        "status=\"200\",code=\"ok\"}",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

/// `VINE_REGENERATE=1 cargo test -p grapevine-node openapi` writes the file anew.
#[tokio::test]
async fn the_openapi_document_is_checked_in() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let made = node::http::openapi::document();
    if std::env::var_os("VINE_REGENERATE").is_some() {
        std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs")).unwrap();
        std::fs::write(path, made).unwrap();
    }
    let stored = std::fs::read_to_string(path).expect("docs/openapi.json is there");
    assert!(
        stored == made,
        "docs/openapi.json is out of date: set VINE_REGENERATE=1 and run again"
    );
    let node = start(options(&Arc::default())).await;
    assert_eq!(get(&node, "/openapi.json").await.body, made);
}
