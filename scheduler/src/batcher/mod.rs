//! Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, OSDI 2024) over shared
//! blocks (vLLM's paged attention, SOSP 2023).
//!
//! Owns: which sequence computes which tokens in the next step, which blocks they go to, who waits,
//! who is preempted. Refuses: bytes of KV, sampling, clocks.

mod blocks;
mod config;
mod lanes;
mod message;
mod pace;
mod planner;
mod sequence;

use std::collections::{BTreeMap, BTreeSet};

use cache::{BlockPool, HashChain};
use protocol::{Instant, Machine, SequenceId, TenantId};

pub use config::{BatcherConfig, ConfigError};
pub use message::{
    BatcherInput, BatcherOutput, BatcherStats, DropReason, FinishReason, SequenceKind, StepResult,
    Submission,
};

use self::lanes::Lanes;
use self::pace::Pace;
use self::sequence::{Phase, Rank, Sequence};
use crate::LogitsWanted;

/// The batcher of one replica.
///
/// The shell's loop: hand over all inputs that have come, then [`BatcherInput::Plan`]; compute the
/// [`BatcherOutput::Step`] if there is one, and answer with [`BatcherInput::StepDone`]; if there is
/// none, wait for an input or for [`next_deadline`](Machine::next_deadline). Inputs may come while a
/// step is in flight, too: a cancelled sequence gets its last word at once, but its blocks stay taken
/// until the step is done, because the executor may still write them.
///
/// Each sequence gets exactly one last word: `Finished` or `Dropped`.
///
/// ```
/// use cache::{IdentityParts, NumericalIdentity, TenantSalt};
/// use protocol::{Instant, Machine, SequenceId, TenantId};
/// use scheduler::{
///     Batcher, BatcherConfig, BatcherInput, BatcherOutput, LogitsWanted, SequenceKind, StepResult,
///     Submission,
/// };
///
/// let identity = NumericalIdentity::new(&IdentityParts {
///     weights: b"digest",
///     architecture: "llama",
///     kv_dtype: "f16",
///     rope: "",
///     adapter: "",
/// });
/// let mut batcher = Batcher::new(BatcherConfig::new(1000, 4096, identity))?;
/// let tenant = TenantId::local();
/// let submission = Submission {
///     sequence: SequenceId(1),
///     salt: TenantSalt::derive(&[7; 32], &tenant),
///     tenant,
///     priority: 0,
///     tokens: vec![1, 2, 3],
///     max_new_tokens: 2,
///     deadline: None,
///     reuse_prefix: true,
///     kind: SequenceKind::Generate,
/// };
/// let (now, mut out) = (Instant::ORIGIN, Vec::new());
/// batcher.handle(now, BatcherInput::Submit(submission), &mut out);
/// let mut steps = 0;
/// while batcher.has_work() {
///     batcher.handle(now, BatcherInput::Plan, &mut out);
///     for output in std::mem::take(&mut out) {
///         let BatcherOutput::Step(plan) = output else { continue };
///         let last = plan.sequences.iter().filter(|step| step.wanted == LogitsWanted::Last);
///         let results = last.map(|step| StepResult {
///             sequence: step.sequence,
///             token: Some(42), // what the executor and the sampler made of it
///             finished: false,
///         });
///         let done = BatcherInput::StepDone { results: results.collect() };
///         batcher.handle(now, done, &mut out);
///         steps += 1;
///     }
/// }
/// assert_eq!(steps, 2);
/// assert!(matches!(out[..], [BatcherOutput::Finished { .. }]));
/// # Ok::<(), scheduler::ConfigError>(())
/// ```
#[derive(Debug)]
pub struct Batcher {
    config: BatcherConfig,
    pool: BlockPool,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Sequences with blocks, the best rank first.
    running: BTreeMap<Rank, SequenceId>,
    lanes: Lanes,
    deadlines: BTreeSet<(Instant, SequenceId)>,
    /// Sequences of the step that is being computed.
    in_flight: Vec<SequenceId>,
    step: u64,
    next_ticket: u64,
    /// Waiting sequences that have never run.
    queued: usize,
    /// The same for each tenant that has any.
    queued_of: BTreeMap<TenantId, usize>,
    pace: Pace,
    stats: BatcherStats,
    /// References on blocks that no sequence holds: see `blocks`.
    held: usize,
}

