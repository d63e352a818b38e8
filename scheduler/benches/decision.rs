//! What one decision of the router costs, by the number of nodes.
//!
//! ```sh
//! cargo bench -p grapevine-scheduler --bench decision
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration as StdDuration, Instant as StdInstant};

use protocol::node_record::NodeRole;
use protocol::random::mix;
use protocol::{Duration, Instant, NodeId, RequestId};
use scheduler::router::{Ask, Outcome, PrefillAsk, ReplicaLoad, Router, RouterConfig};

fn main() {
    // Run by `cargo test`, it only shows that it runs.
    let decisions = if std::env::args().any(|a| a == "--bench") { 20_000 } else { 20 };
    for nodes in [10, 100, 1_000, 10_000] {
        measure(nodes, decisions);
    }
}

fn measure(nodes: u64, decisions: u64) {
    let ids: Vec<NodeId> = (0..nodes).map(id).collect();
    let mut router = Router::new(ids[0], RouterConfig::default());
    for (n, &node) in ids.iter().enumerate() {
        let random = mix(n as u64);
        let load = ReplicaLoad {
            ready: true,
            running: (random % 16) as u32,
            prompt_tokens: random >> 8 & 4095,
            prefill_rate: 500 + (random >> 20 & 1023) as u32,
            weights: 7,
            decode_step_us: 20_000,
            kv_bytes_per_token: 12_288,
            kv_blocks_free: 1000,
            kv_blocks: 4000,
            role: NodeRole::ALL[(random >> 40) as usize % 3],
            ..ReplicaLoad::default()
        };
        // Beside the model that is asked for, each node has others.
        let others = (0..3).map(|m| (format!("other-{m}"), load));
        router.report(Instant::from_millis(1), node, others.chain([("model".to_owned(), load)]));
        router.links_mut().rtt(node, Duration::from_micros(200 + random % 5000));
    }
    // One node in four has a part of the prompt.
    let overlap: BTreeMap<NodeId, u64> =
        ids.iter().step_by(4).map(|&node| (node, mix(u64::from(node.0[7])) % 2000)).collect();
    let (mut choose, mut plan) = (Vec::new(), Vec::new());
    let mut running = VecDeque::new();
    for n in 0..decisions {
        let now = Instant::from_millis(10 + n);
        let request = RequestId(u128::from(mix(n)) << 64 | u128::from(n));
        let ask = Ask {
            request,
            model: "model",
            prompt_tokens: 2000,
            output_tokens: 256,
            overlap_tokens: &overlap,
            excluded: &[],
            suspected: &[],
            weights: None,
        };
        let began = StdInstant::now();
        let choice = router.choose(now, &ask).expect("all are ready");
        choose.push(began.elapsed());
        running.push_back((choice.node, request));
        if running.len() > RUNNING {
            let (node, over) = running.pop_front().expect("there are some");
            router.settle(now, node, over, Outcome::Ended);
        }
        if n % 16 == 0 {
            let ask = PrefillAsk {
                request,
                model: "model",
                prompt_tokens: 2000,
                cached_tokens: 100,
                block_tokens: 16,
                overlap_tokens: &overlap,
                suspected: &[],
            };
            let began = StdInstant::now();
            router.plan_prefill(now, &ask).expect("the replica is here");
            plan.push(began.elapsed());
        }
    }
    println!("{nodes:6} nodes: choose {}; plan_prefill {}", spread(choose), spread(plan));
}

fn spread(mut times: Vec<StdDuration>) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    format!("p50 {:.1} p99 {:.1} p99.9 {:.1} µs", at(0.5), at(0.99), at(0.999))
}

fn id(n: u64) -> NodeId {
    let mut bytes = [0; 32];
    for (place, eight) in bytes.chunks_exact_mut(8).enumerate() {
        eight.copy_from_slice(&mix(n << 8 | place as u64).to_le_bytes());
    }
    NodeId(bytes)
}

/// Requests under way at one time.
const RUNNING: usize = 500;
