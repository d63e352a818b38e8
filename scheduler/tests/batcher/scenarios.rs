//! Scenarios with one point each.

use crate::replica::{Replica, STEP_COST, identity, submission, tokens};
use protocol::{Duration, Instant, Machine, SequenceId};
use scheduler::{
    BatcherConfig, BatcherInput, BatcherOutput, DropReason, FinishReason, LogitsWanted,
    SequenceKind, StepResult, Submission,
};

fn replica(blocks: u32) -> Replica {
    Replica::new(BatcherConfig::new(blocks, 4096, identity()))
}

fn ended(replica: &Replica, id: u64) -> BatcherOutput {
    replica.sequences[&SequenceId(id)].ended.clone().expect("ended")
}

fn finished(id: u64, reason: FinishReason) -> BatcherOutput {
    BatcherOutput::Finished { sequence: SequenceId(id), reason }
}

fn dropped(id: u64, reason: DropReason) -> BatcherOutput {
    BatcherOutput::Dropped { sequence: SequenceId(id), reason }
}

#[test]
fn one_sequence_is_prefilled_in_chunks_and_decoded() {
    let mut replica = replica(200);
    replica.submit(submission(1, "a", tokens(1, 1000), 5));
    replica.run();
    replica.assert_quiescent();
    assert_eq!(ended(&replica, 1), finished(1, FinishReason::Length));
    let client = &replica.sequences[&SequenceId(1)];
    assert_eq!((client.generated.len(), client.tokens_computed), (5, 1004));
    // Two chunks, the second of which gives the first token, then four decodes.
    assert_eq!(replica.steps, 6);
}

#[test]
fn the_same_prompt_again_computes_its_end_only() {
    let mut replica = replica(200);
    for id in 1..=2 {
        replica.submit(submission(id, "a", tokens(1, 1000), 1));
        replica.run();
    }
    assert_eq!(replica.sequences[&SequenceId(2)].tokens_computed, 1000 - 62 * 16);
    // A whole number of blocks: the last one is computed again, for the logits of its last token.
    for id in 3..=4 {
        replica.submit(submission(id, "a", tokens(9, 160), 1));
        replica.run();
    }
    assert_eq!(replica.sequences[&SequenceId(4)].tokens_computed, 16);
    replica.assert_quiescent();
}

#[test]
fn a_next_turn_reuses_the_generated_tokens_too() {
    let mut replica = replica(200);
    replica.submit(submission(1, "a", tokens(1, 100), 100));
    replica.run();
    let mut second = replica.sequences[&SequenceId(1)].submission.tokens.clone();
    second.extend(&replica.sequences[&SequenceId(1)].generated);
    second.extend(tokens(2, 50));
    replica.submit(submission(2, "a", second, 1));
    replica.run();
    // 199 tokens of the first turn were computed: 12 full blocks.
    assert_eq!(replica.sequences[&SequenceId(2)].tokens_computed, 250 - 12 * 16);
}

#[test]
fn eight_identical_cold_prompts_are_prefilled_once() {
    let mut replica = replica(2000);
    for id in 0..8 {
        replica.submit(submission(id, "a", tokens(1, 1500), 4));
    }
    replica.run();
    replica.assert_quiescent();
    let prefill = |id| replica.sequences[&SequenceId(id)].tokens_computed - 3;
    assert_eq!(prefill(0), 1500);
    for id in 1..8 {
        assert_eq!(prefill(id), 1500 - 93 * 16, "seq-{id}");
    }
    let first = replica.sequences[&SequenceId(0)].first_token_at;
    let last = (0..8).map(|id| replica.sequences[&SequenceId(id)].first_token_at).max();
    assert_eq!(replica.sequences[&SequenceId(7)].first_token_at, last.flatten());
    assert!(last.flatten().expect("ended") - first.expect("ended") < STEP_COST * 4);
}

