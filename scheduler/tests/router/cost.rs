//! Which replica is the cheapest, and what its first token is thought to cost.

use super::*;
use protocol::node_record::NodeRole;
use scheduler::router::{Candidate, Decided, KvPath, LinkFigures, ReplicaDecision, Why};

/// A replica that says what its keys and values weigh: 12 KiB a token, 1,000 prompt tokens a second.
fn movable(running: u32, prompt_tokens: u64) -> ReplicaLoad {
    ReplicaLoad {
        decode_step_us: 20_000,
        kv_bytes_per_token: 12_288,
        ..load(running, prompt_tokens, 1000)
    }
}

fn overlaps(of: &[(u8, u64)]) -> BTreeMap<NodeId, u64> {
    of.iter().map(|&(n, tokens)| (node(n), tokens)).collect()
}

fn decided(router: &Router, request: u128) -> ReplicaDecision {
    let last = router.decisions().of(RequestId(request)).last();
    match &last.expect("it is kept").what {
        Decided::Replica(decision) => decision.clone(),
        Decided::Prefill(plan) => panic!("{plan:?}"),
    }
}

/// A mesh whose paths are known: a gigabyte a second, a millisecond.
fn mesh(loads: &[(u8, ReplicaLoad)]) -> Router {
    let mut router = router(loads);
    for (n, _) in loads {
        router.rtt(node(*n), Duration::from_millis(1));
        router.carried(node(*n), 1_000_000_000, Duration::from_secs(1));
    }
    router
}

#[test]
fn a_cached_prefix_is_weighed_against_load() {
    let idle = movable(0, 0);
    for (what, loads, overlap, expect) in [
        ("who has it", vec![(1, idle), (2, idle)], vec![(2, 1900)], 2),
        ("who has more of it", vec![(1, idle), (2, idle)], vec![(1, 1000), (2, 1900)], 2),
        (
            "a short queue does not matter",
            vec![(1, idle), (2, movable(1, 100))],
            vec![(2, 1900)],
            2,
        ),
        ("a long one does", vec![(1, idle), (2, movable(1, 4000))], vec![(2, 1900)], 1),
        ("so do many streams", vec![(1, idle), (2, movable(60, 0))], vec![(2, 1900)], 1),
        ("this node before others", vec![(0, idle), (1, idle)], vec![(0, 500), (1, 504)], 0),
    ] {
        let overlap = overlaps(&overlap);
        let ask = Ask { prompt_tokens: 2000, overlap_tokens: &overlap, ..ask(1) };
        // Over paths as they are guessed: blocks are slower than a short queue.
        assert_eq!(router(&loads).choose(at(10), &ask).unwrap().node, node(expect), "{what}");
    }
}

#[test]
fn where_the_keys_and_values_come_from() {
    let (idle, full) = (movable(0, 0), movable(0, 4000));
    let decoder = ReplicaLoad { role: NodeRole::Decode, ..idle };
    let prefiller = ReplicaLoad { role: NodeRole::Prefill, prefill_rate: 8000, ..idle };
    // Who is asked is node 1 in all of them: node 2 helps.
    for (what, loads, overlap, expect) in [
        ("nobody has it", vec![(1, idle)], vec![], KvPath::Recompute),
        ("in its cache", vec![(1, idle)], vec![(1, 1000)], KvPath::Local),
        (
            "in the cache of a busy one",
            vec![(1, decoder), (2, full)],
            vec![(2, 1900)],
            KvPath::Fetch { from: node(2) },
        ),
        (
            "too little to be fetched",
            vec![(1, decoder), (2, full)],
            vec![(1, 1000), (2, 1010)],
            KvPath::Local,
        ),
        (
            "computed by a node that is there for it",
            vec![(1, decoder), (2, prefiller)],
            vec![],
            KvPath::Remote { by: node(2) },
        ),
        (
            "a decoder computes for nobody",
            vec![(1, movable(0, 100)), (2, ReplicaLoad { running: 30, ..decoder })],
            vec![],
            KvPath::Recompute,
        ),
    ] {
        let overlap = overlaps(&overlap);
        let ask = Ask { prompt_tokens: 2000, overlap_tokens: &overlap, ..ask(1) };
        let mut router = mesh(&loads);
        let choice = router.choose(at(10), &ask).unwrap();
        assert_eq!(choice.node, node(1), "{what}");
        let chosen = decided(&router, 1).chosen.unwrap();
        assert_eq!(chosen.parts.path, expect, "{what}: {:?}", chosen.parts);
        assert_eq!(Duration::from_micros(chosen.parts.ttft_us()), choice.ttft);
        assert_eq!(Duration::from_micros(chosen.parts.score_us()), choice.cost);
    }
}

