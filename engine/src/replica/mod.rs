//! One model being served: the batcher that decides, the executor that computes and the state of
//! each stream (sampler, stop strings, grammar), coupled without a clock of their own.
//!
//! The shell calls [`Replica::generate`] and its kin when requests arrive and [`Replica::step`] as
//! long as there is work. Refuses sockets and queues to clients: events leave by value.

mod blocks;
mod generation;
mod lower;
mod masks;
mod request;
mod rows;
mod stop;

pub use blocks::ServeEvent;
pub use request::{
    CHOICES_MAX, EmbedRequest, Event, FinishReason, GenerateRequest, PRIORITY_DEFAULT, Pooling,
    RequestError, Resumed, STOP_BYTES_MAX, STOP_STRINGS_MAX, ScoreRequest,
};

use crate::executor::{Executor, StepOutput};
use crate::tokenizer::Tokenizer;
use blocks::Transfers;
use cache::TenantSalt;
use cache::transfer::TransferId;
use generation::Generation;
use lower::Lower;
use masks::MaskThread;
use protocol::{Duration, Instant, Machine, RequestId, SequenceId, TenantId, TokenId};
use rows::{Embedding, Scoring};
use scheduler::{
    Batcher, BatcherConfig, BatcherInput, BatcherOutput, BatcherStats, ConfigError, DropReason,
    LogitsWanted, SequenceKind, SequenceStep, StepPlan, StepResult, Submission,
};
use std::collections::BTreeMap;

/// What happened, and to which request.
pub type Events = Vec<(RequestId, Event)>;

/// One model, ready to serve.
pub struct Replica {
    batcher: Batcher,
    executor: Executor,
    tokenizer: Tokenizer,
    limits: Limits,
    /// Salts of block hashes are derived from it; never leaves the node.
    secret: [u8; 32],
    sequences: BTreeMap<SequenceId, Sequence>,
    next_sequence: u64,
    masks: Option<MaskThread>,
    outputs: Vec<BatcherOutput>,
    transfers: Transfers,
    /// What lies below the pool, if anything does.
    lower: Option<Lower>,
    /// What the executor said when the last step failed.
    step_error: String,
}

/// What a step did, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepReport {
    pub sequences: usize,
    /// Tokens of prompts computed.
    pub prefill_tokens: usize,
    /// Sequences that got one more token.
    pub decode_tokens: usize,
    pub duration: Duration,
}

struct Limits {
    vocab: usize,
    tokens_max: usize,
}

struct Sequence {
    request: RequestId,
    choice: usize,
    work: Work,
}

/// A sequence that is to be queued.
struct Job {
    choice: usize,
    work: Work,
    submission: Submission,
}

enum Work {
    Generate(Box<Generation>),
    Embed(Embedding),
    Score(Scoring),
    /// For a peer: nothing but its blocks.
    Prefill(TransferId),
}

impl Replica {
    /// `secret` keys the tenants' block hashes: keep it the same over restarts if blocks outlive them.
    ///
    /// # Errors
    /// A batcher configuration out of its ranges.
    pub fn new(
        executor: Executor,
        tokenizer: Tokenizer,
        config: BatcherConfig,
        secret: [u8; 32],
    ) -> Result<Self, ConfigError> {
        let limits =
            Limits { vocab: executor.decoder().config().vocab, tokens_max: config.tokens_max() };
        Ok(Replica {
            batcher: Batcher::new(config)?,
            executor,
            tokenizer,
            limits,
            secret,
            sequences: BTreeMap::new(),
            next_sequence: 0,
            masks: None,
            outputs: Vec::new(),
            transfers: Transfers::default(),
            lower: None,
            step_error: String::new(),
        })
    }

