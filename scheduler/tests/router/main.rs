//! The router: tables of one decision, then runs of many.

mod cost;
mod decisions;
mod policies;
mod prefill;
mod reference;

use std::collections::BTreeMap;

use protocol::{Duration, Instant, NodeId, RequestId};
use scheduler::router::{Ask, NoReplica, Outcome, ReplicaLoad, Router, RouterConfig, Unavailable};

const OWN: NodeId = node(0);

const fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn at(ms: u64) -> Instant {
    Instant::from_millis(ms)
}

fn load(running: u32, prompt_tokens: u64, prefill_rate: u32) -> ReplicaLoad {
    let base = ReplicaLoad { ready: true, weights: 7, ..ReplicaLoad::default() };
    ReplicaLoad { running, prompt_tokens, prefill_rate, ..base }
}

/// Nobody has anything cached.
static NO_OVERLAP: BTreeMap<NodeId, u64> = BTreeMap::new();

fn ask(request: u128) -> Ask<'static> {
    Ask {
        request: RequestId(request),
        model: "m",
        prompt_tokens: 100,
        output_tokens: 100,
        overlap_tokens: &NO_OVERLAP,
        below_tokens: &NO_OVERLAP,
        excluded: &[],
        suspected: &[],
        weights: None,
    }
}

/// Nothing is tried out: each choice is the cheapest.
fn config() -> RouterConfig {
    RouterConfig { explore_permille: 0, ..RouterConfig::default() }
}

fn router(loads: &[(u8, ReplicaLoad)]) -> Router {
    let mut router = Router::new(OWN, config());
    for (n, load) in loads {
        router.report(at(0), node(*n), [("m".to_owned(), *load)]);
    }
    router
}

#[test]
fn the_least_loaded_is_chosen() {
    let idle = load(0, 0, 1000);
    for (what, loads, expect) in [
        ("this node, all else equal", vec![(0, idle), (1, idle)], 0),
        ("another, if this one is busy", vec![(0, load(1, 0, 1000)), (1, idle)], 1),
        ("fewer prompt tokens", vec![(1, load(0, 5000, 1000)), (2, load(0, 300, 1000))], 2),
        ("the faster", vec![(1, load(0, 1000, 500)), (2, load(0, 1000, 5000))], 2),
        ("fewer streams", vec![(1, load(9, 0, 1000)), (2, load(2, 0, 1000))], 2),
        ("a measured one", vec![(1, load(0, 0, 0)), (2, load(0, 0, 1000))], 2),
        (
            "one that is ready",
            vec![(1, ReplicaLoad { ready: false, ..idle }), (2, load(9, 9000, 1000))],
            2,
        ),
    ] {
        let choice = router(&loads).choose(at(10), &ask(1)).expect(what);
        assert_eq!(choice.node, node(expect), "{what}");
    }
}

#[test]
fn a_name_stands_for_one_set_of_weights() {
    let of = |weights, running| ReplicaLoad { weights, ..load(running, 0, 1000) };
    let choose = |loads: &[(u8, ReplicaLoad)], excluded: &[NodeId]| {
        let ask = Ask { excluded, ..ask(1) };
        router(loads).choose(at(10), &ask).unwrap().node
    };
    let loads = [(1, of(1, 0)), (2, of(2, 5)), (3, of(2, 6))];
    assert_eq!(choose(&loads, &[]), node(2), "those of most replicas, though busier");
    assert_eq!(router(&loads).weights("m"), Some((2, true)));
    assert_eq!(choose(&loads, &[node(2), node(3)]), node(1), "others before none");
    let with_own = [(0, of(1, 50)), (1, of(1, 0)), (2, of(2, 0)), (3, of(2, 0))];
    assert_eq!(choose(&with_own, &[]), node(1), "this node's");
    let suspicious = Ask { suspected: &[node(2), node(3)], ..ask(1) };
    assert_eq!(
        router(&loads).choose(at(10), &suspicious).unwrap().node,
        node(2),
        "a suspect first"
    );
    let unready = ReplicaLoad { ready: false, ..of(1, 0) };
    assert_eq!(router(&[(0, unready), (1, of(2, 0))]).weights("m"), Some((2, false)));
    assert_eq!(router(&[]).weights("m"), None);
}

#[test]
fn it_counts() {
    let mut router = router(&[(0, load(0, 0, 1000)), (1, load(0, 0, 9000))]);
    assert_eq!(router.choose(at(1), &ask(1)).unwrap().node, node(1));
    assert_eq!(router.in_flight_elsewhere(), 1);
    router.settle(at(2), node(1), RequestId(1), Outcome::Failed);
    let own = Ask { excluded: &[node(1)], ..ask(1) };
    assert_eq!(router.choose(at(3), &own).unwrap().node, OWN);
    let nobody = Ask { excluded: &[OWN, node(1)], ..ask(1) };
    assert!(router.choose(at(3), &nobody).is_err());
    let stats = router.stats();
    assert_eq!((stats.chosen_own, stats.chosen_peer), (1, 1));
    assert_eq!((stats.failed, stats.unavailable, stats.refused), (1, 1, 0));
    assert_eq!((router.in_flight_elsewhere(), router.breakers_open(at(3))), (0, 0));
}