/// The parts of one estimate, reckoned by hand.
#[test]
fn the_parts_of_an_estimate() {
    let overlap = overlaps(&[(1, 500), (2, 1500)]);
    let ask = Ask { prompt_tokens: 2000, overlap_tokens: &overlap, ..ask(1) };
    // Node 2 has most of it and far too much to do.
    let mut router = mesh(&[(1, movable(2, 300)), (2, movable(0, 9000))]);
    assert_eq!(router.choose(at(10), &ask).unwrap().node, node(1));
    let parts = decided(&router, 1).chosen.unwrap().parts;
    assert_eq!(parts.path, KvPath::Fetch { from: node(2) });
    assert_eq!(parts.queue_us, 300_000, "300 tokens at 1,000 a second");
    // 1,000 tokens of 12,288 bytes at a gigabyte a second less the round trip of the sample.
    let rate = LinkFigures::bytes_per_s_or_guess(&router.link(node(2)));
    // And node 1 computes, so that it begins to take them in after a step, and each of twelve chunks after one.
    assert!(12_288_000_000_000 / rate < 12 * 20_000);
    assert_eq!(parts.kv_us, 12 * 20_000 + 1_000 + 20_000);
    assert_eq!(parts.prefill_us, 500_000);
    assert_eq!(parts.hop_us, 6_000, "five for the hop, one for the round trip");
    // A step of 20 ms, of which each stream more adds a tenth for it and the two that run; 100 tokens;
    // and the prefill delays the two; a tenth of all that.
    assert_eq!(parts.decode_us, (20_000 + 3 * 2_000) * 100 / 10 + 500_000 * 2 / 10);
}

/// What lies below a pool has its price, and where that is more than computing it costs, that one.
#[test]
fn what_lies_below_a_pool_is_dearer_than_what_is_in_it() {
    let idle = movable(0, 0);
    // 100 µs a token: a block of 16 in 1.6 ms.
    let slow_disk = ReplicaLoad { below_ns_per_token: 100_000, ..idle };
    let hung = ReplicaLoad { below_ns_per_token: u32::MAX, ..idle };
    for (what, two, below, chosen, raise_us) in [
        ("all in the pool", slow_disk, 0, 2, 0),
        ("some on disk", slow_disk, 1000, 2, 100_000),
        ("all on disk", slow_disk, 1900, 2, 190_000),
        ("more than it has", slow_disk, u64::MAX, 2, 190_000),
        ("a disk that hangs is computed around", hung, 1900, 1, 0),
        // 12,288 bytes a token at 500 MB/s.
        ("a disk that was never read", idle, 1000, 2, 24_576),
    ] {
        let overlap = overlaps(&[(2, 1900)]);
        let below_tokens = overlaps(&[(2, below)]);
        let ask = Ask {
            prompt_tokens: 2000,
            overlap_tokens: &overlap,
            below_tokens: &below_tokens,
            ..ask(1)
        };
        // No path is worth a fetch: a replica has what it has.
        let mut router = mesh(&[(1, idle), (2, two)]);
        (1..=2).for_each(|n| router.rtt(node(n), Duration::from_secs(1)));
        assert_eq!(router.choose(at(10), &ask).unwrap().node, node(chosen), "{what}");
        let decision = decided(&router, 1);
        let both = decision.chosen.iter().chain(&decision.others);
        let of = |n: u8| both.clone().find(|c| c.node == node(n)).unwrap();
        let expect = if what.contains("hangs") { 1_900_000 } else { raise_us };
        assert_eq!(of(2).parts.raise_us, expect, "{what}");
        assert_eq!(of(2).below_tokens, below.min(1900), "{what}");
    }
    // Who fetches waits for the other's disk, too; as far as what it fetches lies there.
    let overlap = overlaps(&[(1, 500), (2, 1500)]);
    for (below, raise_us) in [(0, 0), (400, 40_000), (1500, 100_000)] {
        let below_tokens = overlaps(&[(2, below)]);
        let ask = Ask {
            prompt_tokens: 2000,
            overlap_tokens: &overlap,
            below_tokens: &below_tokens,
            ..ask(1)
        };
        let busy = ReplicaLoad { prompt_tokens: 9000, ..slow_disk };
        let mut router = mesh(&[(1, movable(2, 300)), (2, busy)]);
        assert_eq!(router.choose(at(10), &ask).unwrap().node, node(1));
        let parts = decided(&router, 1).chosen.unwrap().parts;
        assert_eq!((parts.path, parts.raise_us), (KvPath::Fetch { from: node(2) }, raise_us));
    }
}

