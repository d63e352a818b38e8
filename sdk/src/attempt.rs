//! One call over several endpoints: whom to ask, how long to wait, when to give up.

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap};
use hyper::{Method, Response, StatusCode};
use protocol::api::ErrorCode;
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};

use crate::base::Base;
use crate::endpoints::Fault;
use crate::error::Refusal;
use crate::{Client, Error, EventId};

/// What is asked, the same of every endpoint.
pub(crate) struct Call {
    pub method: Method,
    pub path: &'static str,
    pub body: Bytes,
    /// When its answer must be complete.
    pub deadline: Instant,
    /// In a row, without anything new.
    pub attempts_max: u32,
    /// The last event seen of the stream with which the answer goes on.
    pub last_event: Option<EventId>,
}

/// What came of the attempts of a call so far.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    /// Without anything new.
    in_a_row: u32,
    last: Option<Error>,
    /// Those that have no copy of the stream.
    excluded: Vec<Base>,
}

impl Attempts {
    /// Something new came: what failed before counts no more.
    pub fn progress(&mut self) {
        *self = Attempts::default();
    }

    /// One more has failed.
    ///
    /// # Errors
    /// If that was the last one.
    pub fn fail(&mut self, max: u32, why: Error) -> Result<(), Error> {
        self.in_a_row += 1;
        match self.in_a_row >= max {
            true => Err(Error::Exhausted { attempts: self.in_a_row, last: Box::new(why) }),
            false => {
                self.last = Some(why);
                Ok(())
            }
        }
    }

    pub fn late(&mut self) -> Error {
        Error::Deadline { last: self.last.take().map(Box::new) }
    }
}

/// How one attempt failed.
enum Failed {
    /// Others would say the same.
    ForGood(Error),
    /// Another one may answer, or the same later.
    Here(Error, Fault),
    /// This one has no copy of the stream.
    NoCopy(Error),
    Late,
}

/// Why nothing more is awaited.
pub(crate) enum Quiet {
    Silent(Duration),
    Late,
}

impl Client {
    /// Asks one endpoint after the other until one answers with success.
    ///
    /// # Errors
    /// When it is refused, the attempts are used up or the deadline passes.
    pub(crate) async fn open(
        &self,
        call: &Call,
        attempts: &mut Attempts,
    ) -> Result<(Base, Response<Incoming>), Error> {
        loop {
            let base = self.next(call, attempts).await?;
            match self.attempt(&base, call).await {
                Ok(response) => {
                    self.worked(&base);
                    return Ok((base, response));
                }
                Err(failed) => self.note(&base, call, failed, attempts)?,
            }
        }
    }

