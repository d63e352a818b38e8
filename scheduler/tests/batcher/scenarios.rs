//! Scenarios with one point each.

use crate::replica::{Replica, STEP_COST, identity, submission, tokens};
use protocol::{Instant, SequenceId};
use scheduler::{
    BatcherConfig, BatcherInput, BatcherOutput, DropReason, FinishReason, SequenceKind, Submission,
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