#[test]
fn a_prefix_does_not_drown_its_node() {
    // Two nodes, one prefix: everybody wants it from node 1, until that is no gain any more.
    let overlap = overlaps(&[(1, 3900)]);
    let mut router = mesh(&[(1, movable(0, 0)), (2, movable(0, 0))]);
    let mut counts = [0; 3];
    for request in 0..200 {
        let ask = Ask { prompt_tokens: 4000, overlap_tokens: &overlap, ..ask(request) };
        let choice = router.choose(at(10), &ask).unwrap();
        counts[usize::from(choice.node.0[0])] += 1;
    }
    assert!(counts[1] > 0 && counts[2] > 0, "{counts:?}");
    // And the gate is the candidate's own: the other keeps its affinity.
    let swamped = movable(0, 11_000);
    let overlap = overlaps(&[(1, 3999), (2, 3000)]);
    let ask = Ask { prompt_tokens: 4000, overlap_tokens: &overlap, ..ask(1) };
    let mut router = super::router(&[(1, swamped), (2, movable(3, 5000)), (3, movable(0, 5000))]);
    assert_eq!(router.choose(at(10), &ask).unwrap().node, node(2));
    let ranks = |c: &Candidate| (c.node, c.rank.overloaded);
    let others: Vec<_> = decided(&router, 1).others.iter().map(ranks).collect();
    assert_eq!(others, [(node(3), false), (node(1), true)]);
    // Where all are overloaded the cheapest is asked, not nobody.
    let mut router = mesh(&[(1, swamped), (2, movable(0, 60_000))]);
    let choice = router.choose(at(10), &ask).unwrap();
    assert_eq!((choice.node, choice.why), (node(1), Why::LastResort));
}

#[test]
fn no_blocks_left_is_overload() {
    let crowded = ReplicaLoad { waiting: 1, kv_blocks: 1000, kv_blocks_free: 10, ..movable(0, 0) };
    let roomy = ReplicaLoad { kv_blocks_free: 500, ..crowded };
    let mut router = mesh(&[(1, crowded), (2, ReplicaLoad { running: 9, ..roomy })]);
    assert_eq!(router.choose(at(10), &ask(1)).unwrap().node, node(2));
}

#[test]
fn who_is_there_for_prefills_is_asked_for_answers_last() {
    let prefiller = ReplicaLoad { role: NodeRole::Prefill, ..movable(0, 0) };
    let mut router = mesh(&[(1, prefiller), (2, movable(30, 3000))]);
    assert_eq!(router.choose(at(10), &ask(1)).unwrap().node, node(2));
    let excluded = [node(2)];
    let ask = Ask { excluded: &excluded, ..ask(2) };
    let choice = router.choose(at(10), &ask).unwrap();
    assert_eq!((choice.node, choice.why), (node(1), Why::LastResort));
}

#[test]
fn a_remote_prefill_counts_where_it_is_computed() {
    let decoder = ReplicaLoad { role: NodeRole::Decode, ..movable(0, 0) };
    let prefiller = ReplicaLoad { role: NodeRole::Prefill, prefill_rate: 2500, ..movable(0, 0) };
    let mut router = mesh(&[(1, decoder), (2, prefiller)]);
    let ask = |request| Ask { prompt_tokens: 3000, ..ask(request) };
    let queue = |router: &Router, request| decided(router, request).chosen.unwrap().parts;
    for (request, queue_us) in [(1, 0), (2, 1_200_000)] {
        router.choose(at(10), &ask(request)).unwrap();
        let parts = queue(&router, request);
        assert_eq!((parts.path, parts.queue_us), (KvPath::Remote { by: node(2) }, queue_us));
    }
    // Then its queue is longer than computing it, and the third computes it by itself.
    router.choose(at(10), &ask(3)).unwrap();
    assert_eq!(queue(&router, 3).path, KvPath::Recompute);
    // Who fails leaves nothing behind at its helper.
    for request in 1..=3 {
        router.settle(at(11), node(1), RequestId(request), Outcome::Ended);
    }
    router.choose(at(12), &ask(4)).unwrap();
    assert_eq!(queue(&router, 4).queue_us, 0);
}

#[test]
fn exploration_is_rare_cheap_and_never_onto_who_is_not_well() {
    let near = movable(0, 20);
    let loads = [
        (1, movable(0, 0)),
        (2, near),
        // Too dear, suspected, failing, there for prefills.
        (3, movable(60, 0)),
        (4, near),
        (5, near),
        (6, ReplicaLoad { role: NodeRole::Prefill, ..near }),
    ];
    let mut counts = [0u32; 7];
    for request in 0..20_000 {
        let mut router = Router::new(OWN, RouterConfig::default());
        for (n, load) in &loads {
            router.report(at(0), node(*n), [("m".to_owned(), *load)]);
        }
        for failed in 0..3 {
            router.settle(at(1), node(5), RequestId(1 << 64 | failed), Outcome::Failed);
        }
        let suspected = [node(4)];
        let ask = Ask { suspected: &suspected, ..ask(request << 32 | request) };
        let choice = router.choose(at(2), &ask).unwrap();
        let place = usize::from(choice.node.0[0]);
        counts[place] += 1;
        assert_eq!(choice.why == Why::Explored, place == 2, "{choice:?}");
        if request > 2000 {
            continue;
        }
        // The same request explores the same way; a second attempt never does.
        let again = Ask { excluded: &[node(9)], ..ask };
        assert_ne!(router.choose(at(2), &again).unwrap().why, Why::Explored);
    }
    let explored = counts[2];
    assert_eq!(counts, [0, 20_000 - explored, explored, 0, 0, 0, 0]);
    assert!((200..400).contains(&explored), "about 15 of a thousand: {explored} of 20,000");
}
