//! A stream that two nodes ask the same replica for: the one that has its client goes on with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use node::NodeOptions;
use serde_json::json;

use crate::common::*;
use crate::handoff::{ADMIN_KEY, Member, member_with, replicas_known};

/// Events that arrived whole, `[DONE]` left out: what was chosen, by number.
fn choices(answer: &Answer) -> Vec<(String, serde_json::Value)> {
    let events = answer.events().into_iter().filter(|(.., data)| data != "[DONE]");
    let choice = |(kind, id, data): (Option<String>, String, String)| {
        assert_eq!(kind, None, "an error: {data}");
        let number = id.rsplit_once(':').expect("an id").1.to_owned();
        let data: serde_json::Value = serde_json::from_str(&data).expect("JSON");
        (number, data["choices"].clone())
    };
    events.map(choice).collect()
}

async fn entrance(other: &Member) -> Member {
    let mut options = NodeOptions::new(loopback(), vec![]);
    options.without_models = true;
    let entrance = member_with(options, Some(other)).await;
    replicas_known(&entrance).await;
    entrance
}

/// How each attempt at a request ended, as the node that chose who answers has it.
async fn ends(at: &Member, request: &str) -> Vec<String> {
    let path = format!("/admin/v1/requests/{request}/explain");
    let key = format!("authorization: Bearer {ADMIN_KEY}\r\n");
    let explained = send(at.node.address(), "GET", &path, &key, b"").await.finish().await.json();
    let decisions = explained["decisions"].as_array().expect("decisions").iter();
    decisions.filter_map(|d| d["outcome"]["end"].as_str().map(str::to_owned)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_the_client_goes_on() {
    let control = Arc::new(Control::default());
    let replica = member_with(options(&control), None).await;
    let (first, second) = (entrance(&replica).await, entrance(&replica).await);
    let body = json!({"model": "m", "prompt": "p", "max_tokens": 6, "stream": true}).to_string();
    let ask = |at: &Member, headers: String| {
        let (address, body) = (at.node.address(), body.clone());
        async move { send(address, "POST", "/v1/completions", &headers, body.as_bytes()).await }
    };
    let undisturbed = choices(&ask(&first, String::new()).await.finish().await);
    assert_eq!(undisturbed.len(), 7, "six tokens and an end: {undisturbed:?}");

    // The replica stops after two tokens, so that the stream is there to be taken.
    control.hold.store(true, Ordering::SeqCst);
    let mut stays = ask(&first, String::new()).await;
    let head = stays.read_until(":1\n").await;
    let id = head.split("\nid: ").nth(1).and_then(|rest| rest.split(':').next()).expect("an id");
    let mut leaves = ask(&second, format!("last-event-id: {id}:0\r\n")).await;
    leaves.read_until(":1\n").await;
    // The first one has had its stream taken, and takes it back: asked for the fourth time, with the
    // undisturbed one.
    let until = Instant::now() + Duration::from_secs(30);
    while control.asked.load(Ordering::SeqCst) < 4 {
        assert!(Instant::now() < until, "the stream was not taken back");
        tokio::task::yield_now().await;
    }
    drop(leaves);
    control.hold.store(false, Ordering::SeqCst);
    let answer = stays.finish().await;
    assert_eq!(choices(&answer), undisturbed, "as if nobody else had asked");
    // The replica is well: nobody holds against it that it was asked twice.
    let ends = ends(&first, id).await;
    assert_eq!(ends, ["done", "done"]);
    // Nothing is left of either.
    metric_becomes(&replica.node, &["grapevine_kv_blocks", "used"], 0.0).await;
}