    /// Queues a generation. Gives the events of what was generated before, choice by choice, and the
    /// last one of each choice that is over with that; all others come from later calls of
    /// [`step`](Self::step).
    ///
    /// # Errors
    /// Nothing is queued then, whichever choice was refused.
    pub fn generate(
        &mut self,
        now: Instant,
        request: GenerateRequest,
    ) -> Result<Vec<Event>, RequestError> {
        self.check_tokens(&request.prompt)?;
        request.sampling.validate(self.limits.vocab)?;
        if request.choices == 0 || request.choices > CHOICES_MAX {
            return Err(RequestError::TooManyChoices(request.choices));
        }
        let fits = |s: &String| (1..=STOP_BYTES_MAX).contains(&s.len());
        if request.stop.len() > STOP_STRINGS_MAX || !request.stop.iter().all(fits) {
            return Err(RequestError::BadStop(request.stop.len()));
        }
        if request.max_tokens == Some(0) {
            return Err(RequestError::NothingToGenerate);
        }
        if !request.resume.is_empty() && request.resume.len() != request.choices {
            let message = format!("{} choices, not {}", request.resume.len(), request.choices);
            return Err(RequestError::BadResume(message));
        }
        let (mut replayed, mut jobs) = (Vec::new(), Vec::with_capacity(request.choices));
        for choice in 0..request.choices {
            let before = request.resume.get(choice).cloned().unwrap_or_default();
            let mut tokens = request.prompt.clone();
            let room = self.limits.tokens_max.saturating_sub(tokens.len());
            let max_tokens = request.max_tokens.unwrap_or(usize::MAX).min(room.max(1));
            let mut generation = Generation::new(&self.tokenizer, &request, choice);
            tokens.extend(before.tokens.iter().map(|sampled| sampled.token));
            self.check_tokens(&tokens)?;
            let events = generation.replay(&before, max_tokens)?;
            let is_over = matches!(events.last(), Some(Event::Finished { .. }));
            replayed.extend(events);
            if is_over {
                continue;
            }
            let submission = Submission {
                kind: SequenceKind::Generate,
                max_new_tokens: max_tokens - before.tokens.len(),
                deadline: request.deadline,
                priority: request.priority,
                reuse_prefix: true,
                ..self.submission(&request.tenant, tokens)
            };
            jobs.push(Job { choice, work: Work::Generate(Box::new(generation)), submission });
        }
        self.submit(now, request.request, jobs)?;
        Ok(replayed)
    }

    /// Queues a text to become one vector.
    ///
    /// # Errors
    /// Nothing is queued then.
    pub fn embed(&mut self, now: Instant, request: EmbedRequest) -> Result<(), RequestError> {
        self.check_tokens(&request.tokens)?;
        let work = Work::Embed(Embedding::new(&request));
        let submission = Submission {
            kind: SequenceKind::Embed,
            deadline: request.deadline,
            priority: request.priority,
            ..self.submission(&request.tenant, request.tokens)
        };
        self.submit(now, request.request, vec![Job { choice: 0, work, submission }])
    }

    /// Queues a text to be scored.
    ///
    /// # Errors
    /// Nothing is queued then.
    pub fn score(&mut self, now: Instant, request: ScoreRequest) -> Result<(), RequestError> {
        self.check_tokens(&request.tokens)?;
        let work = Work::Score(Scoring::new(&request));
        let submission = Submission {
            kind: SequenceKind::Score,
            deadline: request.deadline,
            priority: request.priority,
            ..self.submission(&request.tenant, request.tokens)
        };
        self.submit(now, request.request, vec![Job { choice: 0, work, submission }])
    }