#[test]
fn a_suspect_is_asked_only_if_no_other_can_be() {
    let mut router = router(&[(1, load(0, 0, 1000)), (2, load(90, 0, 1000))]);
    let suspected = [node(1)];
    let suspicious = Ask { suspected: &suspected, ..ask(1) };
    assert_eq!(router.choose(at(1), &suspicious).unwrap().node, node(2));
    let excluded = [node(2)];
    let nobody_else = Ask { excluded: &excluded, ..suspicious };
    assert_eq!(router.choose(at(1), &nobody_else).unwrap().node, node(1));
    assert_eq!(router.choose(at(1), &ask(1)).unwrap().node, node(1));
}

#[test]
fn what_was_sent_counts_until_a_report_can_know_of_it() {
    let idle = load(0, 0, 1000);
    let mut router = router(&[(1, idle), (2, idle)]);
    // A burst upon the same report spreads evenly.
    let mut counts = [0; 3];
    for request in 0..100 {
        let choice = router.choose(at(10), &ask(request)).unwrap();
        counts[usize::from(choice.node.0[0])] += 1;
    }
    assert_eq!(counts, [0, 50, 50]);
    // A report that arrives at once cannot know of it yet.
    router.report(at(11), node(1), [("m".to_owned(), idle)]);
    router.report(at(11), node(2), [("m".to_owned(), load(1, 0, 1000))]);
    assert_eq!(router.choose(at(12), &ask(1000)).unwrap().node, node(1));
    // One that arrives later does: it is believed, whatever was sent before.
    router.report(at(5000), node(1), [("m".to_owned(), load(50, 0, 1000))]);
    router.report(at(5000), node(2), [("m".to_owned(), load(1, 0, 1000))]);
    for request in 2000..2005 {
        assert_eq!(router.choose(at(5001), &ask(request)).unwrap().node, node(2));
    }
    assert_eq!(router.in_flight(node(1)), 51);
    for request in 0..100 {
        router.settle(at(5002), node(1), RequestId(request), Outcome::Ended);
        router.settle(at(5002), node(2), RequestId(request), Outcome::Ended);
    }
    assert_eq!(router.in_flight(node(1)), 1, "request 1000 is still under way");
}

#[test]
fn ties_spread_over_requests_and_not_over_time() {
    let idle = load(0, 0, 1000);
    let mut counts = [0; 5];
    for request in 0..1000 {
        let mut router = router(&[(1, idle), (2, idle), (3, idle), (4, idle)]);
        let again = router.choose(at(1), &ask(request)).unwrap().node;
        router.settle(at(2), again, RequestId(request), Outcome::Ended);
        assert_eq!(router.choose(at(3), &ask(request)).unwrap().node, again);
        counts[usize::from(again.0[0])] += 1;
    }
    assert!(counts[1..].iter().all(|&c| (200..300).contains(&c)), "{counts:?}");
}

#[test]
fn who_has_the_model_and_cannot_be_asked_is_named() {
    let idle = load(0, 0, 1000);
    let mut router = router(&[(1, idle), (2, idle), (3, idle)]);
    let other = Ask { model: "other", ..ask(1) };
    assert_eq!(router.choose(at(1), &other), Err(NoReplica::UnknownModel));
    router.path(node(1), false);
    router.settle(at(1), node(2), RequestId(7), Outcome::Refused { retry_after: SECOND });
    let excluded = [node(3)];
    let ask = Ask { excluded: &excluded, ..ask(2) };
    let expect = vec![
        (node(1), Unavailable::PathDown),
        (node(2), Unavailable::Busy { retry_after: SECOND }),
        (node(3), Unavailable::Tried),
    ];
    assert_eq!(router.choose(at(1), &ask), Err(NoReplica::Unavailable(expect)));
    router.path(node(1), true);
    assert_eq!(router.choose(at(1), &ask).unwrap().node, node(1));
    router.forget(node(1));
    assert_eq!(router.choose(at(1002), &ask).unwrap().node, node(2));
}

