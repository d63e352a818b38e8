//! What is remembered of decisions, and what came of them.

use super::*;
use scheduler::router::{
    DECISION_BYTES_MAX, DECISIONS_MAX, Decided, Decision, Disagg, End, OTHERS_KEPT_MAX,
    PrefillInputs, PrefillLoad, ReplicaDecision, Why, plan_prefill,
};

fn last(router: &Router, request: u128) -> Decision {
    router.decisions().of(RequestId(request)).last().expect("it is kept").clone()
}

fn replica(decision: &Decision) -> &ReplicaDecision {
    match &decision.what {
        Decided::Replica(replica) => replica,
        Decided::Prefill(plan) => panic!("{plan:?}"),
    }
}

#[test]
fn what_was_known_and_what_came_of_it() {
    let mut router = router(&[(1, load(0, 0, 1000)), (2, load(0, 400, 1000))]);
    router.report(at(0), node(3), [("m".to_owned(), ReplicaLoad::default())]);
    let choice = router.choose(at(10), &ask(1)).unwrap();
    assert_eq!((choice.node, choice.why), (node(1), Why::Cheapest));
    let decision = last(&router, 1);
    let what = replica(&decision);
    assert_eq!(what.chosen.unwrap().node, node(1));
    let others: Vec<_> = what.others.iter().map(|c| (c.node, c.load.prompt_tokens)).collect();
    assert_eq!((others, what.others_total), (vec![(node(2), 400)], 1));
    assert_eq!(what.unavailable, [(node(3), Unavailable::NotReady)]);
    router.settle(at(100), node(1), RequestId(1), Outcome::Began);
    router.decisions_mut().first_token(at(125), RequestId(1));
    router.decisions_mut().first_token(at(130), RequestId(1));
    router.settle(at(900), node(1), RequestId(1), Outcome::Ended);
    let outcome = last(&router, 1).outcome;
    assert_eq!(outcome.answer_began, Some(at(100)));
    assert_eq!(outcome.first_token, Some(at(125)));
    assert_eq!(outcome.ended, Some((at(900), End::Done)));
    assert_eq!(outcome.regret_us, Some(0), "the other would have taken half a second");
    let stats = router.decisions().stats();
    // Thought: 100 ms for the prompt and 5 for the hop. Was: 115.
    assert_eq!((stats.first_tokens, stats.error_us, stats.regret_us), (1, 10_000, 0));
    assert_eq!(stats.replicas, [1, 0, 0, 0, 0]);
}

#[test]
fn attempts_of_one_request_are_decisions_of_their_own() {
    let mut router = router(&[(1, load(0, 0, 1000)), (2, load(0, 400, 1000))]);
    router.choose(at(10), &ask(1)).unwrap();
    router.settle(at(20), node(1), RequestId(1), Outcome::Failed);
    let excluded = [node(1)];
    let second = Ask { excluded: &excluded, ..ask(1) };
    router.choose(at(30), &second).unwrap();
    router.settle(at(40), node(2), RequestId(1), Outcome::Refused { retry_after: SECOND });
    let both = [node(1), node(2)];
    router.choose(at(50), &Ask { excluded: &both, ..second }).unwrap_err();
    let all: Vec<_> = router.decisions().of(RequestId(1)).collect();
    let ends: Vec<_> = all.iter().map(|d| d.outcome.ended.map(|(_, end)| end)).collect();
    assert_eq!(ends, [Some(End::Failed), Some(End::Refused), None]);
    let why: Vec<_> = all.iter().map(|d| replica(d).why).collect();
    assert_eq!(why, [Why::Cheapest, Why::Only, Why::Nobody]);
    assert_eq!(replica(all[2]).unavailable.len(), 2);
    // None of them has a first token, and none is anybody's regret.
    assert!(all.iter().all(|d| d.outcome.regret_us.is_none()));
    assert_eq!(router.decisions().stats().first_tokens, 0);
}

/// The chosen one is as slow as it was thought to be, or slower.
#[test]
fn regret_is_what_the_next_best_would_have_saved() {
    // 105 ms against 505 with the hop; 4 ms of gaps each, since nothing runs.
    for (took_ms, regret_ms) in [(105, 0), (505, 0), (506, 1), (1505, 1000)] {
        let mut router = router(&[(1, load(0, 0, 1000)), (2, load(0, 400, 1000))]);
        router.choose(at(0), &ask(1)).unwrap();
        router.decisions_mut().first_token(at(took_ms), RequestId(1));
        assert_eq!(last(&router, 1).outcome.regret_us, Some(regret_ms * 1000), "{took_ms}");
    }
    // Alone there is nothing to regret.
    let mut router = router(&[(1, load(0, 0, 1000))]);
    router.choose(at(0), &ask(1)).unwrap();
    router.decisions_mut().first_token(at(9000), RequestId(1));
    assert_eq!(last(&router, 1).outcome.regret_us, None);
}

