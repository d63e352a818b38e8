//! Where a prompt's keys and values come from: tables.

use super::*;
use protocol::node_record::NodeRole;
use scheduler::router::{
    Disagg, LinkFigures, OPTIONS_KEPT_MAX, PlannedSource, PrefillInputs, PrefillKind, PrefillLoad,
    PrefillPeer, SOURCES_MAX, plan_prefill,
};

/// Idle, a thousand prompt tokens a second.
const IDLE: PrefillLoad = PrefillLoad {
    queue_tokens: 0,
    prefill_rate: 1000,
    running: 0,
    turn_us: 0,
    raise_ns_per_token: 100_000,
};

/// A gigabyte a second, a millisecond.
const FAST: LinkFigures =
    LinkFigures { rtt: Some(Duration::from_millis(1)), bytes_per_s: Some(1_000_000_000) };

fn peer(n: u8) -> PrefillPeer {
    PrefillPeer {
        node: node(n),
        role: NodeRole::Both,
        load: IDLE,
        overlap_tokens: 0,
        below_tokens: 0,
        link: FAST,
        avoid: false,
    }
}

fn inputs_with<'a>(cached_tokens: u64, peers: &'a [PrefillPeer]) -> PrefillInputs<'a> {
    PrefillInputs { cached_tokens, ..inputs(IDLE, peers) }
}

fn inputs<'a>(here: PrefillLoad, peers: &'a [PrefillPeer]) -> PrefillInputs<'a> {
    PrefillInputs {
        mode: Disagg::Auto,
        prompt_tokens: 2000,
        cached_tokens: 0,
        below_tokens: 0,
        bytes_per_token: 12_288,
        block_tokens: 16,
        here,
        peers,
    }
}

/// Who is asked, with `true` for a prefill.
fn sources(inputs: &PrefillInputs<'_>) -> Vec<(u8, bool)> {
    let plan = plan_prefill(inputs, &config());
    let pair = |s: &PlannedSource| (s.peer.0[0], s.prefill);
    plan.sources.iter().map(pair).collect()
}

#[test]
fn a_peer_prefills_where_that_is_a_gain() {
    let queued = PrefillLoad { queue_tokens: 4000, ..IDLE };
    let decoding = PrefillLoad { running: 8, ..IDLE };
    let prefiller = PrefillPeer { role: NodeRole::Prefill, ..peer(1) };
    let fast = PrefillPeer { load: PrefillLoad { prefill_rate: 4000, ..IDLE }, ..peer(1) };
    let slow = LinkFigures { bytes_per_s: Some(5_000_000), ..FAST };
    let far = LinkFigures { rtt: Some(Duration::from_millis(1900)), ..FAST };
    for (what, here, peer, expect) in [
        ("nothing to gain", IDLE, peer(1), None),
        ("a queue here", queued, peer(1), Some(true)),
        ("a queue there, too", queued, PrefillPeer { load: queued, ..peer(1) }, None),
        ("streams here that it would stop", decoding, prefiller, Some(true)),
        ("streams there, too", decoding, PrefillPeer { load: decoding, ..peer(1) }, None),
        ("a faster peer", IDLE, fast, Some(true)),
        ("a path that takes longer than computing", IDLE, PrefillPeer { link: slow, ..fast }, None),
        ("a path that is too far", IDLE, PrefillPeer { link: far, ..fast }, None),
        ("a peer that only decodes", queued, PrefillPeer { role: NodeRole::Decode, ..fast }, None),
        ("a peer that is not well", queued, PrefillPeer { avoid: true, ..fast }, None),
        (
            "a peer that has measured nothing",
            IDLE,
            PrefillPeer { load: PrefillLoad::default(), ..peer(1) },
            None,
        ),
    ] {
        let asked = sources(&inputs(here, &[peer]));
        assert_eq!(asked.first().map(|s| s.1), expect, "{what}");
    }
}

