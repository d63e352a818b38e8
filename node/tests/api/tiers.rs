//! A node with a disk below its KV cache, as its clients and its metrics show it.

use std::path::Path;

use engine::model::Architecture;
use engine::tiers::{DiskOptions, KvTiers, TiersOptions};
use node::{Loaded, ModelOptions, Node, NodeOptions};
use serde_json::json;

use crate::common::*;
use crate::tiny_model::load;

/// The tiny model as `m`, with a disk below its KV cache if there is a folder for it.
pub fn tiny_on(folder: Option<&Path>) -> ModelOptions {
    let disk = folder.map(|folder| DiskOptions { folder: folder.to_owned(), bytes: 64 << 20 });
    let options = TiersOptions { host_bytes: 0, disk };
    let loader = Box::new(move |_: &dyn Fn(f32, &'static str)| {
        let (mut replica, template, hidden) = load(Architecture::Llama);
        if let Some(tiers) = KvTiers::open(&options, replica.record_format()) {
            replica.set_tiers(tiers);
        }
        Ok(Loaded::new(replica, template, hidden, "fp_tiny".to_owned()))
    });
    ModelOptions { id: "m".to_owned(), loader }
}

async fn on_disk(folder: &Path) -> Node {
    start(NodeOptions::new(loopback(), vec![tiny_on(Some(folder))])).await
}

/// The answer's text, the tokens of the prompt and those that were cached.
async fn ask(node: &Node) -> (String, u64, u64) {
    let prompt = "a vine and a wall ".repeat(9);
    let body = json!({"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 1});
    let answer = post(node, "/v1/completions", &body).await.json();
    let usage = &answer["usage"];
    let text = answer["choices"][0]["text"].as_str().expect("a text").to_owned();
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
    (text, usage["prompt_tokens"].as_u64().expect("a count"), cached)
}

async fn of_disk(node: &Node, what: &str) -> Option<f64> {
    metric(node, &[what, "tier=\"disk\""]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_node_copies_its_pool_to_the_disk_and_a_new_one_finds_it() {
    let folder = tempfile::tempdir().unwrap();
    let first = on_disk(folder.path()).await;
    let (text, prompt, cached) = ask(&first).await;
    assert_eq!(cached, 0);
    // Nothing has fallen out of the pool, and nothing is asked any more.
    let blocks = (prompt / 16) as f64;
    metric_becomes(&first, &["grapevine_kv_tier_blocks", "tier=\"disk\""], blocks).await;
    assert_eq!(of_disk(&first, "grapevine_kv_tier_stored_total").await, Some(blocks));
    assert_eq!(metric(&first, &["grapevine_kv_blocks{", "state=\"cached\""]).await, Some(blocks));
    first.shutdown().await;

    let second = on_disk(folder.path()).await;
    // Found without a request.
    metric_becomes(&second, &["grapevine_kv_tier_blocks", "tier=\"disk\""], blocks).await;
    let full = (prompt - 1) / 16 * 16;
    assert_eq!(ask(&second).await, (text, prompt, full));
    assert_eq!(of_disk(&second, "grapevine_kv_tier_hits_total").await, Some((full / 16) as f64));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_metrics_of_the_tiers_are_there_before_anything_has_happened() {
    let folder = tempfile::tempdir().unwrap();
    let node = on_disk(folder.path()).await;
    for tier in ["tier=\"host\"", "tier=\"disk\""] {
        let of_tiers = ["blocks", "hits_total", "stored_total", "dropped_total", "corrupt_total"];
        for name in of_tiers.map(|name| format!("grapevine_kv_tier_{name}{{")) {
            let value = metric(&node, &[&name, tier, "gen_ai_request_model=\"m\""]).await;
            assert_eq!(value, Some(0.0), "{name} {tier}");
        }
    }
    for name in ["grapevine_kv_tier_paused{", "grapevine_kv_fetches_late_total{"] {
        assert_eq!(metric(&node, &[name, "gen_ai_request_model=\"m\""]).await, Some(0.0), "{name}");
    }
}