#[test]
fn a_model_that_is_too_hopeful_about_all_alike_has_chosen_well() {
    // Everything takes 300 ms longer than it was thought to; the next best is thought to cost 100 more.
    let mut router = router(&[(1, load(0, 0, 1000)), (2, load(0, 100, 1000))]);
    let mut regrets = Vec::new();
    for request in 0..400 {
        let now = u64::try_from(request).unwrap() * 10_000;
        router.choose(at(now), &ask(request)).unwrap();
        router.decisions_mut().first_token(at(now + 405), RequestId(request));
        router.settle(at(now + 1000), node(1), RequestId(request), Outcome::Ended);
        regrets.push(last(&router, request).outcome.regret_us.unwrap());
        let reports = [(1, load(0, 0, 1000)), (2, load(0, 100, 1000))];
        for (n, load) in reports {
            router.report(at(now + 2000), node(n), [("m".to_owned(), load)]);
        }
    }
    assert_eq!(regrets[0], 200_000, "at first the model is believed");
    assert_eq!(regrets[399], 0, "then what it is wrong by is known");
    let bias = router.decisions().stats().bias_us;
    assert!((290_000..=300_000).contains(&bias), "{bias}");
}

#[test]
fn prompts_have_decisions_too() {
    let mut router = router(&[]);
    let inputs = PrefillInputs {
        mode: Disagg::Auto,
        prompt_tokens: 2000,
        cached_tokens: 0,
        below_tokens: 0,
        bytes_per_token: 1,
        block_tokens: 16,
        here: PrefillLoad::default(),
        peers: &[],
    };
    let plan = plan_prefill(&inputs, router.config());
    let decisions = router.decisions_mut();
    decisions.record(at(1), RequestId(5), Decided::Prefill(plan.clone()));
    decisions.prefill_ended(at(9), RequestId(5), End::Done);
    // Nothing of a replica's decision is mistaken for it.
    decisions.first_token(at(10), RequestId(5));
    let kept = last(&router, 5);
    assert_eq!((kept.what, kept.outcome.ended), (Decided::Prefill(plan), Some((at(9), End::Done))));
    assert_eq!(kept.outcome.first_token, None);
    assert_eq!(router.decisions().stats().recompute, 1);
}

#[test]
fn it_forgets_the_oldest() {
    let mut router = router(&[(1, load(0, 0, 1000))]);
    let total = DECISIONS_MAX as u128 + 10;
    for request in 0..total {
        router.choose(at(1), &ask(request)).unwrap();
        router.settle(at(1), node(1), RequestId(request), Outcome::Ended);
    }
    assert_eq!(router.decisions().len(), DECISIONS_MAX);
    assert_eq!(router.decisions().stats().dropped, 10);
    assert_eq!(router.decisions().of(RequestId(9)).count(), 0);
    assert_eq!(router.decisions().of(RequestId(10)).count(), 1);
    assert_eq!(router.decisions().latest().next(), Some(RequestId(total - 1)));
    // Long names take their place, too: about four thousand bytes each, within the bound in bytes.
    let long = "m".repeat(4096);
    router.report(at(2), node(1), [(long.clone(), load(0, 0, 1000))]);
    for request in 0..total {
        router.choose(at(3), &Ask { model: &long, ..ask(request) }).unwrap();
        router.settle(at(3), node(1), RequestId(request), Outcome::Ended);
    }
    let kept = router.decisions().len();
    assert!(kept < DECISIONS_MAX && kept > DECISION_BYTES_MAX / 8192, "{kept}");
}

#[test]
fn of_many_the_best_are_kept() {
    let loads: Vec<_> = (1..=100).map(|n| (n, load(0, u64::from(n) * 10, 1000))).collect();
    let mut router = router(&loads);
    router.choose(at(1), &ask(1)).unwrap();
    let decision = last(&router, 1);
    let kept: Vec<u8> = replica(&decision).others.iter().map(|c| c.node.0[0]).collect();
    let best: Vec<u8> = (2..).take(OTHERS_KEPT_MAX).collect();
    assert_eq!((kept, replica(&decision).others_total), (best, 99));
}