impl Batcher {
    /// A batcher with nothing to do.
    pub fn new(config: BatcherConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Batcher {
            pool: BlockPool::new(config.blocks),
            config,
            sequences: BTreeMap::new(),
            running: BTreeMap::new(),
            lanes: Lanes::default(),
            deadlines: BTreeSet::new(),
            in_flight: Vec::new(),
            step: 0,
            next_ticket: 0,
            queued: 0,
            queued_of: BTreeMap::new(),
            pace: Pace::default(),
            stats: BatcherStats::default(),
            held: 0,
        })
    }

    pub fn config(&self) -> &BatcherConfig {
        &self.config
    }

    /// Whether a sequence is alive or a step is in flight.
    pub fn has_work(&self) -> bool {
        !self.sequences.is_empty()
    }

    /// Whether a step has been given out and not been answered.
    pub fn is_computing(&self) -> bool {
        !self.in_flight.is_empty()
    }

    pub fn stats(&self) -> BatcherStats {
        let pool = self.pool.stats();
        let (mut waiting, mut prompt_tokens_left) = (0, 0);
        for sequence in self.sequences.values().filter(|s| !s.dropped) {
            waiting += usize::from(sequence.phase == Phase::Waiting);
            if sequence.phase != Phase::Decode {
                prompt_tokens_left += (sequence.tokens.len() - sequence.computed) as u64;
            }
        }
        BatcherStats {
            running: self.running.len(),
            waiting,
            prompt_tokens_left,
            prompt_rate: self.pace.prompt_rate(self.config.tokens_per_step_max),
            decode_step: self.pace.decode_step(),
            blocks_free: pool.free,
            blocks_cached: pool.cached,
            blocks_used: pool.used,
            evictions: pool.evictions,
            ..self.stats
        }
    }

    fn submit(&mut self, submission: Submission, out: &mut Vec<BatcherOutput>) {
        let id = submission.sequence;
        assert!(!self.sequences.contains_key(&id), "{id} is submitted twice");
        if let Some(reason) = self.refusal(&submission) {
            out.push(BatcherOutput::Dropped { sequence: id, reason });
            return;
        }
        if submission.kind == SequenceKind::Generate && submission.max_new_tokens == 0 {
            let reason = FinishReason::Length;
            out.push(BatcherOutput::Finished { sequence: id, reason });
            return;
        }
        let chain =
            HashChain::new(submission.salt, &self.config.identity, self.config.block_tokens);
        let sequence = Sequence::new(submission, self.next_ticket, self.config.tokens_max(), chain);
        self.next_ticket += 1;
        self.queued += 1;
        *self.queued_of.entry(sequence.tenant.clone()).or_default() += 1;
        self.deadlines.extend(sequence.deadline.map(|at| (at, id)));
        self.lanes.insert(&sequence);
        self.sequences.insert(id, sequence);
    }

    fn refusal(&self, submission: &Submission) -> Option<DropReason> {
        let limit = match submission.kind {
            SequenceKind::Generate => self.config.tokens_max() - 1,
            SequenceKind::Embed | SequenceKind::Score | SequenceKind::Prefill => {
                self.config.prompt_max()
            }
        };
        if submission.tokens.is_empty() {
            return Some(DropReason::EmptyPrompt);
        }
        if submission.tokens.len() > limit {
            return Some(DropReason::TooLong { limit });
        }
        // Places that are free now are filled by the next step: those who take them do not wait.
        let places = self.config.sequences_max.saturating_sub(self.running.len());
        let left = (self.config.waiting_max + places).saturating_sub(self.queued);
        let own = self.queued_of.get(&submission.tenant).copied().unwrap_or(0);
        // A dynamic threshold (Choudhury and Hahne, 1998): the fuller the queue, the less of it for one
        // tenant, so that a flood leaves room for others.
        (own >= left.saturating_mul(TENANT_SHARE))
            .then(|| DropReason::QueueFull { retry_after: self.pace.retry_after(self.queued) })
    }

    /// A sequence that has never run does not wait any longer.
    fn leave_queue(&mut self, tenant: &TenantId) {
        self.queued -= 1;
        let own = self.queued_of.get_mut(tenant).expect("counted when it was submitted");
        *own -= 1;
        if *own == 0 {
            self.queued_of.remove(tenant);
        }
    }

    fn step_done(&mut self, now: Instant, results: &[StepResult], out: &mut Vec<BatcherOutput>) {
        let results: BTreeMap<SequenceId, &StepResult> =
            results.iter().map(|result| (result.sequence, result)).collect();
        for id in std::mem::take(&mut self.in_flight) {
            let sequence = self.sequences.get_mut(&id).expect("kept while its step is in flight");
            assert!(sequence.planned > 0, "{id} was in the step");
            let wanted = sequence.wanted();
            sequence.computed += sequence.planned;
            sequence.planned = 0;
            assert!(sequence.computed <= sequence.tokens.len(), "{id} computed what it has");
            sequence.commit(&mut self.pool, self.config.block_tokens);
            if sequence.dropped {
                self.forget(id);
                continue;
            }
            if sequence.phase == Phase::Prefill && sequence.computed == sequence.tokens.len() {
                self.lanes.remove(sequence);
                sequence.phase = Phase::Decode;
            }
            match wanted {
                LogitsWanted::None if sequence.kind != SequenceKind::Prefill => {}
                LogitsWanted::Last => self.take_token(now, id, results.get(&id).copied(), out),
                LogitsWanted::None | LogitsWanted::All | LogitsWanted::Hidden => {
                    if sequence.computed == sequence.tokens.len() {
                        self.finish(now, id, FinishReason::Complete, out);
                    }
                }
            }
        }
    }

    fn take_token(
        &mut self,
        now: Instant,
        id: SequenceId,
        result: Option<&StepResult>,
        out: &mut Vec<BatcherOutput>,
    ) {
        let sequence = self.sequences.get_mut(&id).expect("its step is done");
        let token = result.and_then(|result| result.token);
        if let Some(token) = token {
            sequence.tokens.push(token);
            self.stats.generated_tokens += 1;
        }
        let full = sequence.tokens.len() >= sequence.tokens_max;
        match (result.is_some_and(|result| result.finished), token) {
            (true, _) => self.finish(now, id, FinishReason::Stop, out),
            (false, Some(_)) if full => self.finish(now, id, FinishReason::Length, out),
            (false, Some(_)) => {}
            (false, None) => self.drop_sequence(now, id, DropReason::StepFailed, out),
        }
    }

    fn step_failed(&mut self, now: Instant, out: &mut Vec<BatcherOutput>) {
        for id in std::mem::take(&mut self.in_flight) {
            let sequence = self.sequences.get_mut(&id).expect("kept while its step is in flight");
            sequence.planned = 0;
            if sequence.dropped {
                self.forget(id);
            } else {
                self.drop_sequence(now, id, DropReason::StepFailed, out);
            }
        }
    }

    fn finish(
        &mut self,
        now: Instant,
        id: SequenceId,
        reason: FinishReason,
        out: &mut Vec<BatcherOutput>,
    ) {
        self.retire(now, id);
        out.push(BatcherOutput::Finished { sequence: id, reason });
    }

    fn drop_sequence(
        &mut self,
        now: Instant,
        id: SequenceId,
        reason: DropReason,
        out: &mut Vec<BatcherOutput>,
    ) {
        if self.sequences.get(&id).is_some_and(|sequence| !sequence.dropped) {
            self.retire(now, id);
            out.push(BatcherOutput::Dropped { sequence: id, reason });
        }
    }

    /// Takes a sequence out of every order; frees what it holds unless a step is writing to it.
    fn retire(&mut self, now: Instant, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("only living sequences retire");
        self.lanes.remove(sequence);
        if let Some(deadline) = sequence.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if sequence.phase == Phase::Waiting {
            if !sequence.started {
                let tenant = sequence.tenant.clone();
                self.leave_queue(&tenant);
            }
        } else {
            self.running.remove(&sequence.rank());
            self.pace.sequence_ended(now);
        }
        let sequence = self.sequence_mut(id);
        if sequence.planned > 0 {
            sequence.dropped = true;
        } else {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            sequence.release(&mut self.pool);
        }
    }

    fn expire(&mut self, now: Instant, out: &mut Vec<BatcherOutput>) {
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            self.drop_sequence(now, id, DropReason::DeadlineExceeded, out);
        }
    }

    fn sequence_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("ids in the orders are alive")
    }
}

impl Machine for Batcher {
    type Input = BatcherInput;
    type Output = BatcherOutput;

    /// Panics if a sequence is submitted twice, or a step is answered that is not in flight.
    fn handle(&mut self, now: Instant, input: BatcherInput, out: &mut Vec<BatcherOutput>) {
        let plan = matches!(input, BatcherInput::Plan) && !self.is_computing();
        match input {
            BatcherInput::Submit(submission) => self.submit(submission, out),
            BatcherInput::Cancel(id) => self.drop_sequence(now, id, DropReason::Cancelled, out),
            BatcherInput::StepDone { results } => {
                assert!(self.is_computing(), "no step is in flight");
                self.pace.end_step(now);
                self.step_done(now, &results, out);
            }
            BatcherInput::StepFailed => {
                assert!(self.is_computing(), "no step is in flight");
                self.step_failed(now, out);
            }
            BatcherInput::Plan | BatcherInput::Tick => {}
        }
        self.expire(now, out);
        if plan && let Some(step) = self.plan(now, out) {
            out.push(BatcherOutput::Step(step));
        }
    }

    /// The earliest deadline of a living sequence.
    fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }
}

/// One tenant's waiting sequences per place left: it can take 8/9 of the queue.
const TENANT_SHARE: usize = 8;