#[test]
fn a_failing_node_is_left_alone_and_tried_again_once() {
    let mut router = router(&[(1, load(0, 0, 1000))]);
    let mut now = 10;
    for request in 0..3 {
        assert_eq!(router.choose(at(now), &ask(request)).unwrap().node, node(1));
        router.settle(at(now), node(1), RequestId(request), Outcome::Failed);
    }
    // Open for a second and up to a quarter more, then twice as long at each failed trial, up to 30 s.
    for expect_s in [1, 2, 4, 8, 16, 30, 30] {
        let retry_after = failing(router.choose(at(now), &ask(50)).unwrap_err());
        let (min, max) = (SECOND * expect_s, SECOND * expect_s * 5 / 4);
        assert!((min..=max).contains(&retry_after), "{expect_s} s: {retry_after:?}");
        now += retry_after.as_millis() as u64 + 1;
        assert_eq!(router.choose(at(now), &ask(60)).unwrap().node, node(1));
        // One trial at a time.
        failing(router.choose(at(now), &ask(61)).unwrap_err());
        router.settle(at(now), node(1), RequestId(60), Outcome::Failed);
    }
    now += 40_000;
    router.choose(at(now), &ask(70)).unwrap();
    router.settle(at(now), node(1), RequestId(70), Outcome::Began);
    router.choose(at(now), &ask(71)).expect("closed by one success");
    // And its patience is as before.
    router.settle(at(now), node(1), RequestId(71), Outcome::Failed);
    router.choose(at(now), &ask(72)).expect("one failure is not enough");
}

#[test]
fn a_trial_without_an_outcome_does_not_last_for_ever() {
    let mut router = router(&[(1, load(0, 0, 1000))]);
    for request in 0..3 {
        router.choose(at(10), &ask(request)).unwrap();
        router.settle(at(10), node(1), RequestId(request), Outcome::Failed);
    }
    router.choose(at(2000), &ask(10)).expect("the trial");
    failing(router.choose(at(2001), &ask(11)).unwrap_err());
    router.choose(at(3001), &ask(12)).expect("the next trial");
}

#[test]
fn this_node_is_never_broken() {
    let mut router = router(&[(0, load(0, 0, 1000))]);
    router.path(OWN, false);
    for request in 0..10 {
        assert_eq!(router.choose(at(1), &ask(request)).unwrap().node, OWN);
        router.settle(at(1), OWN, RequestId(request), Outcome::Failed);
    }
}

/// Four nodes of unequal speed, requests from four routers that hear of each other's load only by
/// reports that are half a second old. No replica waits while another is drowned.
#[test]
fn stale_reports_do_not_herd() {
    const RATES: [u32; 4] = [1000, 1000, 2000, 4000];
    let mut routers: Vec<Router> = (0..4).map(|n| Router::new(node(n), config())).collect();
    // Prompt tokens that each node still has to compute.
    let mut backlog = [0.0f64; 4];
    let (mut history, mut worst): (Vec<[f64; 4]>, f64) = (Vec::new(), 0.0);
    for tick in 0..2_000u64 {
        let now = at(tick * 10);
        history.push(backlog);
        // A report each 250 ms, half a second on its way.
        if tick % 25 == 0 && tick >= 50 {
            let old = history[tick as usize - 50];
            for router in &mut routers {
                for (n, &rate) in RATES.iter().enumerate() {
                    let report = load(0, old[n] as u64, rate);
                    router.report(now, node(n as u8), [("m".to_owned(), report)]);
                }
            }
        } else if tick == 0 {
            for router in &mut routers {
                for (n, &rate) in RATES.iter().enumerate() {
                    router.report(now, node(n as u8), [("m".to_owned(), load(0, 0, rate))]);
                }
            }
        }
        // Together 0.9 of what the nodes can do: 72 tokens a tick, from one router after another.
        let request = u128::from(tick).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c834);
        let ask = Ask { prompt_tokens: 72, output_tokens: 16, ..ask(request) };
        let router = &mut routers[(tick % 4) as usize];
        let choice = router.choose(now, &ask).unwrap();
        backlog[usize::from(choice.node.0[0])] += 72.0;
        router.settle(now, choice.node, RequestId(request), Outcome::Began);
        for (backlog, rate) in backlog.iter_mut().zip(RATES) {
            *backlog = (*backlog - f64::from(rate) / 100.0).max(0.0);
        }
        if tick > 200 {
            for (backlog, rate) in backlog.iter().zip(RATES) {
                worst = worst.max(backlog / f64::from(rate));
            }
        }
    }
    assert!(worst < 2.0, "a replica was {worst:.2} s behind at nine tenths of the load");
}

fn failing(error: NoReplica) -> Duration {
    match error {
        NoReplica::Unavailable(nodes) => match nodes[..] {
            [(_, Unavailable::Failing { retry_after })] => retry_after,
            _ => panic!("{nodes:?}"),
        },
        NoReplica::UnknownModel => panic!("the model is known"),
    }
}

const SECOND: Duration = Duration::from_secs(1);