#[test]
fn the_rule_by_hand() {
    // Here: 1,000 queued + 2,000 to compute at 1,000 a second, 4 streams that wait for the 2,000.
    let here = PrefillLoad { queue_tokens: 1000, running: 4, turn_us: 20_000, ..IDLE };
    // There: 100 queued, 4,000 a second; 24.6 MB at 20 MB/s take longer than the prefill.
    let load =
        PrefillLoad { queue_tokens: 100, prefill_rate: 4000, running: 1, turn_us: 5_000, ..IDLE };
    let link = LinkFigures { bytes_per_s: Some(20_000_000), ..FAST };
    let peers = [PrefillPeer { load, link, ..peer(1) }];
    let plan = plan_prefill(&inputs(here, &peers), &config());
    let [local, remote] = plan.options[..] else { panic!("{plan:?}") };
    assert_eq!((local.queue_us, local.prefill_us, local.kv_us), (1_000_000, 2_000_000, 0));
    assert_eq!(local.harm_us, 2_000_000 * 4 / 10);
    assert_eq!((remote.queue_us, remote.prefill_us), (25_000, 500_000));
    let transfer_us = 2000 * 12_288 * 1_000_000 / 20_000_000;
    // The rest, rtt, commit, and a step of each.
    assert_eq!(remote.kv_us, transfer_us - 500_000 + 1_000 + 2_000 + 25_000);
    assert_eq!(remote.harm_us, 500_000 / 10);
    assert_eq!(plan.kind(), PrefillKind::Remote);
    assert_eq!(*plan.chosen(), remote);
    // Faster than its prefill, the path still has to bring the last chunk.
    let peers = [PrefillPeer { link: FAST, ..peers[0] }];
    let plan = plan_prefill(&inputs(here, &peers), &config());
    assert_eq!(plan.options[1].kv_us, 512 * 12_288 / 1000 + 3_000 + 25_000);
}

/// By hand: 100 µs for each token that lies below a pool.
#[test]
fn what_lies_below_a_pool_is_brought_up_first() {
    let theirs = PrefillPeer { overlap_tokens: 1600, ..peer(1) };
    let check = |(cached, below), there, expect: [u64; 2]| {
        let peers = [PrefillPeer { below_tokens: there, ..theirs }];
        let inputs = PrefillInputs { below_tokens: below, ..inputs_with(cached, &peers) };
        let inputs = PrefillInputs { mode: Disagg::Never, ..inputs };
        let plan = plan_prefill(&inputs, &config());
        let [local, fetch] = plan.options[..] else { panic!("{plan:?}") };
        assert_eq!([local.raise_us, fetch.raise_us], expect, "{cached} {below} {there}");
        assert_eq!(local.ttft_us(), local.raise_us + local.prefill_us);
        assert_eq!(plan.below_tokens, below);
    };
    check((0, 0), 0, [0, 0]);
    check((320, 320), 0, [32_000, 32_000]);
    check((320, 160), 800, [16_000, 96_000]);
    // no more than what is asked for, or than is there
    check((1440, 0), 1600, [0, 16_000]);
    check((320, 1_000), u64::MAX, [32_000, 32_000 + 128_000]);
}

#[test]
fn a_small_gain_is_none() {
    // At 100 tokens: 100 ms here. 20 ms must be saved, and a tenth.
    for (peer_rate, expect) in [(1200, 0), (1250, 0), (2000, 1)] {
        let load = PrefillLoad { prefill_rate: peer_rate, ..IDLE };
        let peers = [PrefillPeer { load, ..peer(1) }];
        let short = PrefillInputs { prompt_tokens: 112, ..inputs(IDLE, &peers) };
        assert_eq!(sources(&short).len(), expect, "{peer_rate}");
    }
    // At 20,000 tokens a tenth is two seconds.
    for (peer_rate, expect) in [(1080, 0), (1200, 1)] {
        let load = PrefillLoad { prefill_rate: peer_rate, ..IDLE };
        let peers = [PrefillPeer { load, ..peer(1) }];
        let long = PrefillInputs { prompt_tokens: 20_000, ..inputs(IDLE, &peers) };
        assert_eq!(sources(&long).len(), expect, "{peer_rate}");
    }
}

