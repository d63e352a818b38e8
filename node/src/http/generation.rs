//! A running request: its events as they come, the times and tokens that metrics want.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use engine::replica::{Event, FinishReason, RequestError};
use engine::sampler::SampledToken;
use protocol::api::{ApiError, ErrorCode, Usage};
use protocol::journal::Entry;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::guard::Caller;
use super::journal::{self, Journal};
use super::log::RequestLog;
use crate::kv::Brought;
use crate::model::Model;
use crate::replica::{PartEvent, SubmitError, Work};

/// What happened to one choice. Choices of all prompts are counted through: `prompt * n + choice`.
#[derive(Debug)]
pub(crate) enum Update {
    Token {
        choice: usize,
        sampled: SampledToken,
        text: String,
    },
    Finished {
        choice: usize,
        reason: FinishReason,
        text: String,
    },
    /// The whole request has ended.
    Failed(ApiError),
}

/// Events of one client request. Dropping it cancels what still runs.
pub(crate) struct Generation {
    pub log: Arc<RequestLog>,
    pub model: Arc<Model>,
    pub journal: Option<Arc<Journal>>,
    /// What was generated before, and whether it stands in the journal.
    replayed: VecDeque<(PartEvent, bool)>,
    events: mpsc::Receiver<PartEvent>,
    cancel: CancellationToken,
    choices_per_part: usize,
    choices_open: usize,
    prompt_tokens: u64,
    cached_tokens: Vec<Option<usize>>,
    /// Of each part's prompt, tokens that another node has computed for it: they lie in the cache, but were
    /// not there before.
    computed_elsewhere: Vec<usize>,
    choices: Vec<ChoiceTimes>,
    generated: u64,
    /// Tokens that another replica has drawn, and counted.
    generated_before: u64,
}

#[derive(Clone, Copy, Default)]
struct ChoiceTimes {
    first: Option<Instant>,
    last: Option<Instant>,
    /// Drawn here.
    tokens: u64,
    /// Drawn anywhere.
    tokens_total: u64,
}

impl Generation {
    /// Submits the parts (one generation for each prompt, each with `choices_per_part` choices) and
    /// waits until the replica has taken or refused them.
    pub async fn start(
        model: Arc<Model>,
        caller: &Caller,
        cancel: CancellationToken,
        mut parts: Vec<Work>,
        prompt_tokens: u64,
        choices_per_part: usize,
    ) -> Result<Generation, ApiError> {
        let choices = parts.len() * choices_per_part;
        let mut cached_tokens = vec![None; parts.len()];
        let before = caller.journal.as_ref().map_or(&[][..], |journal| journal.before());
        if !before.is_empty() {
            resume(&mut parts, before, choices_per_part, &mut cached_tokens)?;
        }
        let submitting = async {
            // Kept until the sequences are submitted.
            let brought = bring(&model, &parts, caller.deadline).await;
            let computed = brought.iter().map(|b| b.as_ref().map_or(0, |b| b.computed_tokens));
            let computed: Vec<usize> = computed.collect();
            let submitted = model.replica.submit(parts).await?;
            drop(brought);
            Ok((submitted, computed))
        };
        let ((replayed, events), computed_elsewhere) = tokio::select! {
            submitted = submitting => submitted.map_err(submit_error)?,
            () = cancel.cancelled() => return Err(super::shutting_down()),
        };
        let replayed = journal::in_order(before, choices_per_part, replayed).collect();
        Ok(Generation {
            log: caller.log.clone(),
            model,
            journal: caller.journal.clone(),
            replayed,
            events,
            cancel,
            choices_per_part,
            choices_open: choices,
            prompt_tokens,
            cached_tokens,
            computed_elsewhere,
            choices: vec![ChoiceTimes::default(); choices],
            generated: 0,
            generated_before: 0,
        })
    }

    /// The next update; `None` when every choice has ended.
    pub async fn next(&mut self) -> Option<Update> {
        while self.choices_open > 0 {
            if let Some((event, stood)) = self.replayed.pop_front() {
                match self.take(event, stood) {
                    Some(update) => return Some(update),
                    None => continue,
                }
            }
            let event = tokio::select! {
                biased;
                event = self.events.recv() => event,
                () = self.cancel.cancelled() => return Some(self.fail(super::shutting_down())),
            };
            let Some(event) = event else { return Some(self.fail(lost())) };
            if let Some(update) = self.take(event, false) {
                return Some(update);
            }
        }
        None
    }

