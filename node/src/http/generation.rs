//! A running request: its events as they come, the times and tokens that metrics want.

use std::sync::Arc;
use std::time::Instant;

use engine::replica::{Event, FinishReason, RequestError};
use engine::sampler::SampledToken;
use protocol::api::{ApiError, ErrorCode, Usage};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::log::RequestLog;
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
    events: mpsc::Receiver<PartEvent>,
    cancel: CancellationToken,
    choices_per_part: usize,
    choices_open: usize,
    prompt_tokens: u64,
    cached_tokens: Vec<Option<usize>>,
    choices: Vec<ChoiceTimes>,
    generated: u64,
}

#[derive(Clone, Copy, Default)]
struct ChoiceTimes {
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: u64,
}

impl Generation {
    /// Submits the parts (one generation for each prompt, each with `choices_per_part` choices) and
    /// waits until the replica has taken or refused them.
    pub async fn start(
        model: Arc<Model>,
        log: Arc<RequestLog>,
        cancel: CancellationToken,
        parts: Vec<Work>,
        prompt_tokens: u64,
        choices_per_part: usize,
    ) -> Result<Generation, ApiError> {
        let choices = parts.len() * choices_per_part;
        let cached_tokens = vec![None; parts.len()];
        let events = tokio::select! {
            submitted = model.replica.submit(parts) => submitted.map_err(submit_error)?,
            () = cancel.cancelled() => return Err(super::shutting_down()),
        };
        Ok(Generation {
            log,
            model,
            events,
            cancel,
            choices_per_part,
            choices_open: choices,
            prompt_tokens,
            cached_tokens,
            choices: vec![ChoiceTimes::default(); choices],
            generated: 0,
        })
    }

    /// The next update; `None` when every choice has ended.
    pub async fn next(&mut self) -> Option<Update> {
        while self.choices_open > 0 {
            let event = tokio::select! {
                biased;
                event = self.events.recv() => event,
                () = self.cancel.cancelled() => return Some(self.fail(super::shutting_down())),
            };
            let Some(event) = event else { return Some(self.fail(lost())) };
            if let Some(update) = self.take(event) {
                return Some(update);
            }
        }
        None
    }

    /// The next update if it is there already.
    pub fn try_next(&mut self) -> Option<Update> {
        while self.choices_open > 0 {
            let event = self.events.try_recv().ok()?;
            if let Some(update) = self.take(event) {
                return Some(update);
            }
        }
        None
    }

    /// Tokens generated so far, over all choices.
    pub fn generated(&self) -> u64 {
        self.generated
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

    fn take(&mut self, (part, event): PartEvent) -> Option<Update> {
        let base = part * self.choices_per_part;
        match event {
            Event::Started { cached_tokens, .. } => {
                // Of several choices the first one tells what was cached before the request.
                if self.cached_tokens[part].is_none() {
                    self.cached_tokens[part] = Some(cached_tokens);
                    self.model.metrics.queue_time.record(self.log.started.elapsed().as_secs_f64());
                }
                None
            }
            Event::Token { choice, sampled, text, .. } => {
                self.count_token(base + choice);
                Some(Update::Token { choice: base + choice, sampled, text })
            }
            Event::Finished { choice, reason, text, generated } => {
                // Ending tokens are generated and have no event of their own.
                let counted = self.choices[base + choice].tokens;
                self.generated += (generated as u64).saturating_sub(counted);
                self.choices_open -= 1;
                self.record_choice(base + choice);
                Some(Update::Finished { choice: base + choice, reason, text })
            }
            Event::Failed { error, .. } => Some(self.fail(request_error(error))),
            Event::Embedding { .. } | Event::Scores { .. } => None,
        }
    }

    fn count_token(&mut self, choice: usize) {
        let now = Instant::now();
        let metrics = &self.model.metrics;
        if self.generated == 0 {
            metrics.time_to_first_token.record((now - self.log.started).as_secs_f64());
        }
        self.generated += 1;
        let times = &mut self.choices[choice];
        times.tokens += 1;
        times.first.get_or_insert(now);
        if let Some(last) = times.last.replace(now) {
            metrics.inter_token_latency.record((now - last).as_secs_f64());
        }
    }

    fn record_choice(&self, choice: usize) {
        let ChoiceTimes { first, last, tokens } = self.choices[choice];
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
        metrics.output_tokens.record(self.generated as f64);
        metrics.cached_tokens.increment(cached);
        self.log.tokens(self.prompt_tokens, cached, self.generated);
    }
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
        let mut events = model.replica.submit(parts).await.map_err(submit_error)?;
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
        RequestError::NothingToGenerate => plain(ErrorCode::InvalidValue).at("max_tokens"),
        RequestError::TooManyChoices(_) => plain(ErrorCode::InvalidValue).at("n"),
        RequestError::BadStop(_) => plain(ErrorCode::InvalidValue).at("stop"),
        RequestError::NoToken { .. } | RequestError::Step(_) => plain(ErrorCode::InternalError),
    }
}