#[test]
fn other_tenants_share_nothing() {
    let mut replica = replica(2000);
    for (id, tenant) in ["a", "b", "c"].into_iter().enumerate() {
        replica.submit(submission(id as u64, tenant, tokens(1, 500), 1));
    }
    replica.run();
    assert!(replica.sequences.values().all(|client| client.tokens_computed == 500));
}

#[test]
fn waiters_go_on_when_the_one_that_computes_leaves() {
    let mut replica = replica(2000);
    for id in 0..3 {
        replica.submit(submission(id, "a", tokens(1, 1500), 2));
    }
    let cost = replica.begin_step().expect("work");
    replica.handle(BatcherInput::Cancel(SequenceId(0)));
    assert_eq!(ended(&replica, 0), dropped(0, DropReason::Cancelled));
    assert_eq!(replica.batcher.stats().blocks_used, 32, "the step may still write them");
    replica.now = replica.now + cost;
    replica.end_step(|_| false);
    assert_eq!(replica.batcher.stats().blocks_used, 0);
    replica.run();
    replica.assert_quiescent();
    // What the first one had computed is not lost.
    assert_eq!(replica.sequences[&SequenceId(1)].tokens_computed, 1500 - 512 + 1);
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let mut replica = replica(10);
    let generate = |id, n| submission(id, "a", tokens(1, n), 1);
    replica.submit(generate(1, 160));
    replica.submit(generate(2, 161));
    replica.submit(generate(3, 0));
    replica.submit(Submission { kind: SequenceKind::Embed, ..generate(4, 161) });
    replica.submit(Submission { deadline: Some(Instant::ORIGIN), ..generate(5, 1) });
    assert_eq!(ended(&replica, 2), dropped(2, DropReason::TooLong { limit: 160 }));
    assert_eq!(ended(&replica, 3), dropped(3, DropReason::EmptyPrompt));
    assert_eq!(ended(&replica, 4), dropped(4, DropReason::TooLong { limit: 160 }));
    assert_eq!(ended(&replica, 5), dropped(5, DropReason::DeadlineExceeded));
    replica.run();
    assert_eq!(ended(&replica, 1), finished(1, FinishReason::Length));
    replica.assert_quiescent();
}

#[test]
fn a_flooding_tenant_does_not_delay_a_quiet_one() {
    let config = BatcherConfig { sequences_max: 8, ..BatcherConfig::new(4000, 4096, identity()) };
    let mut replica = Replica::new(config);
    for id in 0..100 {
        replica.submit(submission(id, "flood", tokens(id, 800), 20));
    }
    for _ in 0..10 {
        let cost = replica.begin_step().expect("work");
        replica.now = replica.now + cost;
        replica.end_step(|_| false);
    }
    for id in 100..105 {
        replica.submit(submission(id, "quiet", tokens(id, 200), 20));
    }
    replica.run();
    replica.assert_quiescent();
    let ttft = |id: u64| {
        let client = &replica.sequences[&SequenceId(id)];
        client.first_token_at.expect("served") - client.submitted_at
    };
    // Alone in the queue the flood would need about 160 steps for its prompts.
    let slowest_quiet = (100..105).map(ttft).max().expect("five of them");
    let median_flood = {
        let mut all: Vec<_> = (0..100).map(ttft).collect();
        all.sort();
        all[50]
    };
    assert!(slowest_quiet * 4 < median_flood, "{slowest_quiet:?} against {median_flood:?}");
}

#[test]
fn a_long_prompt_does_not_hold_up_another_tenants_short_one() {
    let mut replica = replica(1000);
    replica.submit(submission(1, "long", tokens(1, 4000), 1));
    replica.submit(submission(2, "short", tokens(2, 200), 1));
    replica.run();
    let at = |id| replica.sequences[&SequenceId(id)].first_token_at.expect("served");
    assert!(at(2) - Instant::ORIGIN < (at(1) - Instant::ORIGIN) / 4);
}

