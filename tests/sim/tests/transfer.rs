//! Hand-offs of KV blocks under faults; docs/kv-transfer.md.

use sim::transfer::{
    Counts, EventFault, EventFaultAt, Fate, HAND_OFF, Plan, Sabotage, event_faults,
    events_of_hand_off, undisturbed, with_faults,
};

#[test]
fn mixed_faults_end_in_right_tokens_and_nothing_left() {
    let (mut failed, mut counts, mut right) = (Vec::new(), Counts::default(), 0);
    for seed in 0..SEEDS {
        let outcome = Plan::mixed(seed, None).run(false);
        if !outcome.broken.is_empty() {
            failed.push(format!("seed {seed}: {}", outcome.broken.join("; ")));
        }
        counts.add(&outcome.counts);
        let is_right = |fate: &Option<Fate>| matches!(fate, Some(Fate::Right { .. }));
        right += outcome.fates.iter().filter(|(_, fate)| is_right(fate)).count();
    }
    assert!(failed.is_empty(), "`simulate transfer-replay SEED`\n{}", failed.join("\n"));
    // What the machines must survive has happened.
    for error in ["Refused", "Exhausted", "Unanswered", "Silent", "Lost", "Corrupt"] {
        assert!(counts.failed.keys().any(|k| k.starts_with(error)), "no {error}: {counts:?}");
    }
    for end in ["Complete", "Incomplete", "NoRoom", "Deadline", "Cancelled"] {
        assert!(counts.handoffs.contains_key(end), "no {end}: {counts:?}");
    }
    let used = counts.fetched > 10 * SEEDS && counts.blocked > 0;
    let hard = counts.resumed > 0 && counts.stopped_streams > 0;
    assert!(used && hard && right > 5 * SEEDS as usize, "{right} right, {counts:?}");
}

#[test]
fn every_fault_at_every_event() {
    let mut failed = Vec::new();
    for seed in 0..HAND_OFFS {
        let all = event_faults(seed, true);
        assert!(all.len() > 12 * 150, "{} runs", all.len());
        for faults in all {
            let broken = with_faults(seed, &faults, false).broken;
            if !broken.is_empty() {
                failed.push(format!("seed {seed}, {faults:?}: {}", broken.join("; ")));
            }
        }
    }
    assert!(failed.is_empty(), "{} runs:\n{}", failed.len(), failed.join("\n"));
}

/// The same messages fetch what is cached, and a prefill brings what is not.
#[test]
fn a_cached_prefix_is_fetched() {
    for seed in 0..20 {
        for (cached, prefill, fetched, attempts) in [
            (30, [false, false], 7, 1),
            (17, [false, true], 7, 2),
            (17, [false, false], 4, 2),
            (17, [true, true], 7, 1),
            (4, [false, false], 1, 2),
        ] {
            let outcome = undisturbed(seed, cached, prefill);
            assert!(outcome.broken.is_empty(), "{:?}", outcome.broken);
            let (_, fate) = outcome.fates.iter().find(|(id, _)| *id == HAND_OFF).expect("begun");
            let right = Some(Fate::Right { fetched, prefilled: 7 - fetched });
            assert_eq!(*fate, right, "seed {seed}, {cached} tokens cached, {prefill:?}");
            // The last hand-off of the world needs one, too.
            assert_eq!(outcome.counts.attempts, attempts + 1);
        }
    }
}

/// Whenever the first sender dies: the second brings what is missing, and nothing is computed twice.
#[test]
fn a_dead_sender_costs_no_prefill() {
    for seed in 0..10 {
        for event in 0..=events_of_hand_off(seed, &[]) {
            let kill = EventFaultAt { event, fault: EventFault::KillSender, sender: 1 };
            let outcome = with_faults(seed, &[kill], false);
            assert!(outcome.broken.is_empty(), "{:?}", outcome.broken);
            let (_, fate) = outcome.fates.iter().find(|(id, _)| *id == HAND_OFF).expect("begun");
            let right = Some(Fate::Right { fetched: 7, prefilled: 0 });
            assert_eq!(*fate, right, "seed {seed}, after event {event}: {:?}", outcome.counts);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let bytes = |seed| Plan::mixed(seed, None).run(true).transcript.expect("kept");
    for seed in [3, 4, 5] {
        assert!(bytes(seed) == bytes(seed), "seed {seed}: two runs differ");
    }
    assert!(bytes(3) != bytes(4) && bytes(3).len() > 5_000);
    let faults = event_faults(5, true).pop().expect("there are some");
    let one = || with_faults(5, &faults, true).transcript.expect("kept");
    assert!(one() == one());
}

/// Each wrong that a shell could do is seen by an oracle, within a few seeds.
#[test]
fn the_oracles_see_every_sabotage() {
    for (sabotage, sign) in [
        (Sabotage::AttachUnverified, "wrong token"),
        (Sabotage::ReadBeforeCommit, "read uncommitted"),
        (Sabotage::IgnoreAttempt, "bytes of a past attempt"),
        (Sabotage::SkipTenant, "in a sequence of"),
        (Sabotage::WriterOutlivesStop, "changed hands"),
        (Sabotage::ReaderOutlivesStop, "freed while read"),
        (Sabotage::UnpinBeforeSent, "while read"),
        (Sabotage::DeafToTimers, "waits past its deadline"),
        (Sabotage::KeepBlocks, "blocks in use are left"),
        (Sabotage::NeverFree, "blocks in use are left"),
    ] {
        let seen = (0..SABOTAGE_SEEDS).any(|seed| {
            let broken = Plan::mixed(seed, Some(sabotage)).run(false).broken;
            broken.iter().any(|what| what.contains(sign))
        });
        assert!(seen, "{sabotage:?} was not seen in {SABOTAGE_SEEDS} seeds");
    }
}

const SEEDS: u64 = 400;
const HAND_OFFS: u64 = 1;
const SABOTAGE_SEEDS: u64 = 4000;
