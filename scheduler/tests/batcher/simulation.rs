//! Random days of small replicas: too few blocks, clients that leave, deadlines, failing steps.
//! The replica checks every step; here is checked that everything comes to an end, and that the same
//! seed gives the same day.

use protocol::{Duration, Instant, Machine, SequenceId, TokenId};
use scheduler::{
    BatcherConfig, BatcherInput, BatcherOutput, BatcherStats, DropReason, FinishReason,
    SequenceKind, Submission,
};

use crate::replica::{Client, Random, Replica, identity, submission, tokens};

enum Event {
    Submit(Submission),
    Cancel(SequenceId),
}

struct Day {
    config: BatcherConfig,
    /// Sorted by time, the earliest last.
    events: Vec<(Instant, Event)>,
}

#[test]
fn every_day_ends_well_and_the_same_way() {
    let mut total = Coverage::default();
    for seed in 0..SEEDS {
        let replica = live(seed);
        assert!(replica.transcript == live(seed).transcript, "seed {seed} gave two transcripts");
        total.add(&replica);
    }
    total.assert_wide();
}

#[test]
fn transcripts_are_equal_to_the_byte() {
    let text = |seed| format!("{:?}", live(seed).transcript);
    for seed in [0, 7, 99] {
        assert_eq!(text(seed), text(seed));
    }
    assert_ne!(text(1), text(2));
}

fn live(seed: u64) -> Replica {
    let mut random = Random(seed);
    let Day { config, mut events } = invent(&mut random);
    let tokens_max = config.tokens_max();
    let mut replica = Replica::new(config);
    loop {
        let now = replica.now;
        pass_time(&mut replica, &mut events, now);
        if let Some(cost) = replica.begin_step() {
            assert!(replica.steps < STEPS_MAX, "seed {seed} does not end");
            let end = replica.now + cost;
            pass_time(&mut replica, &mut events, end);
            replica.now = end;
            if random.one_in(200) {
                replica.fail_step();
            } else {
                replica.end_step(|client| client.generated.last().is_some_and(|t| t % 40 == 0));
            }
            continue;
        }
        assert!(!replica.batcher.has_work(), "seed {seed} is stuck");
        let Some((at, _)) = events.last() else { break };
        replica.now = *at;
    }
    replica.assert_quiescent();
    for client in replica.sequences.values() {
        check_end(client, tokens_max);
    }
    replica
}

/// Hands over everything that happens until then, at its time.
fn pass_time(replica: &mut Replica, events: &mut Vec<(Instant, Event)>, until: Instant) {
    loop {
        let due = |at: &Instant| *at <= until;
        let deadline = replica.batcher.next_deadline().filter(due);
        let event = events.last().map(|(at, _)| *at).filter(due);
        match (deadline, event) {
            (Some(at), event) if event.is_none_or(|event| at <= event) => {
                replica.now = at.max(replica.now);
                replica.handle(BatcherInput::Tick);
            }
            (_, Some(at)) => {
                replica.now = at.max(replica.now);
                match events.pop().expect("seen above").1 {
                    Event::Submit(submission) => replica.submit(submission),
                    Event::Cancel(id) => replica.handle(BatcherInput::Cancel(id)),
                }
            }
            _ => return,
        }
    }
}

fn invent(random: &mut Random) -> Day {
    let block_tokens = [8, 16][random.below(2)];
    let mut config = BatcherConfig::new(8 + random.below(60) as u32, 300, identity());
    config.block_tokens = block_tokens;
    config.sequences_max = 1 + random.below(12);
    config.tokens_per_step_max = config.sequences_max + random.below(100);
    config.waiting_max = 3 + random.below(40);
    config.prefill_chunk_max = 1 + random.below(80);
    config.tenant_quantum_tokens = 1 + random.below(64);
    config.blocks_watermark = random.below(4) as u32;
    let target = Duration::from_millis(random.below(40) as u64);
    config.step_time_target = random.one_in(2).then_some(target);
    let mut events = Vec::new();
    for id in 0..20 + random.below(40) as u64 {
        let at = Instant::from_millis(random.below(2000) as u64);
        let submission = invent_submission(random, id, at);
        let leaves = random.one_in(5);
        events.push((at, Event::Submit(submission)));
        if leaves {
            let at = at + Duration::from_millis(random.below(600) as u64);
            events.push((at, Event::Cancel(SequenceId(id))));
        }
    }
    events.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    Day { config, events }
}