#[test]
fn decodes_take_part_in_every_step_while_a_long_prompt_is_prefilled() {
    let mut replica = replica(1000);
    replica.submit(submission(1, "a", tokens(1, 10), 100));
    for _ in 0..2 {
        let cost = replica.begin_step().expect("work");
        replica.now = replica.now + cost;
        replica.end_step(|_| false);
    }
    replica.submit(submission(2, "a", tokens(2, 3000), 1));
    replica.run();
    for (_, output) in &replica.transcript {
        if let BatcherOutput::Step(plan) = output
            && plan.sequences.iter().any(|step| step.sequence == SequenceId(2))
        {
            assert_eq!(plan.sequences[0].sequence, SequenceId(1));
            assert!(plan.token_count() <= 512);
        }
    }
    assert_eq!(replica.sequences[&SequenceId(1)].generated.len(), 100);
}

#[test]
fn a_higher_priority_takes_blocks_from_a_lower_one_which_comes_back() {
    let mut replica = replica(20);
    replica.submit(submission(1, "a", tokens(1, 200), 50));
    let cost = replica.begin_step().expect("work");
    replica.now = replica.now + cost;
    replica.end_step(|_| false);
    replica.submit(Submission { priority: 5, ..submission(2, "b", tokens(2, 200), 50) });
    replica.run();
    replica.assert_quiescent();
    let [low, high] = [1, 2].map(|id| &replica.sequences[&SequenceId(id)]);
    assert_eq!((low.preemptions, high.preemptions), (1, 0));
    assert_eq!((low.generated.len(), high.generated.len()), (50, 50));
    let mut alone = self::replica(20);
    alone.submit(submission(1, "a", tokens(1, 200), 50));
    alone.run();
    assert_eq!(alone.sequences[&SequenceId(1)].generated, low.generated);
}

#[test]
fn growing_decodes_take_blocks_from_the_latest_and_the_oldest_is_never_preempted() {
    let mut replica = replica(30);
    for id in 0..6 {
        replica.submit(submission(id, "a", tokens(id, 60), 200));
    }
    replica.run();
    replica.assert_quiescent();
    assert!(replica.batcher.stats().preemptions > 0);
    assert_eq!(replica.sequences[&SequenceId(0)].preemptions, 0);
    assert!(replica.sequences.values().all(|client| client.generated.len() == 200));
}

#[test]
fn who_computes_for_an_urgent_one_is_as_urgent() {
    let config = BatcherConfig {
        tokens_per_step_max: 64,
        sequences_max: 8,
        ..BatcherConfig::new(1000, 4096, identity())
    };
    let mut replica = Replica::new(config);
    replica.submit(Submission { priority: -1, ..submission(1, "a", tokens(1, 640), 1) });
    let cost = replica.begin_step().expect("work");
    replica.now = replica.now + cost;
    replica.end_step(|_| false);
    replica.submit(Submission { priority: 0, ..submission(2, "b", tokens(2, 3000), 1) });
    replica.submit(Submission { priority: 1, ..submission(3, "a", tokens(1, 640), 1) });
    replica.run();
    let at = |id| replica.sequences[&SequenceId(id)].first_token_at.expect("served");
    assert!(at(3) < at(2), "the middle priority held up the highest");
    assert_eq!(replica.sequences[&SequenceId(3)].tokens_computed, 16);
}

#[test]
fn a_prompt_that_shares_nothing_is_computed_whole_and_leaves_nothing() {
    let mut replica = replica(200);
    for id in 0..3 {
        let usual = submission(id, "a", tokens(1, 500), 1);
        replica.submit(Submission { reuse_prefix: id == 2, ..usual });
        replica.run();
        assert_eq!(replica.sequences[&SequenceId(id)].tokens_computed, 500, "seq-{id}");
    }
    assert_eq!(replica.batcher.stats().blocks_cached, 31);
}

