//! Two nodes of a mesh with the same model: one prefills, the other decodes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use node::mesh::{ControlRoutes, Mesh, MeshOptions, Roster};
use node::{ApiKeys, Node, NodeOptions};
use protocol::identity::Roles;
use protocol::node_record::{NodeRole, ReplicaState};
use scheduler::router::Disagg;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::common::*;
use crate::tiers::tiny_on;

pub struct Member {
    pub node: Node,
    mesh: Mesh,
    roster: Arc<Roster>,
    _data: tempfile::TempDir,
}

/// With a disk below its KV cache, if there is a folder for it.
async fn member(role: NodeRole, other: Option<&Member>, folder: Option<&Path>) -> Member {
    let mut options = NodeOptions::new(loopback(), vec![tiny_on(folder)]);
    (options.role, options.disagg) = (role, Disagg::Always);
    member_with(options, other).await
}

/// Of every node here.
pub const ADMIN_KEY: &str = "an-admin-key";

/// A node of a new mesh, or of that of another.
pub async fn member_with(mut node_options: NodeOptions, other: Option<&Member>) -> Member {
    let data = tempfile::tempdir().unwrap();
    let roster = Roster::new();
    let token = other.map(|other| {
        let seeds = vec![other.mesh.address()];
        other.mesh.identity().invite((Roles::ALL, 1, 3600), seeds).unwrap()
    });
    let service = roster.clone();
    let options = MeshOptions { service, token, ..MeshOptions::new(data.path(), loopback()) };
    let mesh = Mesh::start(options).await.unwrap();
    let control = ControlRoutes::new(mesh.clone(), roster.clone(), CancellationToken::new());
    node_options.admin = Some((control, ApiKeys::parse(&format!("admin:{ADMIN_KEY}")).unwrap()));
    let node = node::serve(node_options).await.unwrap();
    node.join(mesh.clone(), roster.clone(), data.path()).unwrap();
    node.ready().await.unwrap();
    Member { node, mesh, roster, _data: data }
}

/// A prefiller and a decoder that know of each other.
async fn pair() -> (Member, Member) {
    pair_on(None).await
}

/// The prefiller may have a disk.
async fn pair_on(folder: Option<&Path>) -> (Member, Member) {
    let prefiller = member(NodeRole::Prefill, None, folder).await;
    let decoder = member(NodeRole::Both, Some(&prefiller), None).await;
    replicas_known(&decoder).await;
    (prefiller, decoder)
}

/// Waits until a node has heard of a replica that another one has ready.
pub async fn replicas_known(member: &Member) {
    for _ in 0..500 {
        let ready = member.roster.peers().await.iter().any(|peer| {
            let record = peer.record.as_ref();
            let ready = |r: &protocol::node_record::ReplicaRecord| r.state == ReplicaState::Ready;
            !peer.own && record.is_some_and(|r| r.replicas.iter().any(ready))
        });
        if ready {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the nodes did not hear of each other");
}

async fn alone() -> Node {
    start(NodeOptions::new(loopback(), vec![tiny_on(None)])).await
}

fn ask(number: usize, extra: Value) -> Value {
    let prompt = format!("{number}: ") + &"a vine and a wall ".repeat(9);
    merged(json!({"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 20}), extra)
}

async fn metric(node: &Node, line: &str) -> f64 {
    let text = get(node, "/metrics").await.body;
    let value = text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {line} in {text}"))
}

/// Waits until no block of the node is used.
async fn settled(node: &Node) {
    for _ in 0..500 {
        let text = get(node, "/metrics").await.body;
        let used =
            text.lines().find(|l| l.starts_with("grapevine_kv_blocks{") && l.contains("used"));
        if used.is_some_and(|line| line.ends_with(" 0")) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("blocks are left over: {}", get(node, "/metrics").await.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_elsewhere_changes_no_answer() {
    let alone = alone().await;
    let (prefiller, decoder) = pair().await;
    let extras = [
        json!({}),
        json!({"n": 2, "temperature": 1.1, "seed": 5}),
        json!({"logprobs": 3}),
        json!({"stop": ["q"], "temperature": 0.9, "seed": 6}),
    ];
    for (number, extra) in extras.into_iter().enumerate() {
        let body = ask(number, extra);
        let undisturbed = post(&alone, "/v1/completions", &body).await.json();
        let answer = post(&decoder.node, "/v1/completions", &body).await.json();
        assert_eq!(answer["choices"], undisturbed["choices"]);
        // It was computed for this request: no cache had it.
        assert_eq!(answer["usage"], undisturbed["usage"]);
    }
    let complete = "grapevine_kv_hand_offs_total{outcome=\"complete\"}";
    assert_eq!(metric(&decoder.node, complete).await, 4.0);
    let served = "grapevine_kv_transfers_served_total{outcome=\"complete\"}";
    assert_eq!(metric(&prefiller.node, served).await, 4.0);
    settled(&prefiller.node).await;
    settled(&decoder.node).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_node_has_cached_counts_as_cached() {
    let (prefiller, decoder) = pair().await;
    let body = ask(0, json!({}));
    let first = post(&prefiller.node, "/v1/completions", &body).await.json();
    let second = post(&decoder.node, "/v1/completions", &body).await.json();
    assert_eq!(first["choices"], second["choices"]);
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    let prompt = second["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached, Some((prompt - 1) / 16 * 16), "{second}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_node_has_on_disk_counts_as_cached() {
    let folder = tempfile::tempdir().unwrap();
    let before = start(NodeOptions::new(loopback(), vec![tiny_on(Some(folder.path()))])).await;
    let body = ask(0, json!({}));
    let first = post(&before, "/v1/completions", &body).await.json();
    let tokens = first["usage"]["total_tokens"].as_u64().unwrap();
    let on_disk = ["grapevine_kv_tier_blocks", "tier=\"disk\""];
    metric_becomes(&before, &on_disk, ((tokens - 1) / 16) as f64).await;
    before.shutdown().await;

    let (prefiller, decoder) = pair_on(Some(folder.path())).await;
    let second = post(&decoder.node, "/v1/completions", &body).await.json();
    assert_eq!(first["choices"], second["choices"]);
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    let prompt = second["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached, Some((prompt - 1) / 16 * 16), "{second}");
    let hits = metric(
        &prefiller.node,
        "grapevine_kv_tier_hits_total{gen_ai_request_model=\"m\",tier=\"disk\"}",
    )
    .await;
    assert_eq!(hits, ((prompt - 1) / 16) as f64);
    settled(&prefiller.node).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_prefiller_a_node_computes_the_prompt() {
    let alone = alone().await;
    let (prefiller, decoder) = pair().await;
    let Member { node, mesh, .. } = prefiller;
    // Gone without a word: nobody answers at its address.
    mesh.shutdown().await;
    let body = ask(1, json!({}));
    let undisturbed = post(&alone, "/v1/completions", &body).await.json();
    let answer = post(&decoder.node, "/v1/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["choices"], undisturbed["choices"]);
    settled(&decoder.node).await;
    drop(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_leave_nothing() {
    let (prefiller, decoder) = pair().await;
    let leaving = (0..40).map(|number| {
        let body = ask(number, json!({"stream": true}));
        let node = &decoder.node;
        async move {
            let asked = post(node, "/v1/completions", &body);
            let _ = tokio::time::timeout(Duration::from_millis(number as u64), asked).await;
        }
    });
    futures_util::future::join_all(leaving).await;
    settled(&decoder.node).await;
    settled(&prefiller.node).await;
    let answer = post(&decoder.node, "/v1/completions", &ask(99, json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}