    /// The next update if it is there already.
    pub fn try_next(&mut self) -> Option<Update> {
        while self.choices_open > 0 {
            let (event, stood) = match self.replayed.pop_front() {
                Some(replayed) => replayed,
                None => (self.events.try_recv().ok()?, false),
            };
            if let Some(update) = self.take(event, stood) {
                return Some(update);
            }
        }
        None
    }

    pub fn choice_count(&self) -> usize {
        self.choices.len()
    }

    pub fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.cached_total(), self.generated)
    }

    fn cached_total(&self) -> u64 {
        self.cached_tokens.iter().flatten().map(|&n| n as u64).sum()
    }

    /// `stood` says that the event stands in the journal already: others have counted it.
    fn take(&mut self, (part, mut event): PartEvent, stood: bool) -> Option<Update> {
        let base = part * self.choices_per_part;
        if let (Event::Started { cached_tokens, .. }, false) = (&mut event, stood) {
            *cached_tokens = cached_tokens.saturating_sub(self.computed_elsewhere[part]);
        }
        if let Event::Started { cached_tokens, .. } = event {
            // Of several choices the first one tells what was cached before the request; of several
            // replicas, too.
            if self.cached_tokens[part].is_some() {
                return None;
            }
            self.cached_tokens[part] = Some(cached_tokens);
            self.model.metrics.queue_time.record(self.log.started.elapsed().as_secs_f64());
        }
        if let (Some(journal), false) = (&self.journal, stood)
            && let Some(entry) = journal::entry(part, self.choices_per_part, &event)
        {
            journal.record(entry);
        }
        match event {
            Event::Token { choice, sampled, text, .. } => {
                self.count_token(base + choice, stood);
                Some(Update::Token { choice: base + choice, sampled, text })
            }
            Event::Finished { choice, reason, text, generated } => {
                // Ending tokens are generated and have no event of their own.
                let counted = self.choices[base + choice].tokens_total;
                let ending = (generated as u64).saturating_sub(counted);
                self.generated += ending;
                self.generated_before += if stood { ending } else { 0 };
                self.choices_open -= 1;
                self.record_choice(base + choice);
                Some(Update::Finished { choice: base + choice, reason, text })
            }
            Event::Failed { error, .. } => Some(self.fail(request_error(error))),
            Event::Started { .. } | Event::Embedding { .. } | Event::Scores { .. } => None,
        }
    }

    fn count_token(&mut self, choice: usize, stood: bool) {
        let (now, is_first) = (Instant::now(), self.generated == 0);
        self.generated += 1;
        self.choices[choice].tokens_total += 1;
        if stood {
            self.generated_before += 1;
            return;
        }
        let metrics = &self.model.metrics;
        if is_first {
            metrics.time_to_first_token.record((now - self.log.started).as_secs_f64());
        }
        let times = &mut self.choices[choice];
        times.tokens += 1;
        times.first.get_or_insert(now);
        if let Some(last) = times.last.replace(now) {
            metrics.inter_token_latency.record((now - last).as_secs_f64());
        }
    }

    fn record_choice(&self, choice: usize) {
        let ChoiceTimes { first, last, tokens, .. } = self.choices[choice];
        if let (Some(first), Some(last)) = (first, last)
            && tokens > 1
        {
            let mean = (last - first).as_secs_f64() / (tokens - 1) as f64;
            self.model.metrics.time_per_output_token.record(mean);
        }
    }

    /// Ends the request: its receiver is closed, so the replica cancels what still runs.
    fn fail(&mut self, error: ApiError) -> Update {
        self.choices_open = 0;
        self.replayed.clear();
        self.events.close();
        self.log.failed(error.code);
        if error.code == ErrorCode::InternalError {
            tracing::error!(request = %self.log.id, error = %error.message, "a request broke off");
        }
        Update::Failed(error)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.choices_open > 0 {
            self.log.failed(ErrorCode::Cancelled);
        }
        let cached = self.cached_total();
        let metrics = &self.model.metrics;
        metrics.input_tokens.record(self.prompt_tokens as f64);
        metrics.output_tokens.record((self.generated - self.generated_before) as f64);
        metrics.cached_tokens.increment(cached);
        self.log.tokens(self.prompt_tokens, cached, self.generated);
    }
}

/// Gets what of the prompts is better had from other nodes than computed here.
async fn bring(model: &Model, parts: &[Work], deadline: Instant) -> Vec<Option<Brought>> {
    let Some(kv) = &model.kv else { return parts.iter().map(|_| None).collect() };
    let brought = parts.iter().map(|part| async move {
        match part {
            Work::Generate(request) => kv.bring(request, deadline).await,
            Work::Embed(_) | Work::Score(_) => None,
        }
    });
    futures_util::future::join_all(brought).await
}