#[test]
fn every_row_of_embeddings_and_scores_is_asked_for() {
    for (kind, wanted) in
        [(SequenceKind::Embed, LogitsWanted::Hidden), (SequenceKind::Score, LogitsWanted::All)]
    {
        let mut replica = replica(200);
        replica.submit(submission(1, "a", tokens(1, 1200), 1));
        replica.run();
        replica.submit(Submission { kind, ..submission(2, "a", tokens(1, 1200), 0) });
        replica.run();
        assert_eq!(ended(&replica, 2), finished(2, FinishReason::Complete));
        let steps = replica.transcript.iter().filter_map(|(_, output)| match output {
            BatcherOutput::Step(plan) => plan.sequences.first(),
            _ => None,
        });
        let steps = steps.filter(|step| step.sequence == SequenceId(2));
        let rows: Vec<_> = steps.map(|s| (s.position, s.tokens.len(), s.wanted)).collect();
        assert_eq!(rows, [(0, 512, wanted), (512, 512, wanted), (1024, 176, wanted)]);
    }
}

#[test]
fn a_deadline_ends_a_sequence_in_any_state() {
    let mut replica = replica(200);
    let deadline = Some(Instant::from_millis(50));
    replica.submit(Submission { deadline, ..submission(1, "a", tokens(1, 600), 100) });
    replica.submit(Submission { deadline, ..submission(2, "a", tokens(1, 600), 100) });
    assert_eq!(replica.batcher.next_deadline(), deadline);
    replica.begin_step().expect("work");
    replica.now = Instant::from_millis(50);
    replica.handle(BatcherInput::Tick);
    for id in [1, 2] {
        assert_eq!(ended(&replica, id), dropped(id, DropReason::DeadlineExceeded));
    }
    assert!(replica.batcher.is_computing() && replica.batcher.has_work());
    replica.end_step(|_| false);
    replica.assert_quiescent();
}

#[test]
fn a_full_queue_refuses_with_a_time_to_come_back() {
    let config = BatcherConfig {
        sequences_max: 2,
        waiting_max: 3,
        ..BatcherConfig::new(200, 4096, identity())
    };
    let mut replica = Replica::new(config);
    for id in 0..6 {
        replica.submit(submission(id, "a", tokens(id, 20), 10));
    }
    let reason = DropReason::QueueFull { retry_after: Duration::from_secs(1) };
    assert_eq!(ended(&replica, 5), dropped(5, reason));
    replica.run();
    replica.assert_quiescent();
    assert!((0..5).all(|id| ended(&replica, id) == finished(id, FinishReason::Length)));
}

#[test]
fn a_flood_leaves_room_in_the_queue_for_others() {
    let mut replica = replica(1000);
    let refused = |replica: &Replica, id: u64| replica.sequences[&SequenceId(id)].ended.is_some();
    for id in 0..2000 {
        replica.submit(submission(id, "flood", tokens(id, 20), 1));
    }
    let accepted = (0..2000).filter(|id| !refused(&replica, *id)).count();
    assert_eq!(accepted, (1024 + 64) * 8 / 9 + 1);
    for id in 2000..2100 {
        replica.submit(submission(id, "quiet", tokens(id, 20), 1));
        assert!(!refused(&replica, id));
    }
    replica.run();
    replica.assert_quiescent();
}

#[test]
fn prompts_admitted_do_not_take_each_others_blocks() {
    let mut replica = replica(100);
    for (id, tenant) in ["a", "b", "c"].into_iter().enumerate() {
        replica.submit(submission(id as u64, tenant, tokens(id as u64, 60 * 16), 1));
    }
    replica.run();
    replica.assert_quiescent();
    assert_eq!(replica.batcher.stats().preemptions, 0);
    assert!(replica.sequences.values().all(|client| client.tokens_computed == 60 * 16));
}