    /// The same, for an answer in one piece.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(crate) async fn read_whole<T: DeserializeOwned>(
        &self,
        call: &Call,
        attempts: &mut Attempts,
    ) -> Result<(Base, T), Error> {
        loop {
            let (base, response) = self.open(call, attempts).await?;
            let reading = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect();
            let failed = match self.watch(&base, call.deadline, None, reading).await {
                Ok(Ok(body)) => match serde_json::from_slice(&body.to_bytes()) {
                    Ok(answer) => return Ok((base, answer)),
                    Err(error) => Failed::ForGood(malformed(&base, error)),
                },
                Ok(Err(error)) => Failed::Here(broken(&base, &*error), Fault::Broken),
                Err(quiet) => quiet.failed(&base),
            };
            self.note(&base, call, failed, attempts)?;
        }
    }

    /// The endpoint to ask next, once it has rested.
    async fn next(&self, call: &Call, attempts: &mut Attempts) -> Result<Base, Error> {
        loop {
            let Some((base, until)) = self.choose(&attempts.excluded) else {
                // Nothing is excluded but in search of a copy.
                let last = call.last_event.expect("a call that goes on with a stream");
                return Err(Error::Lost { last });
            };
            let Some(until) = until else { return Ok(base) };
            if until >= call.deadline {
                return Err(attempts.late());
            }
            // Endpoints may become known meanwhile.
            let rest = until.saturating_duration_since(Instant::now());
            sleep(rest.min(LOOK_AGAIN)).await;
        }
    }

    fn note(
        &self,
        base: &Base,
        call: &Call,
        failed: Failed,
        attempts: &mut Attempts,
    ) -> Result<(), Error> {
        match failed {
            Failed::ForGood(error) => Err(error),
            Failed::Late => Err(attempts.late()),
            Failed::NoCopy(error) => {
                attempts.excluded.push(base.clone());
                attempts.last = Some(error);
                Ok(())
            }
            Failed::Here(error, fault) => {
                self.failed(base, fault);
                self.refresh_if_due();
                attempts.fail(call.attempts_max, error)
            }
        }
    }

    async fn attempt(&self, base: &Base, call: &Call) -> Result<Response<Incoming>, Failed> {
        let left = call.deadline.saturating_duration_since(Instant::now());
        let url = base.join(call.path);
        let mut request = hyper::Request::builder()
            .method(&call.method)
            .uri(&url)
            .header(TIMEOUT_HEADER, u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1));
        if let Some(key) = self.authorization() {
            request = request.header(header::AUTHORIZATION, key);
        }
        if !call.body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(last) = call.last_event {
            request = request.header(LAST_EVENT_ID, last.to_string());
        }
        let request = request
            .body(Full::new(call.body.clone()))
            .map_err(|error| Failed::ForGood(malformed(base, error)))?;
        // A stream begins, or says that it waits, within the nodes' 15 s; other answers take their time.
        let is_stream = call.path != EMBEDDINGS && call.method == Method::POST;
        let silence = is_stream.then_some(self.options().silence_max);
        match self.watch(base, call.deadline, silence, self.http().request(request)).await {
            Ok(Ok(response)) if response.status() == StatusCode::OK => Ok(response),
            Ok(Ok(response)) => Err(self.refused(base, call, response).await),
            Ok(Err(error)) => {
                let fault = match error.is_connect() {
                    true => Fault::Unreachable,
                    false => Fault::Broken,
                };
                Err(Failed::Here(broken(base, &error), fault))
            }
            Err(quiet) => Err(quiet.failed(base)),
        }
    }

    async fn refused(&self, base: &Base, call: &Call, response: Response<Incoming>) -> Failed {
        let (head, body) = response.into_parts();
        let reading = Limited::new(body, REFUSAL_BYTES_MAX).collect();
        let body = match timeout(REFUSAL_MAX, reading).await {
            Ok(Ok(body)) => body.to_bytes(),
            // The status says enough.
            _ => Bytes::new(),
        };
        let mut refusal = Refusal::read(base, head.status.as_u16(), &body);
        refusal.retry_after = retry_after(&head.headers);
        let no_copy = call.last_event.is_some()
            && refusal.code == Some(ErrorCode::NotFound)
            && refusal.param.as_deref() == Some(LAST_EVENT_ID);
        let fault = match refusal.status {
            429 | 503 => Fault::Busy { retry_after: refusal.retry_after },
            _ => Fault::Broken,
        };
        match () {
            () if no_copy => Failed::NoCopy(Error::Refused(refusal)),
            () if refusal.is_retryable() => Failed::Here(Error::Refused(refusal), fault),
            () => Failed::ForGood(Error::Refused(refusal)),
        }
    }

    /// Waits for something of an endpoint as long as that shows that it lives: by what is awaited, or,
    /// when that takes its time, by answering a probe.
    pub(crate) async fn watch<F: Future>(
        &self,
        base: &Base,
        deadline: Instant,
        silence_max: Option<Duration>,
        awaited: F,
    ) -> Result<F::Output, Quiet> {
        let mut awaited = pin!(awaited);
        let begun = Instant::now();
        loop {
            let now = Instant::now();
            let limit = silence_max.map_or(deadline, |max| deadline.min(begun + max));
            let wait = self.options().probe_after.min(limit.saturating_duration_since(now));
            tokio::select! {
                biased;
                output = awaited.as_mut() => return Ok(output),
                () = sleep(wait) => {}
            }
            match Instant::now() {
                now if now >= deadline => return Err(Quiet::Late),
                now if now >= limit => return Err(Quiet::Silent(now - begun)),
                _ => {}
            }
            tokio::select! {
                biased;
                output = awaited.as_mut() => return Ok(output),
                lives = self.lives(base, deadline) => if !lives {
                    return Err(Quiet::Silent(begun.elapsed()));
                },
            }
        }
    }

    /// Whether an endpoint answers anything, on a connection of its own.
    async fn lives(&self, base: &Base, deadline: Instant) -> bool {
        let url = base.join("/healthz");
        let Ok(request) = hyper::Request::get(url).body(Full::default()) else { return false };
        let left = deadline.saturating_duration_since(Instant::now());
        let answer = timeout(self.options().probe_after.min(left), self.http().request(request));
        let is_well = |status: StatusCode| !status.is_server_error();
        match answer.await {
            Ok(Ok(response)) => is_well(response.status()),
            // The deadline says it better.
            _ => Instant::now() >= deadline,
        }
    }
}

impl Quiet {
    pub fn error(self, base: &Base, attempts: &mut Attempts) -> Error {
        match self {
            Quiet::Late => attempts.late(),
            Quiet::Silent(after) => silent(base, after),
        }
    }

    fn failed(self, base: &Base) -> Failed {
        match self {
            Quiet::Late => Failed::Late,
            Quiet::Silent(after) => Failed::Here(silent(base, after), Fault::Broken),
        }
    }
}

fn silent(base: &Base, after: Duration) -> Error {
    Error::Silent { endpoint: base.as_str().to_owned(), after }
}

pub(crate) fn malformed(base: &Base, what: impl std::fmt::Display) -> Error {
    Error::Malformed { endpoint: base.as_str().to_owned(), what: what.to_string() }
}

/// A connection that failed, with all its reasons.
pub(crate) fn broken(base: &Base, error: &(dyn std::error::Error + 'static)) -> Error {
    let reasons = std::iter::successors(Some(error), |error| error.source());
    let why = reasons.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    Error::Connection { endpoint: base.as_str().to_owned(), why }
}

/// Seconds; the form with a date is for caches.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse::<u64>().ok().map(Duration::from_secs)
}

/// How a client says which event it has seen last (WHATWG HTML, section 9.2).
const LAST_EVENT_ID: &str = "last-event-id";
const TIMEOUT_HEADER: &str = "x-request-timeout-ms";
const EMBEDDINGS: &str = "/v1/embeddings";
/// How long an endpoint's rest is slept without a look at the others.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// An answer that is no stream: what a node passes on at most.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// The JSON of an error.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
const REFUSAL_MAX: Duration = Duration::from_secs(2);