    /// Ends every sequence of a request; its blocks are free at the next step. The shell that cancels
    /// knows of it: no event follows.
    pub fn cancel(&mut self, now: Instant, request: RequestId) {
        let ids: Vec<SequenceId> = self
            .sequences
            .iter()
            .filter(|(_, s)| s.request == request)
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            self.cancel_sequence(now, id);
        }
    }

    fn cancel_sequence(&mut self, now: Instant, id: SequenceId) {
        self.sequences.remove(&id);
        self.batcher.handle(now, BatcherInput::Cancel(id), &mut self.outputs);
    }

    /// Plans and computes one step. `None` when there is nothing to compute now.
    pub fn step(&mut self, clock: &dyn Fn() -> Instant, events: &mut Events) -> Option<StepReport> {
        let start = clock();
        self.step_tiers(start);
        self.go_on_serving(start);
        self.batcher.handle(start, BatcherInput::Plan, &mut self.outputs);
        self.spill();
        let plan = self.settle(events)?;
        let (report, input) = match self.compute(&plan, events) {
            Ok((report, results)) => (report, BatcherInput::StepDone { results }),
            Err(error) => {
                self.step_error = error;
                (StepReport::of(&plan), BatcherInput::StepFailed)
            }
        };
        let end = clock();
        self.batcher.handle(end, input, &mut self.outputs);
        self.settle(events);
        self.pin_all_ready();
        Some(StepReport { duration: end - start, ..report })
    }

    /// True while a request waits or runs.
    pub fn has_work(&self) -> bool {
        !self.sequences.is_empty()
    }

    /// When [`tick`](Self::tick) must be called if no step is made before.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.batcher.next_deadline()
    }

    /// Drops what is past its deadline.
    pub fn tick(&mut self, now: Instant, events: &mut Events) {
        self.batcher.handle(now, BatcherInput::Tick, &mut self.outputs);
        self.settle(events);
    }

    pub fn stats(&self) -> BatcherStats {
        self.batcher.stats()
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Prompt and answer of one sequence together.
    pub fn tokens_max(&self) -> usize {
        self.limits.tokens_max
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), RequestError> {
        let vocab = self.limits.vocab;
        if tokens.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        match tokens.iter().enumerate().find(|&(_, &t)| t as usize >= vocab) {
            Some((position, &token)) => Err(RequestError::UnknownToken { token, position, vocab }),
            None => Ok(()),
        }
    }

    fn submission(&self, tenant: &TenantId, tokens: Vec<TokenId>) -> Submission {
        Submission {
            sequence: SequenceId(0),
            tenant: tenant.clone(),
            salt: TenantSalt::derive(&self.secret, tenant),
            priority: PRIORITY_DEFAULT,
            tokens,
            max_new_tokens: 0,
            deadline: None,
            reuse_prefix: false,
            kind: SequenceKind::Score,
        }
    }

    /// All choices are queued or none.
    fn submit(
        &mut self,
        now: Instant,
        request: RequestId,
        jobs: Vec<Job>,
    ) -> Result<(), RequestError> {
        let mut ids = Vec::with_capacity(jobs.len());
        let below = self.names_below(now, &jobs);
        for Job { choice, work, submission } in jobs {
            let sequence = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            self.sequences.insert(sequence, Sequence { request, choice, work });
            ids.push(sequence);
            let tokens = submission.tokens.len();
            let submission = Submission { sequence, ..submission };
            let before = self.outputs.len();
            self.batcher.handle(now, BatcherInput::Submit(submission), &mut self.outputs);
            let refused = self.outputs[before..].iter().find_map(|output| match output {
                BatcherOutput::Dropped { sequence: s, reason } if *s == sequence => Some(*reason),
                _ => None,
            });
            if let Some(reason) = refused {
                self.outputs.truncate(before);
                for id in ids {
                    self.sequences.remove(&id);
                    self.batcher.handle(now, BatcherInput::Cancel(id), &mut self.outputs);
                }
                return Err(request_error(reason, tokens, &self.step_error));
            }
        }
        self.bring_up(now, below);
        Ok(())
    }

    /// Turns what the batcher said into events; gives back the plan if there is one.
    fn settle(&mut self, events: &mut Events) -> Option<StepPlan> {
        let mut plan = None;
        for output in std::mem::take(&mut self.outputs) {
            match output {
                BatcherOutput::Step(step) => plan = Some(step),
                BatcherOutput::Started { sequence, cached_tokens } => {
                    if let Some(s) = self.sequences.get(&sequence)
                        && !matches!(s.work, Work::Prefill(_))
                    {
                        events
                            .push((s.request, Event::Started { choice: s.choice, cached_tokens }));
                    }
                }
                BatcherOutput::Preempted { .. } | BatcherOutput::Resumed { .. } => {}
                BatcherOutput::Finished { sequence, reason } => {
                    let Some(mut s) = self.sequences.remove(&sequence) else { continue };
                    match s.work {
                        Work::Prefill(transfer) => self.prefilled(transfer, None),
                        _ => events.extend(s.finish(reason).map(|event| (s.request, event))),
                    }
                }
                BatcherOutput::Dropped { sequence, reason } => {
                    let Some(s) = self.sequences.remove(&sequence) else { continue };
                    let error = request_error(reason, 0, &self.step_error);
                    match s.work {
                        Work::Prefill(transfer) => self.prefilled(transfer, Some(error)),
                        _ => events.push((s.request, Event::Failed { choice: s.choice, error })),
                    }
                }
            }
        }
        plan
    }

    /// One forward pass, then one draw for each sequence that wanted one.
    fn compute(
        &mut self,
        plan: &StepPlan,
        events: &mut Events,
    ) -> Result<(StepReport, Vec<StepResult>), String> {
        self.start_masks(plan);
        let output = self.executor.step(plan);
        let mut masks = collect_masks(&mut self.masks, &mut self.sequences);
        let output = output.map_err(|e| e.to_string())?;
        let mut results = Vec::with_capacity(plan.sequences.len());
        for (index, step) in plan.sequences.iter().enumerate() {
            let Some(sequence) = self.sequences.get_mut(&step.sequence) else { continue };
            let mask = masks.remove(&step.sequence);
            match sequence.take(step, index, output, mask, events) {
                Ok(result) => results.extend(result),
                Err(error) => {
                    events
                        .push((sequence.request, Event::Failed { choice: sequence.choice, error }));
                    self.sequences.remove(&step.sequence);
                    results.push(StepResult {
                        sequence: step.sequence,
                        token: Some(0),
                        finished: true,
                    });
                }
            }
        }
        Ok((StepReport::of(plan), results))
    }

    /// Sends the matchers of this step's draws to the thread that computes their masks.
    fn start_masks(&mut self, plan: &StepPlan) {
        for step in plan.sequences.iter().filter(|s| s.wanted == LogitsWanted::Last) {
            let Some(Sequence { work: Work::Generate(generation), .. }) =
                self.sequences.get_mut(&step.sequence)
            else {
                continue;
            };
            if generation.matcher.is_none() {
                continue;
            }
            if self.masks.is_none() {
                // Where no thread can be had the masks are computed in line, after the pass.
                self.masks = MaskThread::spawn().ok();
            }
            if let (Some(thread), Some(matcher)) = (&mut self.masks, generation.matcher.take()) {
                thread.start(step.sequence, matcher);
            }
        }
    }
}