#[test]
fn a_large_prompt_is_not_passed_by_for_ever_by_small_ones() {
    let mut replica = replica(100);
    let small = |id: u64| submission(id, ["a", "c"][id as usize % 2], tokens(id, 300), 20);
    for id in 1..=4 {
        replica.submit(small(id));
    }
    replica.submit(submission(100, "b", tokens(100, 1500), 1));
    for id in 5..80 {
        if let Some(cost) = replica.begin_step() {
            replica.now = replica.now + cost;
            replica.end_step(|_| false);
        }
        replica.submit(small(id));
    }
    replica.run();
    replica.assert_quiescent();
    let at = |id| replica.sequences[&SequenceId(id)].first_token_at.expect("served");
    assert!((20..80).all(|id| at(100) < at(id)), "later ones of other tenants came first");
}

#[test]
fn a_target_bounds_the_pause_of_streams_while_a_prompt_is_computed() {
    let target = Duration::from_millis(40);
    let config = BatcherConfig {
        step_time_target: Some(target),
        ..BatcherConfig::new(1000, 4096, identity())
    };
    let mut replica = Replica::new(config);
    replica.submit(submission(1, "a", tokens(1, 300), 200));
    for _ in 0..3 {
        let cost = replica.begin_step().expect("work");
        replica.now = replica.now + cost;
        replica.end_step(|_| false);
    }
    replica.submit(submission(2, "a", tokens(2, 3000), 1));
    let mut steps = 0;
    while replica.sequences[&SequenceId(2)].ended.is_none() {
        let cost = replica.begin_step().expect("work");
        assert!(cost <= target + STEP_COST, "{cost:?}");
        replica.now = replica.now + cost;
        replica.end_step(|_| false);
        steps += 1;
    }
    // 10 ms for a step and 0.2 ms for a token leave room for about 149 prompt tokens in each.
    assert!((20..30).contains(&steps), "{steps} steps");
}

#[test]
fn answers_that_do_not_fit_the_step_are_harmless() {
    let mut replica = replica(200);
    for id in 1..=2 {
        replica.submit(submission(id, "a", tokens(id, 50), 5));
    }
    replica.handle(BatcherInput::Cancel(SequenceId(99)));
    replica.begin_step().expect("work");
    let steps = replica.batcher.stats().steps;
    replica.handle(BatcherInput::Plan);
    assert_eq!(replica.batcher.stats().steps, steps, "a step is in flight");
    let result = |id, token, finished| StepResult { sequence: SequenceId(id), token, finished };
    // No token for the first, the end without a token for the second, one that nobody knows.
    let results = vec![result(2, None, true), result(99, Some(1), false)];
    replica.handle(BatcherInput::StepDone { results });
    assert_eq!(ended(&replica, 1), dropped(1, DropReason::StepFailed));
    assert_eq!(ended(&replica, 2), finished(2, FinishReason::Stop));
    replica.assert_quiescent();
}

#[test]
fn a_failed_step_ends_its_sequences_and_leaves_no_trace() {
    let mut replica = replica(200);
    replica.submit(submission(1, "a", tokens(1, 300), 5));
    replica.begin_step().expect("work");
    replica.fail_step();
    assert_eq!(ended(&replica, 1), dropped(1, DropReason::StepFailed));
    replica.assert_quiescent();
    assert_eq!(replica.batcher.stats().blocks_cached, 0);
    replica.submit(submission(2, "a", tokens(1, 300), 5));
    replica.run();
    assert_eq!(replica.sequences[&SequenceId(2)].tokens_computed, 304);
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let usual = || BatcherConfig::new(100, 4096, identity());
    let refused = |config: BatcherConfig| config.validate().unwrap_err().to_string();
    for (config, message) in [
        (
            BatcherConfig { block_tokens: 12, ..usual() },
            "block_tokens is 12, must be 8, 16, 32 or 64",
        ),
        (BatcherConfig { blocks: 0, ..usual() }, "blocks is 0, must be at least 1"),
        (
            BatcherConfig { tokens_per_step_max: 63, ..usual() },
            "tokens_per_step_max is 63, must be at least 64",
        ),
    ] {
        assert_eq!(refused(config), message);
    }
    assert_eq!(usual().validate(), Ok(()));
}
