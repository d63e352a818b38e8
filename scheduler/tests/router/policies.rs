//! What the cost is compared with.

use super::*;
use scheduler::router::Policy;

/// The nodes chosen for so many requests, each of which ends before the next.
fn chosen(policy: Policy, loads: &[(u8, ReplicaLoad)], overlap: &[(u8, u64)], n: u128) -> Vec<u8> {
    let mut router = Router::new(OWN, RouterConfig { policy, ..config() });
    for (id, load) in loads {
        router.report(at(0), node(*id), [("m".to_owned(), *load)]);
    }
    let overlap: BTreeMap<NodeId, u64> = overlap.iter().map(|&(n, t)| (node(n), t)).collect();
    let one = |request| {
        let ask = Ask { prompt_tokens: 2000, overlap_tokens: &overlap, ..ask(request) };
        let node = router.choose(at(10), &ask).unwrap().node;
        router.settle(at(10), node, RequestId(request), Outcome::Ended);
        node.0[0]
    };
    (0..n).map(one).collect()
}

#[test]
fn each_goes_by_its_own() {
    let idle = load(0, 0, 1000);
    let busy = load(3, 500, 1000);
    for (policy, loads, overlap, expect) in [
        (Policy::RoundRobin, vec![(1, busy), (2, idle), (3, busy)], vec![], vec![1, 2, 3, 1]),
        (Policy::LeastLoaded, vec![(1, busy), (2, idle)], vec![(1, 1900)], vec![2, 2, 2, 2]),
        (Policy::PrefixOnly, vec![(1, busy), (2, idle)], vec![(1, 1900)], vec![1, 1, 1, 1]),
        (Policy::Cost, vec![(1, busy), (2, idle)], vec![(1, 1900)], vec![1, 1, 1, 1]),
    ] {
        assert_eq!(chosen(policy, &loads, &overlap, 4), expect, "{policy:?}");
    }
    // None asks who cannot be asked.
    let gone = ReplicaLoad { ready: false, ..idle };
    for policy in Policy::ALL {
        let loads = [(1, gone), (3, busy)];
        assert_eq!(chosen(policy, &loads, &[(1, 1900)], 3), [3; 3], "{policy:?}");
    }
}
