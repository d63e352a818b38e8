//! The directory of KV blocks under faults; docs/kv-directory.md.

use sim::directory::{Counts, Plan, Sabotage};

#[test]
fn after_mixed_faults_owners_know_what_every_node_has() {
    let (mut failed, mut counts) = (Vec::new(), Counts::default());
    for seed in 0..SEEDS {
        let outcome = Plan::mixed(seed, None).run(false);
        if !outcome.broken.is_empty() {
            failed.push(format!("seed {seed}: {}", outcome.broken.join("; ")));
        }
        counts.add(&outcome.counts);
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    // Something was said, asked and compared.
    let used = counts.found > SEEDS && counts.holders > 10 * SEEDS;
    assert!(used && counts.compared > 100 * SEEDS && counts.dumps > 5 * SEEDS, "{counts:?}");
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let bytes = |seed| Plan::mixed(seed, None).run(true).transcript.expect("kept");
    for seed in [3, 4] {
        assert!(bytes(seed) == bytes(seed), "seed {seed}: two runs differ");
    }
    assert!(bytes(3) != bytes(4) && bytes(3).len() > 5_000);
}

/// Each wrong that a shell could do is seen by an oracle, within a few seeds.
#[test]
fn the_oracles_see_every_sabotage() {
    for (sabotage, sign) in [
        (Sabotage::KeepRemoved, "names of node"),
        (Sabotage::ForgetStored, "names of node"),
        (Sabotage::HideDepartures, "which has left"),
        (Sabotage::DeafToTimers, "names of node"),
    ] {
        let seen = (0..SABOTAGE_SEEDS).any(|seed| {
            let broken = Plan::mixed(seed, Some(sabotage)).run(false).broken;
            broken.iter().any(|what| what.contains(sign))
        });
        assert!(seen, "{sabotage:?} was not seen in {SABOTAGE_SEEDS} seeds");
    }
}

/// What is changed on its way to the owner's table is noticed and said again.
#[test]
fn a_wrong_set_is_noticed_and_repaired() {
    let mut counts = Counts::default();
    for seed in 0..SABOTAGE_SEEDS {
        let outcome = Plan::mixed(seed, Some(Sabotage::ChangeNames)).run(false);
        assert!(outcome.broken.is_empty(), "seed {seed}: {}", outcome.broken.join("; "));
        counts.add(&outcome.counts);
    }
    assert!(counts.unequal > SABOTAGE_SEEDS, "{counts:?}");
}

const SEEDS: u64 = 150;
const SABOTAGE_SEEDS: u64 = 30;