fn invent_submission(random: &mut Random, id: u64, at: Instant) -> Submission {
    let tenant = ["ann", "bob", "cid"][random.below(3)];
    let mut prompt: Vec<TokenId> = Vec::new();
    if !random.one_in(4) {
        // The same texts for all tenants: what one has cached, another must not find.
        prompt = tokens(random.below(3) as u64, 20 + 30 * random.below(4));
    }
    prompt.extend(tokens(1000 + random.below(50) as u64, random.below(40)));
    let mut submission = submission(id, tenant, prompt, random.below(60));
    submission.priority = [0, 0, 0, 1, -1][random.below(5)];
    submission.reuse_prefix = !random.one_in(8);
    submission.deadline =
        random.one_in(6).then(|| at + Duration::from_millis(random.below(1500) as u64));
    submission.kind = match random.below(12) {
        0 => SequenceKind::Embed,
        1 => SequenceKind::Score,
        _ => SequenceKind::Generate,
    };
    submission
}

fn check_end(client: &Client, tokens_max: usize) {
    let Submission { tokens, max_new_tokens, kind, .. } = &client.submission;
    let Some(BatcherOutput::Finished { reason, .. }) = client.ended else { return };
    match reason {
        FinishReason::Length => {
            let room = (tokens_max - tokens.len()).min(*max_new_tokens);
            assert_eq!(client.generated.len(), room);
        }
        FinishReason::Stop => assert_eq!(client.generated.last().map(|t| t % 40), Some(0)),
        FinishReason::Complete => {
            assert_ne!(*kind, SequenceKind::Generate);
            assert!(client.tokens_computed >= tokens.len());
        }
    }
}

/// What the days together have seen: a simulation that never preempts shows nothing.
#[derive(Debug, Default)]
struct Coverage {
    finished: usize,
    cancelled: usize,
    expired: usize,
    refused: usize,
    failed: usize,
    too_long: usize,
    resumed: usize,
    stats: BatcherStats,
}

impl Coverage {
    fn add(&mut self, replica: &Replica) {
        for (_, output) in &replica.transcript {
            match output {
                BatcherOutput::Finished { .. } => self.finished += 1,
                BatcherOutput::Resumed { .. } => self.resumed += 1,
                BatcherOutput::Dropped { reason, .. } => match reason {
                    DropReason::Cancelled => self.cancelled += 1,
                    DropReason::DeadlineExceeded => self.expired += 1,
                    DropReason::QueueFull { .. } => self.refused += 1,
                    DropReason::StepFailed => self.failed += 1,
                    DropReason::TooLong { .. } => self.too_long += 1,
                    DropReason::EmptyPrompt => {}
                },
                _ => {}
            }
        }
        let stats = replica.batcher.stats();
        self.stats.prefix_hit_tokens += stats.prefix_hit_tokens;
        self.stats.preemptions += stats.preemptions;
        self.stats.evictions += stats.evictions;
        self.stats.steps += stats.steps;
    }

    fn assert_wide(&self) {
        let Coverage { finished, cancelled, expired, refused, failed, too_long, resumed, stats } =
            self;
        let rare = [cancelled, expired, refused, failed, too_long, resumed];
        assert!(rare.iter().all(|n| **n > 50) && *finished > 2000, "{self:?}");
        assert!(stats.preemptions > 100 && stats.evictions > 1000, "{self:?}");
        assert!(stats.prefix_hit_tokens > 10_000, "{self:?}");
    }
}

const SEEDS: u64 = 250;
const STEPS_MAX: u64 = 20_000;