#[test]
fn cached_prefixes_are_fetched() {
    let has = |n, overlap_tokens| PrefillPeer { overlap_tokens, ..peer(n) };
    let decoder = |n, tokens| PrefillPeer { role: NodeRole::Decode, ..has(n, tokens) };
    for (what, cached, peers, expect) in [
        ("from who has it, though it only decodes", 0, vec![decoder(1, 1984)], vec![(1, false)]),
        ("not what is here", 1984, vec![decoder(1, 1984)], vec![]),
        ("nor less than a block more", 1984, vec![decoder(1, 1999)], vec![]),
        ("most first", 0, vec![decoder(1, 1000), decoder(2, 1984)], vec![(2, false), (1, false)]),
        ("from who computes the rest, too", 0, vec![has(1, 1000)], vec![(1, true)]),
    ] {
        // Who would compute the rest has nothing else to do, this node has.
        let here = PrefillLoad { running: 2, ..IDLE };
        let inputs = PrefillInputs { here, ..inputs_with(cached, &peers) };
        assert_eq!(sources(&inputs), expect, "{what}");
    }
    // What is cached here is no start for a peer: it computes all of it.
    let peers = [peer(1)];
    let plan = plan_prefill(&inputs_with(1600, &peers), &config());
    assert_eq!(plan.options[1].prefill_us, 2_000_000);
    assert_eq!(plan.options[0].prefill_us, 400_000);
}

#[test]
fn modes() {
    let queued = PrefillLoad { queue_tokens: 9000, ..IDLE };
    let prefiller = PrefillPeer { role: NodeRole::Prefill, load: queued, ..peer(1) };
    let both = peer(2);
    let decoder = PrefillPeer { role: NodeRole::Decode, overlap_tokens: 1984, ..peer(3) };
    let peers = [prefiller, both, decoder];
    for (mode, here, expect) in [
        (Disagg::Auto, queued, vec![(2, true), (3, false)]),
        (Disagg::Auto, IDLE, vec![(3, false)]),
        (Disagg::Never, queued, vec![(3, false)]),
        // Those that are there for it first, whatever it costs; caches come last.
        (Disagg::Always, IDLE, vec![(1, true), (3, false), (2, true)]),
    ] {
        let inputs = PrefillInputs { mode, ..inputs(here, &peers) };
        let mut asked = sources(&inputs);
        if mode == Disagg::Always {
            assert_eq!(asked[0], (1, true));
            asked.sort_unstable();
            let mut expect = expect.clone();
            expect.sort_unstable();
            assert_eq!(asked, expect, "{mode:?}");
            continue;
        }
        asked.sort_unstable();
        assert_eq!(asked, expect, "{mode:?}");
    }
    // With nobody who could, always is not never answering.
    let always = PrefillInputs { mode: Disagg::Always, ..inputs(IDLE, &[]) };
    assert_eq!(plan_prefill(&always, &config()).kind(), PrefillKind::Recompute);
}

#[test]
fn bounds() {
    let load = PrefillLoad { prefill_rate: 9000, ..IDLE };
    let peers: Vec<PrefillPeer> = (1..=200).map(|n| PrefillPeer { load, ..peer(n) }).collect();
    let plan = plan_prefill(&inputs(IDLE, &peers), &config());
    assert_eq!((plan.sources.len(), plan.options.len()), (SOURCES_MAX, OPTIONS_KEPT_MAX));
    // Equals in the order of their ids: the same every time.
    assert_eq!(plan.sources[0], PlannedSource { peer: node(1), prefill: true });
    // Numbers that nobody honest sends.
    let huge = PrefillLoad {
        queue_tokens: u64::MAX,
        prefill_rate: 1,
        running: u64::MAX,
        turn_us: u64::MAX,
        raise_ns_per_token: u64::MAX,
    };
    let wild = PrefillPeer {
        load: huge,
        overlap_tokens: u64::MAX,
        below_tokens: u64::MAX,
        link: LinkFigures { rtt: Some(Duration::MAX), bytes_per_s: Some(0) },
        ..peer(1)
    };
    let inputs = PrefillInputs {
        prompt_tokens: u64::MAX,
        bytes_per_token: u32::MAX,
        block_tokens: 0,
        cached_tokens: 7,
        ..inputs(huge, std::slice::from_ref(&wild))
    };
    assert_eq!(plan_prefill(&inputs, &config()).kind(), PrefillKind::Recompute);
    let shrunk = PrefillInputs { prompt_tokens: 3, cached_tokens: 900, ..inputs };
    assert_eq!(plan_prefill(&shrunk, &config()).kind(), PrefillKind::Recompute);
}