/// Has each part go on where the journal ends.
fn resume(
    parts: &mut [Work],
    before: &[Entry],
    choices_per_part: usize,
    cached_tokens: &mut [Option<usize>],
) -> Result<(), ApiError> {
    let foreign = || {
        let message = "the journal of the stream does not belong to this request";
        ApiError::new(ErrorCode::InternalError, message)
    };
    for entry in before {
        if let Entry::Started { prompt, cached_tokens: cached } = entry {
            let slot = cached_tokens.get_mut(*prompt as usize).ok_or_else(foreign)?;
            *slot = Some(usize::try_from(*cached).unwrap_or(usize::MAX));
        }
    }
    let mut resumed =
        journal::resumed(before, parts.len() * choices_per_part).ok_or_else(foreign)?.into_iter();
    for part in parts {
        if let Work::Generate(request) = part {
            request.resume = resumed.by_ref().take(choices_per_part).collect();
        }
    }
    Ok(())
}

/// Runs parts that answer with one event each; gives what `take` makes of these, in their order.
pub(crate) async fn answers<T: Clone + Default>(
    model: &Model,
    cancel: &CancellationToken,
    parts: Vec<Work>,
    take: impl Fn(Event) -> Option<T>,
) -> Result<Vec<T>, ApiError> {
    let mut answers = vec![T::default(); parts.len()];
    let run = async {
        let mut open = parts.len();
        let (_, mut events) = model.replica.submit(parts).await.map_err(submit_error)?;
        while open > 0 {
            let (part, event) =
                events.recv().await.ok_or_else(|| submit_error(SubmitError::Stopped))?;
            if let Event::Failed { error, .. } = event {
                return Err(request_error(error));
            }
            if let Some(answer) = take(event) {
                answers[part] = answer;
                open -= 1;
            }
        }
        Ok::<(), ApiError>(())
    };
    tokio::select! {
        ended = run => ended?,
        () = cancel.cancelled() => return Err(super::shutting_down()),
    }
    Ok(answers)
}

/// The channel was closed although the request was not finished.
fn lost() -> ApiError {
    ApiError::new(
        ErrorCode::InternalError,
        "the stream was given up: its client read too slowly, or the replica has stopped",
    )
}

fn submit_error(error: SubmitError) -> ApiError {
    match error {
        SubmitError::Request(error) => request_error(error),
        SubmitError::Busy => {
            ApiError::new(ErrorCode::RateLimitExceeded, "too many requests wait: try again")
        }
        SubmitError::Stopped => ApiError::new(
            ErrorCode::ModelUnavailable,
            "the replica of this model has stopped: restart the node",
        ),
    }
}

/// What the replica says, as the client shall hear it.
fn request_error(error: RequestError) -> ApiError {
    let message = error.to_string();
    let plain = |code| ApiError::new(code, message.clone());
    let seconds = |d: protocol::Duration| u32::try_from(d.as_secs().max(1)).unwrap_or(u32::MAX);
    match error {
        RequestError::Param(error) => plain(ErrorCode::InvalidValue).at(error.field),
        RequestError::EmptyPrompt | RequestError::UnknownToken { .. } => {
            plain(ErrorCode::InvalidValue).at("prompt")
        }
        RequestError::TooLong { .. } => plain(ErrorCode::ContextLengthExceeded),
        RequestError::Grammar(_) => plain(ErrorCode::InvalidGrammar),
        RequestError::QueueFull { retry_after } => {
            plain(ErrorCode::RateLimitExceeded).retry_after_s(seconds(retry_after))
        }
        RequestError::DeadlineExceeded => plain(ErrorCode::DeadlineExceeded),
        RequestError::Cancelled => plain(ErrorCode::Cancelled),
        // Whoever has the client goes on from its journal.
        RequestError::TakenOver => plain(ErrorCode::NodeLost),
        RequestError::NothingToGenerate => plain(ErrorCode::InvalidValue).at("max_tokens"),
        RequestError::TooManyChoices(_) => plain(ErrorCode::InvalidValue).at("n"),
        RequestError::BadStop(_) => plain(ErrorCode::InvalidValue).at("stop"),
        RequestError::NoToken { .. } | RequestError::Step(_) | RequestError::BadResume(_) => {
            plain(ErrorCode::InternalError)
        }
    }
}