type Masks = BTreeMap<SequenceId, Result<Vec<u32>, RequestError>>;

/// Waits for the masks and gives the matchers back to their sequences.
fn collect_masks(
    thread: &mut Option<MaskThread>,
    sequences: &mut BTreeMap<SequenceId, Sequence>,
) -> Masks {
    let mut masks = Masks::new();
    for (id, masked) in thread.iter_mut().flat_map(MaskThread::collect) {
        let Some(masked) = masked else {
            let lost = "the thread that computes grammar masks has died".to_owned();
            masks.insert(id, Err(RequestError::Grammar(lost)));
            continue;
        };
        if let Some(Sequence { work: Work::Generate(generation), .. }) = sequences.get_mut(&id) {
            generation.matcher = Some(masked.matcher);
        }
        masks.insert(id, masked.mask.map_err(|e| RequestError::Grammar(e.to_string())));
    }
    masks
}

impl Sequence {
    /// Takes this sequence's rows of a step.
    fn take(
        &mut self,
        step: &SequenceStep,
        index: usize,
        output: &mut StepOutput,
        mask: Option<Result<Vec<u32>, RequestError>>,
        events: &mut Events,
    ) -> Result<Option<StepResult>, RequestError> {
        match &mut self.work {
            Work::Embed(embedding) => {
                embedding.push(step.position, output.hidden(index), output.hidden_size());
                Ok(None)
            }
            Work::Score(scoring) => {
                scoring.push(step.position, output.logits(index), output.vocab());
                Ok(None)
            }
            Work::Prefill(_) => Ok(None),
            Work::Generate(_) if step.wanted != LogitsWanted::Last => Ok(None),
            Work::Generate(generation) => {
                let mask = mask.transpose()?;
                let advance = generation.advance(output.logits_mut(index), mask)?;
                events.extend(advance.event.map(|event| (self.request, event)));
                Ok(Some(StepResult {
                    sequence: step.sequence,
                    token: Some(advance.token),
                    finished: advance.finished,
                }))
            }
        }
    }

    fn finish(&mut self, reason: scheduler::FinishReason) -> Option<Event> {
        Some(match &mut self.work {
            Work::Embed(embedding) => embedding.finish(),
            Work::Score(scoring) => scoring.finish(),
            Work::Generate(generation) => generation.finish(match reason {
                scheduler::FinishReason::Length => FinishReason::Length,
                _ => FinishReason::Stop,
            }),
            Work::Prefill(_) => return None,
        })
    }
}

impl StepReport {
    fn of(plan: &StepPlan) -> Self {
        let decodes = plan.sequences.iter().filter(|s| s.wanted == LogitsWanted::Last).count();
        let prefill = plan.sequences.iter().filter(|s| s.tokens.len() > 1);
        StepReport {
            sequences: plan.sequences.len(),
            prefill_tokens: prefill.map(|s| s.tokens.len()).sum(),
            decode_tokens: decodes,
            duration: Duration::ZERO,
        }
    }
}

fn request_error(reason: DropReason, tokens: usize, step_error: &str) -> RequestError {
    match reason {
        DropReason::Cancelled => RequestError::Cancelled,
        DropReason::DeadlineExceeded => RequestError::DeadlineExceeded,
        DropReason::QueueFull { retry_after } => RequestError::QueueFull { retry_after },
        DropReason::TooLong { limit } => RequestError::TooLong { tokens, limit },
        DropReason::EmptyPrompt => RequestError::EmptyPrompt,
        DropReason::StepFailed => RequestError::Step(step_error.to_owned()),
    }
}
